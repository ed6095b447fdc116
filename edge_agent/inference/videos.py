"""Frames of a video in a file."""

import time
from collections.abc import Callable
from pathlib import Path

from edge_agent.inference.feed import Frame, Pace, Problem
from edge_agent.inference.opencv import open_video
from edge_agent.inference.pictures import PatientFeed


class VideoFeed(PatientFeed):
    """All frames of a video file.

    Args:
        path: The file.
        pace: As for :class:`PatientFeed`.
        clock: As for :class:`PatientFeed`.

    Raises:
        ConfigError: If OpenCV is missing, or cannot read the file.
    """

    def __init__(self, path: Path, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self._video = open_video(path)
        super().__init__(pace, clock)
        self._name = str(path)
        self._number = 0

    def _next(self, timeout_s: float) -> Frame | Problem | None:  # noqa: ARG002 - the next frame is in the file or not
        self._number += 1
        name = f"{self._name} #{self._number}"
        if not self._video.grab():
            self.ended = True
            return None
        pixels = self._video.retrieve()
        return Problem(name=name, reason="damaged") if pixels is None else Frame(name=name, image=pixels)

    def close(self) -> None:
        """Close the file."""
        self._video.close()
        super().close()
