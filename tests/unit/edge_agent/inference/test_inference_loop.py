"""The loop over the frames: one model a frame, none lost by a swap, none fatal, and what it says when there is no model."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
from brokers import until
from linear_model import card, make_model
from odd_models import out_of_bounds
from PIL import Image
from slot_releases import made

from edge_agent.inference.feed import Feed, Frame, Pace, Problem
from edge_agent.inference.health import Health, Latencies
from edge_agent.inference.loop import InferenceLoop
from edge_agent.inference.pictures import FolderFeed
from edge_agent.inference.sinks import Sink, Summary
from federation.errors import ConfigError, VerificationError
from federation.task.engine import Engine
from federation.wire.predictions import PredictionMessage

PATIENCE_S = 60.0


class Kept(Sink):
    """Keeps everything that a loop says."""

    def __init__(self, after_prediction: Callable[[int], None] = lambda _: None) -> None:
        self.predictions: list[PredictionMessage] = []
        self.problems: list[Problem] = []
        self.summaries: list[Summary] = []
        self._after_prediction = after_prediction

    def prediction(self, message: PredictionMessage) -> None:
        self.predictions.append(message)
        self._after_prediction(len(self.predictions))

    def problem(self, problem: Problem) -> None:
        self.problems.append(problem)

    def summary(self, summary: Summary) -> None:
        self.summaries.append(summary)


class Given(Feed):
    """Gives these items, then ends."""

    def __init__(self, items: list[Frame | Problem]) -> None:
        self._items: Iterator[Frame | Problem] = iter(items)
        self.started = 0
        self.closed = False

    def start(self) -> None:
        self.started += 1

    def take(self, timeout_s: float) -> Frame | Problem | None:  # noqa: ARG002 - it has them all
        item = next(self._items, None)
        self.ended = item is None
        return item

    def stop(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True


def engine(folder: Path, name: str, *, scale: float = 1.0) -> Engine:
    """A model whose labels begin with its name."""
    (folder / name).mkdir()
    labels = tuple(f"{name}-{label}" for label in ("dark", "bright", "other"))
    return Engine(make_model(folder / name, card(labels=labels).properties(), scale=scale))


def frame(name: str, value: int = 255) -> Frame:
    return Frame(name=name, image=np.full((6, 8, 3), value, np.uint8))


def test_models_are_swapped_under_load_and_each_picture_is_labelled_by_exactly_one(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    names = [f"{number:04}.png" for number in range(300)]
    for number, name in enumerate(names):
        Image.new("L", (8, 8), 255 * (number % 2)).save(pictures / name)
    models = [(engine(tmp_path, name), made(number).release) for number, name in ((1, "a"), (2, "b"))]
    done = threading.Event()
    swaps = threading.Semaphore(0)
    total = 0

    def swap() -> None:
        nonlocal total
        while not done.is_set():
            total += 1
            loop.install(*models[total % 2])
            swaps.release()

    def wait_for_swaps(count: int) -> None:
        """Now and then, until both models have been installed since: a slow machine sees swaps too."""
        if count % 20 == 0:
            while swaps.acquire(blocking=False):
                pass
            assert swaps.acquire(timeout=PATIENCE_S)
            assert swaps.acquire(timeout=PATIENCE_S)

    kept = Kept(wait_for_swaps)
    loop = InferenceLoop(FolderFeed(pictures, Pace(0)), [kept])
    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        summary = loop.run()
    finally:
        done.set()
        swapper.join()
    assert [message.source for message in kept.predictions] == [str(pictures / name) for name in names]
    assert (summary.images, summary.failed, summary.dropped) == (300, 0, 0)
    assert {message.release for message in kept.predictions} == {1, 2}
    assert total > 30
    for number, message in enumerate(kept.predictions):
        own = {1: "a", 2: "b"}[message.release or 0]
        assert message.label == f"{own}-{'bright' if number % 2 else 'dark'}"
        assert {label[:2] for label, _ in message.top} == {f"{own}-"}


def test_a_frame_whose_model_was_taken_away_meanwhile_is_still_labelled(tmp_path: Path) -> None:
    model = engine(tmp_path, "a")

    class Takes(Given):
        def take(self, timeout_s: float) -> Frame | Problem | None:
            loop.install(None)
            return super().take(timeout_s)

    feed = Takes([frame("1"), frame("2")])
    kept = Kept(lambda _: loop.install(model))
    loop = InferenceLoop(feed, [kept])
    loop.install(model)
    runner = threading.Thread(target=loop.run)
    runner.start()
    try:
        until(lambda: len(kept.predictions) == 2, timeout_s=PATIENCE_S, what="both frames have labels")
    finally:
        loop.stop()
        runner.join(PATIENCE_S)
    assert [message.source for message in kept.predictions] == ["1", "2"]


def test_what_one_frame_does_to_the_model_is_counted_and_the_next_has_its_turn(tmp_path: Path) -> None:
    no_picture = Frame(name="no picture", image=np.zeros((6, 8), np.float32))
    feed = Given([frame("1"), no_picture, Problem(name="torn", reason="damaged"), frame("2")])
    kept = Kept()
    loop = InferenceLoop(feed, [kept])
    loop.install(engine(tmp_path, "a"))
    summary = loop.run()
    assert [message.source for message in kept.predictions] == ["1", "2"]
    assert [(problem.name, problem.read) for problem in kept.problems] == [
        ("no picture", True),
        ("torn", False),
    ]
    assert "is no picture" in kept.problems[0].reason
    assert (summary.images, summary.failed, summary.unreadable) == (2, 1, 1)
    assert kept.summaries == [summary]
    health = loop.health()
    assert (health.frames, health.errors, health.non_finite) == (2, 1, 0)
    assert isinstance(loop.last_failure, ConfigError)
    assert feed.closed


def test_a_graph_that_fails_is_an_error_and_no_nan(tmp_path: Path) -> None:
    loop = InferenceLoop(Given([frame("1")]), [Kept()])
    loop.install(Engine(out_of_bounds(tmp_path)))
    loop.run()
    health = loop.health()
    assert (health.frames, health.errors, health.non_finite) == (0, 1, 0)
    assert isinstance(loop.last_failure, VerificationError)


def test_nan_is_counted_by_itself_and_health_begins_anew_with_each_model(tmp_path: Path) -> None:
    broken, whole = engine(tmp_path, "broken", scale=float("nan")), engine(tmp_path, "whole")
    seen: list[Health] = []

    class Installs(Given):
        """Installs the whole model when the broken one has had two frames."""

        def take(self, timeout_s: float) -> Frame | Problem | None:
            seen.append(loop.health())
            if len(seen) == 3:
                loop.install(whole)
                seen.append(loop.health())
            return super().take(timeout_s)

    kept = Kept()
    loop = InferenceLoop(Installs([frame(str(number)) for number in range(5)]), [kept])
    loop.install(broken)
    summary = loop.run()
    assert (seen[2].frames, seen[2].errors, seen[2].non_finite) == (0, 0, 2)
    assert seen[2].p50_ms is None
    assert seen[3] == Health()
    assert isinstance(loop.last_failure, VerificationError)
    end = loop.health()
    assert (end.frames, end.errors, end.non_finite) == (3, 0, 0)
    assert end.p50_ms is not None
    assert end.p99_ms is not None
    assert 0 < end.p50_ms <= end.p99_ms
    assert (summary.images, summary.failed) == (3, 2)


def test_without_a_model_nothing_is_opened_and_that_is_said_once(tmp_path: Path) -> None:
    feed, kept = Given([frame("1")]), Kept()
    turns = threading.Semaphore(0)
    loop = InferenceLoop(feed, [kept], on_turn=turns.release)
    with structlog.testing.capture_logs() as logs:
        runner = threading.Thread(target=loop.run)
        runner.start()
        assert turns.acquire(timeout=PATIENCE_S)
        loop.install(None)  # wakes it, to no avail
        assert turns.acquire(timeout=PATIENCE_S)
        assert feed.started == 0
        loop.install(engine(tmp_path, "a"))
        runner.join(PATIENCE_S)
    assert not runner.is_alive()
    assert [line["event"] for line in logs] == ["model_awaited"]
    assert feed.started == 1
    assert [message.label for message in kept.predictions] == ["a-bright"]


def test_it_can_be_stopped_while_it_waits_for_a_model() -> None:
    loop = InferenceLoop(Given([]), [])
    runner = threading.Thread(target=loop.run)
    runner.start()
    loop.stop()
    runner.join(PATIENCE_S)
    assert not runner.is_alive()
    assert loop.stopped


def test_the_limit_counts_every_frame_whatever_becomes_of_it(tmp_path: Path) -> None:
    kept = Kept()
    items: list[Frame | Problem] = [frame("1"), Problem(name="2", reason="torn"), frame("3"), frame("4")]
    loop = InferenceLoop(Given(items), [kept], limit=3)
    loop.install(engine(tmp_path, "a"))
    summary = loop.run()
    assert (summary.images, summary.unreadable) == (2, 1)


def test_a_message_holds_what_the_wire_allows(tmp_path: Path) -> None:
    kept = Kept()
    loop = InferenceLoop(Given([frame("x" * 2000 + "end", value=128)]), [kept])
    loop.install(engine(tmp_path, "a"), made(7).release)
    loop.run()
    (message,) = kept.predictions
    assert len(message.source) == 1000
    assert message.source.endswith("xend")
    assert message.release == 7
    assert message.frames == 1
    assert sum(share for _, share in message.top) == pytest.approx(1, abs=1e-3)
    assert all(share == round(share, 4) <= 1 for _, share in message.top)


def test_the_watchdog_is_not_fed_while_the_camera_is_stuck(tmp_path: Path) -> None:
    class Stuck(Given):
        @property
        def stuck(self) -> bool:
            return True

    turns: list[None] = []
    loop = InferenceLoop(Stuck([frame("1")]), [], on_turn=lambda: turns.append(None))
    loop.install(engine(tmp_path, "a"))
    loop.run()
    assert turns == []


def test_latencies_are_of_the_newest_frames() -> None:
    latencies = Latencies(window=100)
    assert latencies.percentiles() == (None, None)
    for value in range(250):
        latencies.add(float(value))
    p50_ms, p99_ms = latencies.percentiles()
    assert p50_ms == pytest.approx(199.5)  # of 150 to 249
    assert p99_ms == pytest.approx(248.01)
