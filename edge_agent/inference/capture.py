"""A camera in a thread of its own: always read, so that its frames are fresh, and only the newest is kept."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import structlog

from edge_agent.inference.cameras import Camera, CameraLostError
from edge_agent.inference.feed import Feed, Frame, Pace, Problem
from edge_agent.inference.sinks import Changes

RETRY_MIN_S = 1.0
RETRY_MAX_S = 30.0
"""Back-off between two attempts to open a camera; it doubles."""

STEADY_S = 10.0
"""A camera that gave frames for so long was a good one: the back-off starts anew."""

STILL_LOST_S = 600.0
"""Between two log lines about a camera that stays away for the same reason."""

STUCK_S = 60.0
"""A call of the driver that takes longer will not come back (a ribbon cable came loose, say). OpenCV's own time limits
are 10 s, and one call may wait for several of them."""

_FAREWELL_S = 5.0
"""What a call of the driver may take when all ends; after that its thread is left behind."""

_log = structlog.get_logger()


class Newest:
    """A queue of one: what is put in replaces what nobody has taken. Safe from any thread."""

    def __init__(self) -> None:
        # Re-entrant, because a signal handler may call close() in the thread that holds it.
        self._changed = threading.Condition(threading.RLock())
        self._item: Frame | Problem | None = None
        self._closed = False
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Items that were replaced."""
        return self._dropped

    def put(self, item: Frame | Problem) -> None:
        """Leave an item for whoever takes next."""
        with self._changed:
            self._dropped += self._item is not None
            self._item = item
            self._changed.notify()

    def take(self, timeout_s: float) -> Frame | Problem | None:
        """The item, as soon as there is one; None if none came in time, or after :meth:`close`."""
        with self._changed:
            if self._item is None and not self._closed:
                self._changed.wait(timeout_s)
            item, self._item = self._item, None
            return item

    def close(self) -> None:
        """Nobody needs to wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Capture(Feed):
    """The newest frame of a camera, at most as often as the pace says, for ever.

    A camera that is lost or was never there is opened again, with growing pauses, and the log says so: on a device that
    nobody looks after there is nothing better to do, and what was unplugged will be plugged in again. Frames between
    two that the pace takes are neither decoded nor counted.

    Args:
        camera: What to read.
        pace: Which of its frames to take.
        clock: Monotonic seconds.
        retry_min_s: First pause.
    """

    live: ClassVar[bool] = True

    def __init__(
        self,
        camera: Camera,
        pace: Pace,
        *,
        clock: Callable[[], float] = time.monotonic,
        retry_min_s: float = RETRY_MIN_S,
    ) -> None:
        self._camera = camera
        self._pace = pace
        self._clock = clock
        self._retry_min_s = retry_min_s
        self._newest = Newest()
        self._number = 0
        self._came = False
        self._driver_since: float | None = None
        self._news = Changes(STILL_LOST_S, clock)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    @property
    def dropped(self) -> int:
        """Frames that were taken from the camera, and replaced by newer ones before the model had time for them."""
        return self._newest.dropped

    @property
    def stuck(self) -> bool:
        """Whether the camera's driver has kept its thread for longer than :data:`STUCK_S`."""
        since = self._driver_since
        return since is not None and self._clock() > since + STUCK_S

    def start(self) -> None:
        """Begin to read the camera."""
        self._thread.start()

    def take(self, timeout_s: float) -> Frame | Problem | None:
        """The newest frame, as soon as there is one."""
        return self._newest.take(timeout_s)

    def stop(self) -> None:
        """Interrupt :meth:`take`."""
        self._newest.close()

    def close(self) -> None:
        """Stop reading the camera."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_FAREWELL_S)

    def _run(self) -> None:
        pause_s = self._retry_min_s
        while not self._closing.is_set():
            began = self._clock()
            reason = self._film()
            if self._closing.is_set():
                return
            if self._came and self._clock() >= began + STEADY_S:
                pause_s = self._retry_min_s
            if self._news.is_news(reason) or self._came:
                event = "source_lost" if self._came else "source_unavailable"
                _log.warning(event, source=self._camera.name, reason=reason, retry_s=pause_s)
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    def _film(self) -> str:
        """Open the camera and read it until it is lost; why it was."""
        self._came = False
        try:
            with self._driver():
                self._camera.open()
            while not self._closing.is_set():
                self._take_one()
        except CameraLostError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises, this thread must not die of it
            return f"{type(error).__name__}: {error}"
        finally:
            with self._driver():
                self._camera.close()
        return ""

    def _take_one(self) -> None:
        with self._driver():
            self._camera.grab()
        if not self._came:
            self._came = True
            _log.info("source_opened", source=self._camera.name)
        now = self._clock()
        if not self._pace.is_due(now):
            return
        self._pace.took(now)
        with self._driver():
            pixels = self._camera.retrieve()
        self._number += 1
        name = f"{self._camera.name} #{self._number}"
        self._newest.put(
            Problem(name=name, reason="the frame is damaged")
            if pixels is None
            else Frame(name=name, image=pixels)
        )

    @contextmanager
    def _driver(self) -> Iterator[None]:
        """Notes for :attr:`stuck` since when a call has not come back."""
        self._driver_since = self._clock()
        try:
            yield
        finally:
            self._driver_since = None
