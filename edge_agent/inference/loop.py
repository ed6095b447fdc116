"""The loop over the frames: the newest frame, the running model, everybody who wants to know."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edge_agent.inference.feed import Feed, Frame, Problem
from edge_agent.inference.health import Health, Latencies
from edge_agent.inference.sinks import Sink, Summary
from federation.errors import NonFiniteError
from federation.wire.predictions import PredictionMessage

if TYPE_CHECKING:
    from federation.task.engine import Engine, Prediction
    from federation.wire.release import Release

TURN_S = 5.0
"""Longest wait for a frame or a model before the loop turns, and with it the watchdog and what is yet to be saved."""

STILL_WAITING_S = 600.0
"""Between two log lines that say that there is no model yet."""

SUMMARY_FRAMES = 10_000
"""Newest frames over which the summary states latencies: 80 KB of them, for a run that may take years."""

_PROBABILITY_DIGITS = 4
_LATENCY_DIGITS = 3
"""Microseconds. More digits would be noise, and every link pays for them."""

_MAX_NAME = 1000
"""Bound of the message's field; the end of a path says more than its beginning."""

_MAX_REASON = 300


class _Running:
    """One installed model, and what happened to it since. Only the loop's thread writes."""

    def __init__(self, engine: "Engine", release: "Release | None") -> None:
        self.engine = engine
        self.number = None if release is None else release.number
        self.latencies = Latencies()
        self.frames = 0
        self.errors = 0
        self.non_finite = 0


