"""Frames that wait until they are taken: pictures in files and folders, paths on standard input."""

import os
import select
import socket
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from edge_agent.inference.feed import Feed, Frame, Pace, Problem
from federation.task.preprocessing import UNREADABLE, find_images

_READ_BYTES = 1 << 16

_LONGEST_PATH_BYTES = 1 << 16
"""A longer line is no path of any system: what there is of it is taken for one, and cannot be read."""


class PatientFeed(Feed):
    """A source that has all the time: every picture is taken, none dropped.

    Args:
        pace: When the next one may be taken.
        clock: Monotonic seconds.
    """

    def __init__(self, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = pace
        self._clock = clock
        # A socket and not a condition: a signal handler may write to it at any moment, and it can be waited for
        # together with standard input.
        self._stopped, self._stop = socket.socketpair()
        self._stop.setblocking(False)

    def start(self) -> None:
        """Nothing to begin: files are opened one after the other."""

    def take(self, timeout_s: float) -> Frame | Problem | None:
        """The next picture, when its time has come."""
        delay_s = self._pace.delay_s(self._clock())
        if self._wait(min(delay_s, timeout_s)) or delay_s > timeout_s:
            return None
        item = self._next(timeout_s)
        if item is not None:
            self._pace.took(self._clock())
        return item

    def stop(self) -> None:
        """Interrupt whatever is waited for."""
        # Closed already, or full: whoever waited is gone or has been told.
        with suppress(OSError):
            self._stop.send(b"\0")

    def close(self) -> None:
        """Free the sockets."""
        self._stopped.close()
        self._stop.close()

    def _wait(self, timeout_s: float) -> bool:
        """Let the time pass; whether :meth:`stop` was called meanwhile."""
        ready, _, _ = select.select([self._stopped], [], [], timeout_s)
        return bool(ready)

    @abstractmethod
    def _next(self, timeout_s: float) -> Frame | Problem | None:
        """As :meth:`take`, whatever the pace."""


class FolderFeed(PatientFeed):
    """One picture, or all below a folder, names in order within each folder.

    Args:
        path: The file or the folder.
        pace: As for :class:`PatientFeed`.
        clock: As for :class:`PatientFeed`.
    """

    def __init__(self, path: Path, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(pace, clock)
        self._paths = find_images(path)

    def _next(self, timeout_s: float) -> Frame | Problem | None:  # noqa: ARG002 - a file is there or it is not
        path = next(self._paths, None)
        if path is None:
            self.ended = True
            return None
        return read_picture(path)


class StdinFeed(PatientFeed):
    """Pictures whose paths come one a line; blank lines are passed over.

    Args:
        descriptor: Of the open file that gives the lines.
        pace: As for :class:`PatientFeed`.
        clock: As for :class:`PatientFeed`.
    """

    def __init__(self, descriptor: int, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(pace, clock)
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._at_end = False

    def _next(self, timeout_s: float) -> Frame | Problem | None:
        while True:
            while self._lines:
                if name := self._lines.popleft().rstrip(b"\r"):
                    return read_picture(Path(os.fsdecode(name)))
            if self._at_end:
                self.ended = True
                return None
            stopped = self._stopped.fileno()
            ready, _, _ = select.select([stopped, self._descriptor], [], [], timeout_s)
            if stopped in ready or not ready:
                return None
            self._read()

    def _read(self) -> None:
        """Take what is there, without waiting for a whole line."""
        data = os.read(self._descriptor, _READ_BYTES)
        self._at_end = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines.extend(lines)
        if self._at_end or len(self._rest) > _LONGEST_PATH_BYTES:
            self._lines.append(self._rest)
            self._rest = b""


def read_picture(path: Path) -> Frame | Problem:
    """Decode a file, or say why it cannot be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Problem(name=str(path), reason=" ".join(reason.split()) or type(error).__name__)
    return Frame(name=str(path), image=image)
