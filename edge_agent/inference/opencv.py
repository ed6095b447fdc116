"""OpenCV for reading videos and cameras, imported only to be used: its colours, its silence, its missing reasons."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.inference.feed import Pixels
from federation.errors import ConfigError

_COLOUR_AXES = 3


class Capturing:
    """An open ``cv2.VideoCapture``.

    Args:
        source: Path or URL.
        backend: Name of one of OpenCV's, such as ``CAP_FFMPEG``.
        parameters: Pairs of the name of a property and its value, for opening it.

    Raises:
        ConfigError: If OpenCV is not installed.
    """

    def __init__(self, source: str, backend: str, parameters: Sequence[tuple[str, int]] = ()) -> None:
        self._cv2 = opencv()
        flat = [number for name, value in parameters for number in (getattr(self._cv2, name), value)]
        self._capture = self._cv2.VideoCapture(source, getattr(self._cv2, backend), flat)

    @property
    def is_open(self) -> bool:
        """Whether there is something to read."""
        return bool(self._capture.isOpened())

    def grab(self) -> bool:
        """Wait for the next frame, decoding as little as possible; False if there is none."""
        return bool(self._capture.grab())

    def retrieve(self) -> Pixels | None:
        """Decode it: uint8 ``[height, width, 3]``, RGB; None if it is damaged."""
        try:
            whole, frame = self._capture.retrieve()
        except self._cv2.error:  # a frame of a webcam that its JPEG decoder throws at
            return None
        return to_rgb(frame) if whole and frame is not None and frame.size else None

    def close(self) -> None:
        """Free the file, the device or the connection."""
        self._capture.release()


def opencv() -> Any:
    """The module ``cv2``, quiet and with one thread.

    Raises:
        ConfigError: If it cannot be imported.
    """
    # FFmpeg writes URLs with their passwords to stderr, and whatever it thinks of each frame. Read at import.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        import cv2
    except ImportError as error:  # not there, or without a library that it needs
        raise ConfigError(
            f"cameras, streams and videos need OpenCV ({error}): pip install 'fedge[camera]'"
        ) from error
    cv2.setNumThreads(1)
    return cv2


def open_video(path: Path) -> Capturing:
    """A video in a file.

    Raises:
        ConfigError: If OpenCV is not installed, or cannot read the file.
    """
    video = Capturing(str(path), "CAP_FFMPEG", [("CAP_PROP_N_THREADS", 1)])
    if not video.is_open:
        raise ConfigError(f"{path} is not a video that FFmpeg can read")
    return video


def to_rgb(frame: np.ndarray) -> Pixels:
    """OpenCV's order of colours, blue first, or none, as RGB.

    Args:
        frame: uint8 ``[height, width, 3]`` BGR, or ``[height, width]`` or ``[height, width, 1]`` grey.

    Returns:
        uint8 ``[height, width, 3]``, RGB, C-contiguous.
    """
    cv2 = opencv()
    grey = frame.ndim < _COLOUR_AXES or frame.shape[2] == 1
    rgb: Pixels = cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB if grey else cv2.COLOR_BGR2RGB)
    return rgb
