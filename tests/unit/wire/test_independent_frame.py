"""What docs/protocol.md says of the frame and what fedge does are the same: each reads what the other writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from independent_frame import Tensors, read_frame, write_frame

from federation.wire.codec import decode, encode, max_encoded_bytes, schema_of

FRAMES = Path(__file__).parents[2] / "vectors" / "frames.json"

SPECS = ("float32", "float16", "int8", "sq:0.5", "sq:2", "sq:16", "sq:200", "ternary:0.01", "ternary:0.1")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(23)


@pytest.fixture
def tensors(rng: np.random.Generator) -> Tensors:
    return {
        "conv": (rng.standard_t(3, (16, 8, 3, 3)) * 1e-3).astype(np.float32),
        "dense": rng.normal(0, 0.1, (60, 150)).astype(np.float32),
        "bias": rng.normal(0, 1, 60).astype(np.float32),
        "frozen": np.zeros((5, 5), np.float32),
        "scalar": np.array(2.5, np.float32),
        "lonely": np.eye(70, dtype=np.float32)[:1],
    }


@pytest.mark.parametrize("spec", SPECS)
def test_the_stranger_reads_our_frames_to_the_bit(
    spec: str, tensors: Tensors, rng: np.random.Generator
) -> None:
    frame = encode(tensors, spec, rng)
    ours, theirs = decode(frame, schema_of(tensors), spec), read_frame(frame)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("spec", ["sq:1", "sq:8", "ternary:0.05"])
def test_the_stranger_reads_the_committed_frames(spec: str) -> None:
    committed = json.loads(FRAMES.read_text())[spec]
    for name, array in read_frame(bytes.fromhex(committed["frame"])).items():
        assert array.astype("<f4").tobytes().hex() == committed[name], name


@pytest.mark.parametrize("spec", SPECS)
def test_we_read_the_strangers_frames(spec: str, tensors: Tensors) -> None:
    frame = write_frame(tensors, spec)
    assert len(frame) <= max_encoded_bytes(schema_of(tensors), spec)
    decoded = decode(frame, schema_of(tensors), spec)
    theirs = read_frame(frame)
    for name in tensors:
        assert decoded[name].tobytes() == theirs[name].tobytes(), name
    for name in ("dense", "bias"):  # large enough for the estimate to point the way of the original
        wide = tensors[name].astype(np.float64)
        assert float((decoded[name] * wide).sum()) == pytest.approx(float((wide**2).sum()), rel=0.75), name
