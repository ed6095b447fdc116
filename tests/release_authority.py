"""The one who signs releases, played by a test: keys, releases of tiny models with golden sets, manifests, chunks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from linear_model import make_model
from onnx import helper, numpy_helper

from federation.task.engine import Engine
from federation.task.golden import Golden, write_golden
from federation.wire.messages import ObjectRef
from federation.wire.release import (
    Channel,
    Manifest,
    ModelFormat,
    Release,
    ReleaseDelta,
    Requirements,
)
from federation.wire.signing import AGGREGATOR, Purpose, public_key_hex, seal
from federation.wire.topics import Topics
from federation.wire.transfer import chunk_span, make_ref

DAY_S = 86400.0
CHUNK_BYTES = 256
REQUIREMENTS = Requirements(opset=20, ir_version=10, min_runtime="1.18", card_format="1")

PLENTY_FLOATS = 2**29
"""2 GiB: more than any device of the tests allows a model."""


def key_of(name: str) -> Ed25519PrivateKey:
    """A key that is the same in every run."""
    return Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))


@dataclass
class Authority:
    """Signs in the name of a federation's aggregator.

    Attributes:
        federation: Its name.
        issued_at: Unix seconds of the next manifest.
        key: Release key that signs.
        successor: The one after it.
        version: Of the last manifest.
        objects: Bytes of all objects by their SHA-256.
    """

    federation: str = "garden"
    issued_at: float = 1_900_000_000.0
    key: Ed25519PrivateKey = field(default_factory=lambda: key_of("present"))
    successor: Ed25519PrivateKey = field(default_factory=lambda: key_of("successor"))
    version: int = 0
    refs: dict[str, ObjectRef] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, str]:
        """What a bundle pins."""
        return public_key_hex(self.key), public_key_hex(self.successor)

    def put(self, data: bytes, chunk_bytes: int = CHUNK_BYTES) -> ObjectRef:
        """Add an object."""
        ref = make_ref(data, chunk_bytes)
        self.refs[ref.sha256], self.objects[ref.sha256] = ref, data
        return ref

    def release(
        self,
        number: int,
        *,
        model: bytes | None = None,
        golden: bytes | None = None,
        requirements: Requirements = REQUIREMENTS,
        delta: tuple[str, bytes] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Release:
        """A release of these bytes; without, of bytes that no runtime can run."""
        return Release(
            number=number,
            run="ab" * 8,
            round=number,
            created_at=1.0,
            format=ModelFormat.FP32,
            model=self.put(model or f"model {number}".encode() * 100, chunk_bytes),
            golden=self.put(golden or f"golden {number}".encode() * 10, chunk_bytes),
            requirements=requirements,
            delta=None
            if delta is None
            else ReleaseDelta(base=delta[0], object=self.put(delta[1], chunk_bytes)),
        )

    def manifest(
        self,
        release: Release | None,
        channel: Channel = Channel.STABLE,
        *,
        version: int | None = None,
        share: float = 1.0,
        lifetime_s: float = 30 * DAY_S,
        next_key: Ed25519PrivateKey | None = None,
    ) -> Manifest:
        """The next manifest; its version rises by itself."""
        self.version = self.version + 1 if version is None else version
        return Manifest(
            version=self.version,
            channel=channel,
            issued_at=self.issued_at,
            expires_at=self.issued_at + lifetime_s,
            release=release,
            share=share,
            next_key=(next_key or self.successor).public_key().public_bytes_raw(),
        )

    def sign(
        self, manifest: Manifest, *, key: Ed25519PrivateKey | None = None, federation: str = ""
    ) -> bytes:
        """Its envelope; with another key or federation to forge one."""
        return seal(
            manifest,
            purpose=Purpose.RELEASE,
            federation=federation or self.federation,
            sender=AGGREGATOR,
            key=key or self.key,
        )

    def chunks(self, release: Release) -> Iterator[tuple[str, bytes]]:
        """Topics and payloads of all that a release is made of."""
        topics = Topics(self.federation)
        deltas = () if release.delta is None else (release.delta.object,)
        for ref in (release.model, release.golden, *deltas):
            for index in range(ref.chunks):
                offset, length = chunk_span(ref, index)
                yield (
                    topics.object_chunk(ref.sha256, index),
                    self.objects[ref.sha256][offset : offset + length],
                )


@dataclass(frozen=True)
class Files:
    """What a release is made of: the bytes of a model, and of the golden set that it is tested on."""

    model: bytes
    golden: bytes


def pictures() -> tuple[np.ndarray, ...]:
    """Two that a linear model tells apart."""
    return tuple(np.full((6, 5), value, np.uint8) for value in (20, 230))


def good(folder: Path, number: int) -> Files:
    """A model that passes every test; other numbers give other bytes."""
    return _with_golden(folder, make_model(folder, scale=1.0 + number / 100))


def padded(folder: Path, number: int, size: int) -> Files:
    """A good model with so many bytes of no use in it, so that its download takes a while."""
    path = make_model(folder, scale=1.0 + number / 100)
    model = onnx.load(path)
    noise = np.random.default_rng(number).integers(0, 256, size, np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(noise, "padding"))
    path.write_bytes(model.SerializeToString())
    return _with_golden(folder, path)


def not_finite(folder: Path) -> Files:
    """A model that answers with NaN."""
    golden = good(folder, 0).golden
    return Files(make_model(folder, scale=float("nan")).read_bytes(), golden)


def blind_to_white(folder: Path, number: int) -> Files:
    """A model that passes its test, and answers pictures that are all white with NaN."""
    path = make_model(folder, scale=1.0 + number / 100)
    files = _with_golden(folder, path)
    model = onnx.load_from_string(files.model)
    graph = model.graph
    graph.node[-1].output[0] = "seen"
    graph.node.extend(
        [
            helper.make_node("ReduceMin", ["image"], ["darkest"], keepdims=0),
            helper.make_node("Sub", ["white", "darkest"], ["distance"]),
            helper.make_node("Div", ["nought", "distance"], ["doubt"]),
            helper.make_node("Add", ["seen", "doubt"], ["logits"]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), "white"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nought"))
    return Files(model.SerializeToString(), files.golden)


def mistaken(folder: Path) -> Files:
    """A model that answers otherwise than its golden set says."""
    golden = good(folder, 0).golden
    return Files(make_model(folder, scale=-1.0).read_bytes(), golden)


def misshapen(folder: Path) -> Files:
    """A model whose output has not the shape that its metadata promises."""
    files = good(folder, 0)
    model = onnx.load_from_string(files.model)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((16, 7), np.float32), "w"))
    return Files(model.SerializeToString(), files.golden)


def enormous(folder: Path) -> Files:
    """A good model that first takes more memory than a device has."""
    files = good(folder, 0)
    model = onnx.load_from_string(files.model)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([PLENTY_FLOATS], np.int64), "plenty"))
    graph.node[-1].output[0] = "small"
    # It depends on the input, or it would be computed when the model is loaded.
    graph.node.extend(
        [
            helper.make_node("Flatten", ["image"], ["pixels"]),
            helper.make_node("ReduceMean", ["pixels"], ["one"], keepdims=0),
            helper.make_node("Expand", ["one", "plenty"], ["many"]),
            helper.make_node("ReduceMax", ["many"], ["most"], keepdims=0),
            helper.make_node("Mul", ["most", "zero"], ["nothing"]),
            helper.make_node("Add", ["small", "nothing"], ["logits"]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    return Files(model.SerializeToString(), files.golden)


def broken(folder: Path) -> Files:
    """No model at all."""
    return Files(b"signed in good faith, and no model" * 20, good(folder, 0).golden)


def _with_golden(folder: Path, path: Path) -> Files:
    engine = Engine(path, top=3)
    answers = [engine.predict(picture) for picture in pictures()]
    golden = folder / "golden.safetensors"
    write_golden(
        golden,
        Golden(
            frames=pictures(),
            labels=tuple(answer.label for answer in answers),
            probabilities=tuple(answer.confidence for answer in answers),
            tolerance=0.01,
        ),
    )
    return Files(path.read_bytes(), golden.read_bytes())
