"""The gates that a smaller variant of a model must pass before it replaces the float32 one: accuracy and latency."""

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from export.parity import frame_of
from export.pictures import Pictures
from export.report import Gate
from federation.errors import VerificationError
from federation.task.engine import Engine
from federation.wire.release import ModelFormat

DEFAULT_MAX_DROP = 0.5
"""Percentage points of accuracy."""

_ROUNDING_POINTS = 1e-9

_BATCH = 16
_LATENCY_ROUNDS = 15
_LATENCY_BLOCK_S = 0.02
"""Each model in turn runs for so long, at least once, so that both see the same moods of the machine."""

_MEASURABLE = 1.05
"""Two equally fast models differ by less, in the median of interleaved runs on a shared machine."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model says about pictures.

    Attributes:
        indices: int64 ``[n]``, the most likely class of each.
        confidences: float64 ``[n]``.
    """

    indices: np.ndarray
    confidences: np.ndarray

    def accuracy(self, labels: np.ndarray) -> float:
        """Share of right answers, in [0, 1]."""
        return float((self.indices == labels).mean())


def ask(engine: Engine, pixels: np.ndarray) -> Answers:
    """Run a model over pictures of its own size, as a device would.

    Args:
        engine: The very file that is to be judged.
        pixels: uint8 ``[n, channels, height, width]``.

    Raises:
        VerificationError: If it fails, or answers with NaN or infinity.
    """
    indices: list[int] = []
    confidences: list[float] = []
    for start in range(0, len(pixels), _BATCH):
        frames = [frame_of(picture) for picture in pixels[start : start + _BATCH]]
        for prediction in engine.predict_batch(frames):
            indices.append(prediction.index)
            confidences.append(prediction.confidence)
    return Answers(np.array(indices), np.array(confidences))


@dataclass(frozen=True, slots=True)
class Reference:
    """The float32 model that variants are held against.

    Attributes:
        engine: Ready to run.
        pictures: To measure on.
        answers: What it says about them.
    """

    engine: Engine
    pictures: Pictures
    answers: Answers

    @classmethod
    def of(cls, engine: Engine, pictures: Pictures) -> "Reference":
        """Ask the float32 model once, for all variants.

        Raises:
            VerificationError: As :func:`ask`.
        """
        return cls(engine, pictures, ask(engine, pictures.pixels))

    @property
    def accuracy(self) -> float | None:
        """Of the float32 model, in [0, 1]; None without labels."""
        return None if self.pictures.labels is None else self.answers.accuracy(self.pictures.labels)


def judge(
    engine: Engine,
    reference: Reference,
    *,
    format: ModelFormat,  # noqa: A002 - the name that the flag and the wire have
    how: str,
    size_bytes: int,
    max_drop: float,
    latency_gate: bool,
) -> Gate:
    """Hold a variant against the float32 model; the latency gate only if it passes the accuracy gate.

    Accuracy is top-1 where the pictures have labels; where they have none, every picture whose class changes counts as lost.

    Args:
        engine: The variant.
        reference: The float32 model, and pictures.
        format: Of the variant.
        how: It was made.
        size_bytes: Of its file.
        max_drop: Most percentage points that it may lose.
        latency_gate: Whether it must not be slower than the float32 model.
    """
    samples = len(reference.pictures)
    gate = Gate(
        format=format,
        how=how,
        size_bytes=size_bytes,
        samples=samples,
        accuracy=None,
        accuracy_fp32=reference.accuracy,
        agreement=0.0,
        drop_points=100.0,
    )
    try:
        answers = ask(engine, reference.pictures.pixels)
    except VerificationError as error:
        return replace(gate, refused=f"accuracy gate: {error}")
    agreement = float((answers.indices == reference.answers.indices).mean())
    if reference.pictures.labels is None or reference.accuracy is None:
        accuracy, lost = None, 1 - agreement
        what = f"{lost * 100:.2f} % of {samples} pictures have another class than with fp32"
    else:
        accuracy = answers.accuracy(reference.pictures.labels)
        lost = reference.accuracy - accuracy
        what = f"top-1 {accuracy:.2%} where fp32 has {reference.accuracy:.2%} ({samples} pictures)"
    gate = replace(gate, accuracy=accuracy, agreement=agreement, drop_points=lost * 100)
    if lost * 100 > max_drop + _ROUNDING_POINTS:
        return replace(
            gate, refused=f"accuracy gate: {what}, a drop of at most {max_drop:g} points is allowed"
        )
    if not latency_gate:
        return gate
    own_ms, fp32_ms = latencies_ms((engine, reference.engine), frame_of(reference.pictures.pixels[0]))
    gate = replace(gate, latency_ms=own_ms, latency_fp32_ms=fp32_ms)
    if own_ms > fp32_ms * _MEASURABLE:
        return replace(
            gate,
            refused=f"latency gate: {own_ms:.3f} ms a picture where fp32 takes {fp32_ms:.3f} ms (one thread, this "
            f"{platform.machine()} machine)",
        )
    return gate


def latencies_ms(engines: Sequence[Engine], frame: np.ndarray) -> list[float]:
    """Median milliseconds of ``predict`` for each engine, measured in turn so that a busy machine hits all alike.

    Args:
        engines: Each with its own threads.
        frame: uint8 ``[H, W, 3]`` or ``[H, W]``.
    """
    for engine in engines:
        engine.warm_up()
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(_LATENCY_ROUNDS):
        for engine, taken in zip(engines, times, strict=True):
            until = time.perf_counter() + _LATENCY_BLOCK_S
            while True:
                began = time.perf_counter()
                engine.predict(frame)
                ended = time.perf_counter()
                taken.append((ended - began) * 1000)
                if ended >= until:
                    break
    return [statistics.median(taken) for taken in times]
