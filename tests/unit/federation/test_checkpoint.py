"""federation.task.checkpoint: the bytes of a model, and what is said of files that are not one."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from federation.errors import ConfigError, VerificationError
from federation.task.checkpoint import (
    CheckpointInfo,
    checkpoint_bytes,
    checkpoint_path,
    find_checkpoint,
    read_checkpoint,
    read_info,
    read_metrics,
)
from federation.task.model_card import HoldOutMetrics
from federation.wire.messages import TaskSpec

INFO = CheckpointInfo(
    federation="garden",
    round=3,
    task=TaskSpec(
        model="cnn", labels=("cat", "dog"), channels=1, height=8, width=8, mean=(0.5,), std=(0.25,)
    ),
)


def _arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    return {
        "b.weight": generator.standard_normal((3, 4)).astype(np.float32),
        "a.bias": generator.standard_normal(7).astype(np.float32),
        "scalar": np.array(2.5, dtype=np.float32),
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(checkpoint_bytes(INFO, _arrays()))
    info, arrays = read_checkpoint(file)
    assert info == INFO == read_info(file)
    assert arrays.keys() == _arrays().keys()
    for name, array in _arrays().items():
        assert arrays[name].shape == array.shape
        np.testing.assert_array_equal(arrays[name], array)


def test_the_bytes_do_not_depend_on_order_or_memory_layout() -> None:
    plain = _arrays()
    twisted = {name: np.array(plain[name], order="F") for name in reversed(plain)}
    assert checkpoint_bytes(INFO, twisted) == checkpoint_bytes(INFO, plain)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(checkpoint_bytes(INFO, _arrays())[:kept])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GIF89a, not a model at all", "not a whole safetensors file"),
        (save({"w": np.zeros(2, np.float32)}), "not a checkpoint of fedge"),
        (save({"w": np.zeros(2, np.float32)}, metadata={"format": "pt"}), "not a checkpoint of fedge"),
        (save({"w": np.zeros(2, np.float32)}, metadata={"fedge": "{}"}), "another version of fedge"),
        (save({"w": np.zeros(2, np.float32)}, metadata={"fedge": "no json"}), "another version of fedge"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(file)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    metadata = {"fedge": json.dumps(json.loads(_info_text(checkpoint_bytes(INFO, _arrays()))))}
    file.write_bytes(save({"w": np.zeros(2, np.float64)}, metadata=metadata))
    with pytest.raises(ConfigError, match="'w' is F64"):
        read_checkpoint(file)


def _info_text(data: bytes) -> str:
    length = int.from_bytes(data[:8], "little")
    text: str = json.loads(data[8 : 8 + length])["__metadata__"]["fedge"]
    return text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    arrays = _arrays()
    arrays["b.weight"][1, 2] = bad
    file = tmp_path / "model.safetensors"
    file.write_bytes(checkpoint_bytes(INFO, arrays))
    with pytest.raises(VerificationError, match=r"'b\.weight' has NaN"):
        read_checkpoint(file)


def test_the_newest_round_is_found_by_number(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for number in (0, 1, 2, 9, 10):
        checkpoint_path(tmp_path, number).write_bytes(b"")
    (tmp_path / "checkpoints" / ".round-000099.safetensors.part").write_bytes(b"")
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 10)
    assert find_checkpoint(tmp_path, 2) == checkpoint_path(tmp_path, 2)
    with pytest.raises(ConfigError, match="no checkpoint of round 3: it has 0-2, 9-10"):
        find_checkpoint(tmp_path, 3)


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not an aggregator's state folder"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        find_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="not a file"):
        read_checkpoint(tmp_path)


def test_metrics_are_optional_but_not_garbled(tmp_path: Path) -> None:
    checkpoint = tmp_path / "round-000003.safetensors"
    assert read_metrics(checkpoint) is None
    beside = tmp_path / "round-000003.json"
    beside.write_text('{"loss": 0.25, "accuracy": 0.5, "samples": 10, "later": [1]}')
    assert read_metrics(checkpoint) == HoldOutMetrics(loss=0.25, accuracy=0.5, samples=10)
    beside.write_text('{"loss": 0.25')
    with pytest.raises(ConfigError, match="remove it"):
        read_metrics(checkpoint)
