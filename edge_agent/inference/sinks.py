"""Where predictions go: text for people, JSON lines for programs. MQTT will be a further sink."""

from abc import ABC, abstractmethod
from typing import TextIO

import msgspec
import numpy as np
from msgspec import Struct

from edge_agent.inference.sources import Unreadable
from federation.task.engine import Prediction


class Summary(Struct, frozen=True, kw_only=True):
    """One run over a source.

    Attributes:
        images: Pictures classified.
        unreadable: Pictures skipped.
        p50_ms: Median latency (preprocessing, model, softmax), milliseconds; None without a picture.
        p99_ms: 99th percentile.
        images_per_s: Over the whole run, reading and printing included.
    """

    images: int
    unreadable: int
    p50_ms: float | None
    p99_ms: float | None
    images_per_s: float


def summarise(latencies_ms: "np.typing.ArrayLike", *, unreadable: int, elapsed_s: float) -> Summary:
    """Condense a run.

    Args:
        latencies_ms: One per picture.
        unreadable: Pictures skipped.
        elapsed_s: Wall seconds of the whole run.
    """
    latencies = np.asarray(latencies_ms, dtype=np.float64)
    p50, p99 = np.percentile(latencies, [50, 99]).tolist() if latencies.size else (None, None)
    return Summary(
        images=latencies.size,
        unreadable=unreadable,
        p50_ms=p50,
        p99_ms=p99,
        images_per_s=latencies.size / elapsed_s if elapsed_s > 0 else 0.0,
    )


class Sink(ABC):
    """Takes what a run produces, in order; :meth:`summary` comes last."""

    @abstractmethod
    def prediction(self, name: str, prediction: Prediction) -> None:
        """Take one picture's classes."""

    @abstractmethod
    def unreadable(self, problem: Unreadable) -> None:
        """Take a picture that was skipped."""

    @abstractmethod
    def summary(self, summary: Summary) -> None:
        """Take the run's figures."""


class TextSink(Sink):
    """One line a picture for people: file, label, confidence, milliseconds, runners-up. Skipped ones go to stderr."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err

    def prediction(self, name: str, prediction: Prediction) -> None:
        """Print one line."""
        others = "  ".join(f"{label} {share:.1%}" for label, share in prediction.top[1:])
        line = f"{name}  {prediction.label}  {prediction.confidence:.1%}  {prediction.latency_ms:.2f} ms"
        self._out.write(f"{line}  ({others})\n" if others else f"{line}\n")

    def unreadable(self, problem: Unreadable) -> None:
        """Print one line on stderr."""
        self._err.write(f"skipped {problem.name}: {problem.reason}\n")

    def summary(self, summary: Summary) -> None:
        """Print one line."""
        skipped = f", {summary.unreadable} unreadable" if summary.unreadable else ""
        latency = (
            ""
            if summary.p50_ms is None
            else f"; latency p50 {summary.p50_ms:.2f} ms, p99 {summary.p99_ms:.2f} ms"
        )
        self._out.write(
            f"{summary.images} {'image' if summary.images == 1 else 'images'}{skipped}{latency}"
            f"; {summary.images_per_s:.1f} images/s\n"
        )


class JsonSink(Sink):
    """One JSON object a line on stdout, the last one ``{"summary": ...}``. Skipped pictures are on stderr as well."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err

    def prediction(self, name: str, prediction: Prediction) -> None:
        """Print one object: the prediction's fields, after ``file``."""
        self._write({"file": name, **msgspec.to_builtins(prediction)})

    def unreadable(self, problem: Unreadable) -> None:
        """Print an object with ``file`` and ``error``, and a line on stderr."""
        self._write({"file": problem.name, "error": problem.reason})
        self._err.write(f"skipped {problem.name}: {problem.reason}\n")

    def summary(self, summary: Summary) -> None:
        """Print the run's figures."""
        self._write({"summary": msgspec.to_builtins(summary)})

    def _write(self, value: object) -> None:
        self._out.write(msgspec.json.encode(value).decode() + "\n")
        # A program that reads our lines wants each when it is ready, not when a buffer is full.
        self._out.flush()
