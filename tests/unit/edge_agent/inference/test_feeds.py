"""Where frames come from: the pace, files, standard input, and a camera of which only the newest frame counts."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import structlog
from brokers import until
from PIL import Image

from edge_agent.inference.cameras import Camera, CameraLostError
from edge_agent.inference.capture import STUCK_S, Capture, Newest
from edge_agent.inference.feed import Frame, Pace, Pixels, Problem
from edge_agent.inference.pictures import FolderFeed, StdinFeed

PATIENCE_S = 60.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(fps: float, arrivals: list[float]) -> list[float]:
    """Which frames of a camera a pace takes."""
    pace, chosen = Pace(fps), []
    for now in arrivals:
        if pace.is_due(now):
            pace.took(now)
            chosen.append(now)
    return chosen


@pytest.mark.parametrize("camera_fps", [10, 15, 25, 30, 60])
def test_a_camera_is_taken_from_at_the_rate_that_was_asked_for(camera_fps: int) -> None:
    draw = np.random.default_rng(camera_fps)
    seconds = 20
    arrivals = [
        (number + draw.uniform(-0.1, 0.1)) / camera_fps for number in range(1, camera_fps * seconds + 1)
    ]
    assert len(taken(10, arrivals)) == pytest.approx(10 * seconds, abs=1)


def test_a_slower_camera_gives_every_frame_and_no_pace_takes_all() -> None:
    arrivals = [number / 4 for number in range(100)]
    assert taken(10, arrivals) == arrivals
    assert taken(0, [0.0, 0.0, 0.0]) == [0.0, 0.0, 0.0]


def test_a_pause_is_not_made_up_for() -> None:
    pace = Pace(10)
    pace.took(0.0)
    pace.took(60.0)
    assert pace.delay_s(60.0) == pytest.approx(0.1)


def test_files_wait_for_their_time_without_a_poll(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    clock = Clock()
    feed = FolderFeed(tmp_path, Pace(0.01), clock)
    assert isinstance(feed.take(0), Frame)
    assert feed.take(0) is None
    assert not feed.ended
    clock.now += 99
    assert feed.take(0.01) is None
    clock.now += 1
    second = feed.take(0)
    assert isinstance(second, Frame)
    assert second.name.endswith("b.png")
    feed.close()


def test_waiting_for_the_next_picture_is_interrupted_by_a_stop(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    feed = FolderFeed(tmp_path, Pace(1e-6))
    assert feed.take(0) is not None
    taken: list[object] = []
    waiter = threading.Thread(target=lambda: taken.append(feed.take(1e6)))
    waiter.start()
    feed.stop()
    waiter.join(PATIENCE_S)
    assert taken == [None]
    feed.close()
    feed.stop()  # a second signal, after the end


@contextmanager
def stdin() -> Iterator[tuple[StdinFeed, int]]:
    """A feed and the other end of its pipe."""
    reader, writer = os.pipe()
    feed = StdinFeed(reader, Pace(0))
    try:
        yield feed, writer
    finally:
        feed.close()
        os.close(reader)


def test_paths_may_come_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "ä b.png"
    Image.new("L", (4, 4)).save(path)
    with stdin() as (feed, writer):
        line = os.fsencode(path) + b"\r\n\n"
        os.write(writer, line[:7])
        assert feed.take(0.01) is None
        os.write(writer, line[7:] + os.fsencode(path))
        first = feed.take(PATIENCE_S)
        assert isinstance(first, Frame)
        assert first.name == str(path)
        assert feed.take(0.01) is None
        assert not feed.ended
        os.close(writer)
        assert isinstance(feed.take(PATIENCE_S), Frame)
        assert feed.take(PATIENCE_S) is None
        assert feed.ended


def test_a_line_that_never_ends_takes_no_memory() -> None:
    with stdin() as (feed, writer):

        def write() -> None:
            os.write(writer, b"x" * 300_000)
            os.close(writer)

        writing = threading.Thread(target=write)
        writing.start()
        problems = []
        while not feed.ended:
            if (item := feed.take(PATIENCE_S)) is not None:
                assert isinstance(item, Problem)
                problems.append(item)
        writing.join()
        assert len(problems) >= 2
        assert max(len(problem.name) for problem in problems) <= 2 * 2**16


def test_only_the_newest_is_kept_and_what_it_replaced_is_counted() -> None:
    newest = Newest()
    assert newest.take(0) is None
    for number in range(5):
        newest.put(Problem(name=str(number), reason=""))
    assert newest.take(0) == Problem(name="4", reason="")
    assert newest.take(0) is None
    assert newest.dropped == 4
    newest.close()
    assert newest.take(1e6) is None


class Played(Camera):
    """A camera that does what its script says: a number is a frame of that brightness, None a damaged one, a string a loss.

    ``wait`` lets each grab pass; without it, frames come as fast as they are read.
    """

    name = "played"

    def __init__(self, script: list[int | str | None], *, wait: threading.Semaphore | None = None) -> None:
        self._script = iter(script)
        self._wait = wait
        self._frame: int | None = None
        self.opened = 0
        self.is_open = False
        self.retrieved = 0

    def open(self) -> None:
        self.opened += 1
        self.is_open = True

    def grab(self) -> None:
        if self._wait is not None:
            assert self._wait.acquire(timeout=PATIENCE_S)
        step = next(self._script, "the script is over")
        if isinstance(step, str):
            raise CameraLostError(step)
        self._frame = step

    def retrieve(self) -> Pixels | None:
        self.retrieved += 1
        return None if self._frame is None else np.full((2, 2, 3), self._frame, np.uint8)

    def close(self) -> None:
        self.is_open = False


def test_what_the_model_has_no_time_for_is_dropped_and_counted() -> None:
    frames = list(range(50))
    camera = Played([*frames, "unplugged"])
    capture = Capture(camera, Pace(0), retry_min_s=1e6)
    with structlog.testing.capture_logs() as logs:
        capture.start()
        until(
            lambda: any(line["event"] == "source_lost" for line in logs),
            timeout_s=PATIENCE_S,
            what="it is lost",
        )
        item = capture.take(PATIENCE_S)
        capture.close()
    assert isinstance(item, Frame)
    assert item.name == "played #50"
    assert isinstance(item.image, np.ndarray)
    assert item.image[0, 0, 0] == 49
    assert capture.dropped == 49
    assert not camera.is_open


def test_a_camera_that_is_lost_is_opened_again_and_the_log_tells_both() -> None:
    camera = Played([1, "unplugged", "still away", "still away", None, 2, "over"])
    capture = Capture(camera, Pace(0), retry_min_s=0.001)
    seen: list[str] = []
    with structlog.testing.capture_logs() as logs:
        capture.start()
        deadline = time.monotonic() + PATIENCE_S
        while "played #3" not in seen:
            assert time.monotonic() < deadline
            if item := capture.take(1.0):
                seen.append(item.name)
        until(
            lambda: any(line.get("reason") == "over" for line in logs),
            timeout_s=PATIENCE_S,
            what="it is lost",
        )
        capture.close()
    told = [(line["event"], line.get("reason")) for line in logs]
    assert told[:5] == [
        ("source_opened", None),
        ("source_lost", "unplugged"),
        ("source_unavailable", "still away"),  # once, not for each attempt
        ("source_opened", None),
        ("source_lost", "over"),
    ]
    assert camera.opened >= 4


def test_a_damaged_frame_is_a_problem_and_not_the_end() -> None:
    ready = threading.Semaphore(0)
    capture = Capture(Played([None, 7], wait=ready), Pace(0), retry_min_s=1e6)
    capture.start()
    ready.release()
    damaged = capture.take(PATIENCE_S)
    ready.release()
    whole = capture.take(PATIENCE_S)
    ready.release()
    capture.close()
    assert damaged == Problem(name="played #1", reason="the frame is damaged")
    assert isinstance(whole, Frame)


def test_frames_between_two_of_the_pace_are_not_even_decoded() -> None:
    clock = Clock()
    ready = threading.Semaphore(0)
    camera = Played(list(range(100)), wait=ready)
    capture = Capture(camera, Pace(1), clock=clock, retry_min_s=1e6)
    capture.start()
    for _ in range(20):
        ready.release()
    assert capture.take(PATIENCE_S) is not None
    clock.now += 1
    ready.release()
    assert capture.take(PATIENCE_S) is not None
    assert camera.retrieved == 2
    assert capture.dropped == 0
    for _ in range(200):
        ready.release()
    capture.close()


def test_a_driver_that_raises_anything_does_not_end_the_thread() -> None:
    class Raises(Played):
        def open(self) -> None:
            super().open()
            if self.opened < 3:
                raise RuntimeError("ioctl")

    camera = Raises([5, "over"])
    capture = Capture(camera, Pace(0), retry_min_s=0.001)
    with structlog.testing.capture_logs() as logs:
        capture.start()
        assert isinstance(capture.take(PATIENCE_S), Frame)
        capture.close()
    assert logs[0]["reason"] == "RuntimeError: ioctl"


def test_a_driver_that_does_not_come_back_is_noticed() -> None:
    clock = Clock()
    held = threading.Semaphore(0)
    capture = Capture(Played([1, 2], wait=held), Pace(0), clock=clock, retry_min_s=1e6)
    assert not capture.stuck
    capture.start()

    def stuck_later() -> bool:
        clock.now += STUCK_S + 1
        return capture.stuck

    until(stuck_later, timeout_s=PATIENCE_S, what="it is stuck")
    for _ in range(5):
        held.release()
    assert capture.take(PATIENCE_S) is not None
    until(lambda: not capture.stuck, timeout_s=PATIENCE_S, what="it has come back")
    capture.close()