class InferenceLoop:
    """Labels frames with whatever model is installed, until the source ends or :meth:`stop`.

    A frame is labelled by one model, the newest when its turn comes; a model that is installed meanwhile has the next
    frame. So nothing is lost or labelled twice by a swap. What goes wrong with one frame is counted and told, and the
    next one has its turn. All methods but :meth:`run` are safe from any thread, :meth:`stop` in a signal handler too.

    Args:
        feed: Where frames come from. It is started when there is a model, so that no camera runs for nothing.
        sinks: Where predictions and problems go, in this order. What one of them raises ends the loop.
        limit: Frames, readable or not, after which to stop; 0 means no limit.
        on_turn: Called at least every :data:`TURN_S` seconds and after each frame while all is well, with frames or
            without: for a watchdog. Not called while the source is stuck in its driver (:attr:`Feed.stuck`).
    """

    def __init__(
        self,
        feed: Feed,
        sinks: Sequence[Sink],
        *,
        limit: int = 0,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self._feed = feed
        self._sinks = list(sinks)
        self._limit = limit
        self._on_turn = on_turn
        # Re-entrant, because a signal handler may call stop() in the thread that holds it.
        self._changed = threading.Condition(threading.RLock())
        self._running: _Running | None = None
        self._stopping = False
        self._began: float | None = None
        self._latencies = Latencies(SUMMARY_FRAMES)
        self._images = 0
        self._unreadable = 0
        self._failed = 0
        self._told_waiting_at: float | None = None
        self.last_failure: Exception | None = None

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopping

    @property
    def awaits_model(self) -> bool:
        """Whether no model is installed."""
        return self._running is None

    def add_sink(self, sink: Sink) -> None:
        """Hand everything to one more. Before :meth:`run` only."""
        self._sinks.append(sink)

    def install(self, engine: "Engine | None", release: "Release | None" = None) -> None:
        """Label all frames from the next one on with another model. Returns at once.

        Args:
            engine: The model, warmed up: its first frame should not take longer than others. None takes the running
                one away; the loop then waits for another.
            release: Of which it is; None for a file of the operator's own.
        """
        with self._changed:
            self._running = None if engine is None else _Running(engine, release)
            self._changed.notify_all()

    def health(self) -> Health:
        """How the running model does since it was installed."""
        running = self._running
        if running is None:
            return Health(dropped=self._feed.dropped)
        p50_ms, p99_ms = running.latencies.percentiles()
        return Health(
            frames=running.frames,
            errors=running.errors,
            non_finite=running.non_finite,
            p50_ms=p50_ms,
            p99_ms=p99_ms,
            dropped=self._feed.dropped,
        )

    def stop(self) -> None:
        """End :meth:`run` after the frame that it is at."""
        self._stopping = True
        with self._changed:
            self._changed.notify_all()
        self._feed.stop()

    def run(self) -> Summary:
        """Label frames until the source ends, the limit is reached, or :meth:`stop`.

        Returns:
            The figures of the run, which the sinks have got too.

        Raises:
            ConfigError: If the source cannot be used at all.
        """
        try:
            while not self._stopping and self._turn():
                pass
        finally:
            self._feed.close()
        summary = self._summary()
        for sink in self._sinks:
            sink.summary(summary)
        return summary

    def _turn(self) -> bool:
        """Wait for one frame and label it; False when there will be no other."""
        if not self._feed.stuck:
            self._on_turn()
        for sink in self._sinks:
            sink.turn()
        running = self._model()
        if running is None:
            return True
        if self._began is None:
            self._began = time.perf_counter()
            self._feed.start()
        item = self._feed.take(TURN_S)
        if item is None:
            return not self._feed.ended
        if isinstance(item, Problem):
            self._unreadable += 1
            self._tell(item)
        else:
            # A model that was taken away while this frame was on its way has the last word on it.
            self._label(item, self._running or running)
        return self._images + self._unreadable + self._failed != self._limit

    def _model(self) -> _Running | None:
        with self._changed:
            if self._running is None and not self._stopping:
                self._say_waiting()
                self._changed.wait(TURN_S)
            return self._running

    def _say_waiting(self) -> None:
        now = time.monotonic()
        if self._told_waiting_at is not None and now < self._told_waiting_at + STILL_WAITING_S:
            return
        self._told_waiting_at = now
        import structlog  # not needed, and not paid for, by who names a model

        structlog.get_logger().info(
            "model_awaited", remedy="`aggregator release` makes one; it is fetched by itself"
        )

    def _label(self, frame: Frame, running: _Running) -> None:
        try:
            prediction = running.engine.predict(frame.image)
        except NonFiniteError as error:
            running.non_finite += 1
            self._fail(frame, error)
        except Exception as error:  # noqa: BLE001 - whatever one frame does to onnxruntime, the next has its turn
            running.errors += 1
            self._fail(frame, error)
        else:
            running.frames += 1
            running.latencies.add(prediction.latency_ms)
            self._latencies.add(prediction.latency_ms)
            self._images += 1
            message = self._message(frame, prediction, running.number)
            for sink in self._sinks:
                sink.prediction(message)

    def _message(self, frame: Frame, prediction: "Prediction", number: int | None) -> PredictionMessage:
        return PredictionMessage(
            label=prediction.label,
            confidence=_share(prediction.confidence),
            top=tuple((label, _share(share)) for label, share in prediction.top),
            source=frame.name[-_MAX_NAME:],
            latency_ms=round(prediction.latency_ms, _LATENCY_DIGITS),
            time=round(time.time(), _LATENCY_DIGITS),
            release=number,
            frames=self._images,
            dropped=self._feed.dropped,
        )

    def _fail(self, frame: Frame, error: Exception) -> None:
        self._failed += 1
        self.last_failure = error
        reason = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        self._tell(Problem(name=frame.name, reason=reason, read=True))

    def _tell(self, problem: Problem) -> None:
        for sink in self._sinks:
            sink.problem(problem)

    def _summary(self) -> Summary:
        p50_ms, p99_ms = self._latencies.percentiles()
        elapsed_s = 0.0 if self._began is None else time.perf_counter() - self._began
        return Summary(
            images=self._images,
            unreadable=self._unreadable,
            failed=self._failed,
            dropped=self._feed.dropped,
            p50_ms=p50_ms,
            p99_ms=p99_ms,
            images_per_s=self._images / elapsed_s if elapsed_s > 0 else 0.0,
        )


def _share(probability: float) -> float:
    """Rounded; float32 arithmetic may have left it a little above 1."""
    return min(1.0, round(probability, _PROBABILITY_DIGITS))
