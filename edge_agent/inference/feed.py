"""Where frames come from, as the loop sees it: something to take the next one from, and to stop."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


class Frame(Struct, frozen=True, kw_only=True):
    """One picture, decoded.

    Attributes:
        name: Its path, or the camera's name and a number.
        image: A file's pixels in whatever mode and size it has; a camera's and a video's as uint8
            ``[height, width, 3]``, RGB.
    """

    name: str
    image: Image.Image | Pixels


class Problem(Struct, frozen=True, kw_only=True):
    """A picture without a label.

    Attributes:
        name: As :class:`Frame` has it.
        reason: For people, one line.
        read: Whether it could be read, so that the model failed and not the picture.
    """

    name: str
    reason: str
    read: bool = False


class Feed(ABC):
    """A source of frames. One thread takes; :meth:`stop` may be called from any thread and from a signal handler.

    Attributes:
        live: Whether frames come whether they are taken or not, as a camera's do. Nothing is dropped if not.
        ended: Whether there will never be another frame.
    """

    live: ClassVar[bool] = False
    ended: bool = False

    @property
    def dropped(self) -> int:
        """Frames that newer ones replaced before they were taken."""
        return 0

    @property
    def stuck(self) -> bool:
        """Whether the source has not answered for so long that only a restart of the process can help."""
        return False

    @abstractmethod
    def start(self) -> None:
        """Begin to bring frames. Called once, when there is a model for them."""

    @abstractmethod
    def take(self, timeout_s: float) -> Frame | Problem | None:
        """Wait for the next frame; None if none came in time, or never will (:attr:`ended`), or :meth:`stop` was called."""

    @abstractmethod
    def stop(self) -> None:
        """Interrupt :meth:`take`."""

    @abstractmethod
    def close(self) -> None:
        """Free what :meth:`start` took: files, cameras, threads."""


class Pace:
    """At most so many frames a second, evenly spaced and without drift. It has no clock and does not wait.

    Args:
        fps: Frames a second; 0 is no limit.
    """

    def __init__(self, fps: float) -> None:
        self._period_s = 1 / fps if fps else 0.0
        self._due: float | None = None

    def delay_s(self, now: float) -> float:
        """Seconds until the next frame is due; 0 if it is."""
        return 0.0 if self._due is None else max(0.0, self._due - now)

    def is_due(self, now: float) -> bool:
        """Whether a frame that just came by itself is the one to take.

        Half a period early is near enough: of a camera that is as fast as the pace, frames with a little jitter must
        not be passed over every other time. The schedule does not move, so that the rate is kept on average.
        """
        return self.delay_s(now) <= self._period_s / 2

    def took(self, now: float) -> None:
        """A frame was taken: the next is due one period after this one was, or came, if it came late.

        So the rate is kept in spite of jitter, and no burst makes up for a pause.
        """
        late = self._due is None or now > self._due + self._period_s / 2
        self._due = (now if late or self._due is None else self._due) + self._period_s
