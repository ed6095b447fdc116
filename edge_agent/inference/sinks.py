"""Where predictions go: text for people, JSON lines for programs, a file, MQTT, and the log for what went wrong."""

import time
from collections.abc import Callable
from typing import TextIO

import msgspec
from msgspec import Struct

from edge_agent.inference.feed import Problem
from federation.wire.predictions import PredictionMessage

SAME_PROBLEM_S = 60.0
"""Between two log lines about frames that fail for the same reason, ten times a second perhaps."""


class Summary(Struct, frozen=True, kw_only=True):
    """One run over a source.

    Attributes:
        images: Pictures classified.
        unreadable: Pictures that could not be read.
        failed: Pictures on which the model failed.
        dropped: Frames of a camera that newer ones replaced before their turn came.
        p50_ms: Median latency (preprocessing, model, softmax), milliseconds; None without a picture.
        p99_ms: 99th percentile.
        images_per_s: From the first picture on, reading and printing included.
    """

    images: int
    unreadable: int
    failed: int
    dropped: int
    p50_ms: float | None
    p99_ms: float | None
    images_per_s: float


class Sink:
    """Takes what a run produces, in order, in the loop's thread; :meth:`summary` comes last, then :meth:`close`.

    This one does nothing with it: each sink overrides what concerns it.
    """

    def prediction(self, message: PredictionMessage) -> None:
        """Take one picture's classes."""

    def problem(self, problem: Problem) -> None:
        """Take a picture that has no label."""

    def turn(self) -> None:
        """The loop has turned, with a frame or without; it does so every few seconds."""

    def summary(self, summary: Summary) -> None:
        """Take the run's figures."""

    def close(self) -> None:
        """Nothing will come any more, for whatever reason."""


class Changes:
    """Which predictions are news: a new label at once, the same one again after an interval.

    Args:
        interval_s: Seconds; 0 lets everything through.
        clock: Monotonic seconds.
    """

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._label: str | None = None
        self._told_at = 0.0

    def is_news(self, label: str) -> bool:
        """Whether to tell this one; if so, it is taken as told."""
        now = self._clock()
        if label == self._label and now < self._told_at + self._interval_s:
            return False
        self._label, self._told_at = label, now
        return True


class TextSink(Sink):
    """One line a picture for people: name, label, confidence, milliseconds, runners-up.

    Args:
        out: For predictions.
        err: For pictures without a label; None where the log has them.
        news: Which predictions to print; None prints all.
    """

    def __init__(self, out: TextIO, err: TextIO | None, news: Changes | None = None) -> None:
        self._out = out
        self._err = err
        self._news = news

    def prediction(self, message: PredictionMessage) -> None:
        """Print one line."""
        if self._news is not None and not self._news.is_news(message.label):
            return
        others = "  ".join(f"{label} {share:.1%}" for label, share in message.top[1:])
        line = f"{message.source}  {message.label}  {message.confidence:.1%}  {message.latency_ms:.2f} ms"
        self._out.write(f"{line}  ({others})\n" if others else f"{line}\n")
        if self._err is None:  # a live source: what is seen now is to be read now
            self._out.flush()

    def problem(self, problem: Problem) -> None:
        """Print one line on stderr."""
        if self._err is not None:
            self._err.write(_line(problem))

    def summary(self, summary: Summary) -> None:
        """Print one line."""
        counts = {
            "unreadable": summary.unreadable,
            "failed": summary.failed,
            "dropped": summary.dropped,
        }
        others = "".join(f", {count} {name}" for name, count in counts.items() if count)
        latency = (
            ""
            if summary.p50_ms is None
            else f"; latency p50 {summary.p50_ms:.2f} ms, p99 {summary.p99_ms:.2f} ms"
        )
        self._out.write(
            f"{summary.images} {'image' if summary.images == 1 else 'images'}{others}{latency}"
            f"; {summary.images_per_s:.1f} images/s\n"
        )


class JsonSink(Sink):
    """One JSON object a line on stdout, the last one ``{"summary": ...}``.

    Args:
        out: For predictions, and objects with ``source`` and ``error`` for pictures without a label.
        err: For the latter as well, as text; None where the log has them.
    """

    def __init__(self, out: TextIO, err: TextIO | None) -> None:
        self._out = out
        self._err = err

    def prediction(self, message: PredictionMessage) -> None:
        """Print the message as it would go over MQTT."""
        self._write(message)

    def problem(self, problem: Problem) -> None:
        """Print an object, and a line on stderr."""
        self._write({"source": problem.name, "error": problem.reason})
        if self._err is not None:
            self._err.write(_line(problem))

    def summary(self, summary: Summary) -> None:
        """Print the run's figures."""
        self._write({"summary": msgspec.to_builtins(summary)})

    def _write(self, value: object) -> None:
        self._out.write(msgspec.json.encode(value).decode() + "\n")
        # A program that reads our lines wants each when it is ready, not when a buffer is full.
        self._out.flush()


class MqttSink(Sink):
    """Sends what is news to the broker.

    Args:
        publish: Queues one message, or leaves it when there is no connection: a newer one follows.
        news: Which predictions to send.
    """

    def __init__(self, publish: Callable[[PredictionMessage], None], news: Changes) -> None:
        self._publish = publish
        self._news = news

    def prediction(self, message: PredictionMessage) -> None:
        """Send it if it is news."""
        if self._news.is_news(message.label):
            self._publish(message)


class LogSink(Sink):
    """Logs frames of a live source without a label: each new reason at once, the same one every minute.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import structlog  # only a live source logs, and this is some MB of its memory

        self._log = structlog.get_logger()
        self._news = Changes(SAME_PROBLEM_S, clock)
        self._frames = 0

    def problem(self, problem: Problem) -> None:
        """Log it if it is news, with how many there were so far."""
        self._frames += 1
        if self._news.is_news(problem.reason):
            event = "frame_failed" if problem.read else "frame_unreadable"
            self._log.warning(event, source=problem.name, reason=problem.reason, so_far=self._frames)


def _line(problem: Problem) -> str:
    return f"{'failed' if problem.read else 'skipped'} {problem.name}: {problem.reason}\n"
