"""Cameras and streams: opened, read and lost. OpenCV and picamera2 say next to nothing about why, so it is looked for."""

import os
import socket
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from edge_agent.inference.feed import Pixels
from edge_agent.inference.opencv import Capturing, opencv
from federation.errors import ConfigError

TIMEOUT_MS = 10_000
"""A network camera that is silent for so long is gone; OpenCV's own 30 s are half a minute of blindness."""

PI_SIZE = (640, 480)
"""Width and height, pixels: every sensor gives it without cutting the picture, and models take less."""

_REACH_TIMEOUT_S = 3.0
_DEFAULT_PORTS = {"http": 80, "https": 443, "rtmp": 1935, "rtsp": 554, "rtsps": 322}
SCHEMES = tuple(_DEFAULT_PORTS)
"""Of the URLs of streams."""

_RGB = 3


class CameraLostError(Exception):
    """A camera gives no frames, for now; the text says why, for people."""


class Camera(ABC):
    """What gives frames as time goes by. One thread uses it; any of its calls may take seconds.

    Attributes:
        name: For people, without secrets.
    """

    name: str

    @abstractmethod
    def open(self) -> None:
        """Begin.

        Raises:
            CameraLostError: If it is not there, or will not.
        """

    @abstractmethod
    def grab(self) -> None:
        """Wait for the next frame, decoding as little of it as possible.

        Raises:
            CameraLostError: If there is none.
        """

    @abstractmethod
    def retrieve(self) -> Pixels | None:
        """The frame that was grabbed: uint8 ``[height, width, 3]``, RGB; None if it is damaged."""

    @abstractmethod
    def close(self) -> None:
        """Free it, open or not."""


class OpenCvCamera(Camera):
    """A camera that OpenCV reads.

    Raises:
        ConfigError: If OpenCV is not installed.
    """

    def __init__(self) -> None:
        opencv()  # what is missing is to be told now, not by a thread
        self._capturing: Capturing | None = None

    @abstractmethod
    def _connect(self) -> Capturing:
        """Have OpenCV open it."""

    @abstractmethod
    def _why_not(self) -> str:
        """The likely reason why it cannot be opened."""

    def open(self) -> None:
        """Open it, or find out why not."""
        self._capturing = self._connect()
        if not self._capturing.is_open:
            raise CameraLostError(self._why_not())

    def grab(self) -> None:
        """Wait for the next frame."""
        if self._capturing is None or not self._capturing.grab():
            raise CameraLostError("it gives no more frames")

    def retrieve(self) -> Pixels | None:
        """Decode it."""
        return None if self._capturing is None else self._capturing.retrieve()

    def close(self) -> None:
        """Free the device or the connection."""
        if self._capturing is not None:
            self._capturing.close()
            self._capturing = None


class DeviceCamera(OpenCvCamera):
    """A camera that Linux knows as a file: USB, or CSI with a kernel driver.

    Args:
        device: Such as ``/dev/video0``, or a link to it that keeps its name, ``/dev/v4l/by-id/...``.
        name: For people.
    """

    def __init__(self, device: Path, name: str) -> None:
        super().__init__()
        self.name = name
        self._device = device

    def _connect(self) -> Capturing:
        return Capturing(str(self._device), "CAP_V4L2")

    def _why_not(self) -> str:
        if not self._device.exists():
            return f"there is no {self._device}: is the camera plugged in?"
        if not os.access(self._device, os.R_OK | os.W_OK):
            return f"no permission to use {self._device}: add this user to its group, usually `video`"
        return f"{self._device} cannot be opened: another program may use it, or it is no camera"


class StreamCamera(OpenCvCamera):
    """A camera in the network: RTSP, or HTTP with motion JPEG.

    Args:
        url: May hold a user name and a password; neither is ever shown.

    Raises:
        ConfigError: If OpenCV is not installed, or the URL names no host or no possible port.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.name = without_secrets(url)
        parts = urlsplit(url)
        try:
            port = parts.port or _DEFAULT_PORTS[parts.scheme]
        except ValueError as error:
            raise ConfigError(f"--source {self.name}: {error}") from error
        if not parts.hostname:
            raise ConfigError(f"--source {self.name} names no host")
        self._place = (parts.hostname, port)

    def _connect(self) -> Capturing:
        return Capturing(
            self._url,
            "CAP_FFMPEG",
            [
                ("CAP_PROP_OPEN_TIMEOUT_MSEC", TIMEOUT_MS),
                ("CAP_PROP_READ_TIMEOUT_MSEC", TIMEOUT_MS),
                ("CAP_PROP_N_THREADS", 1),
            ],
        )

    def _why_not(self) -> str:
        host, port = self._place
        try:
            socket.create_connection(self._place, _REACH_TIMEOUT_S).close()
        except OSError as error:
            return f"{host}:{port} cannot be reached: {error.strerror or error}"
        return f"{host}:{port} answers, but gives no video: check path, user name and password"


class PiCamera(Camera):
    """The Raspberry Pi's own camera, through picamera2 and libcamera.

    Args:
        fps: Frames a second that the sensor is asked for; 0 leaves it its own rate.

    Raises:
        ConfigError: If picamera2 is not installed.
    """

    name = "picamera"

    def __init__(self, fps: float) -> None:
        try:
            from picamera2 import Picamera2
        except ImportError as error:
            raise ConfigError(
                f"--source picamera needs picamera2 of Raspberry Pi OS ({error}): sudo apt install python3-picamera2, "
                "and make the virtual environment with --system-site-packages"
            ) from error
        self._make = Picamera2
        self._fps = fps
        self._camera: Any = None
        self._frame: np.ndarray | None = None

    def open(self) -> None:
        """Configure and start it."""
        try:
            self._camera = self._make()
            # picamera2 names formats after their order in a 32-bit word: its BGR888 is an array in the order R, G, B.
            self._camera.configure(
                self._camera.create_video_configuration(
                    main={"size": PI_SIZE, "format": "BGR888"},
                    controls={"FrameRate": self._fps} if self._fps else {},
                )
            )
            self._camera.start()
        except Exception as error:  # libcamera's and picamera2's share no base class
            raise CameraLostError(f"the camera cannot be used: {error or type(error).__name__}") from error

    def grab(self) -> None:
        """Wait for the next frame; it comes decoded."""
        try:
            self._frame = self._camera.capture_array("main")
        except Exception as error:  # as above
            raise CameraLostError(f"it gives no more frames: {error or type(error).__name__}") from error

    def retrieve(self) -> Pixels | None:
        """The frame that came."""
        return None if self._frame is None else from_picamera(self._frame)

    def close(self) -> None:
        """Stop it."""
        camera, self._camera, self._frame = self._camera, None, None
        if camera is not None:
            camera.close()


def from_picamera(frame: np.ndarray) -> Pixels | None:
    """One of picamera2's arrays as the model takes it.

    Args:
        frame: uint8 ``[height, width, 3]``, RGB, or with a fourth channel that says nothing.

    Returns:
        uint8 ``[height, width, 3]``, C-contiguous; None if it is something else.
    """
    if frame.dtype != np.uint8 or frame.ndim != _RGB or frame.shape[2] not in (_RGB, _RGB + 1):
        return None
    return np.ascontiguousarray(frame[:, :, :_RGB])


def without_secrets(url: str) -> str:
    """A URL as it may be shown: no user name, no password, no query, and no path like ``/user=admin&password=x``."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    path = "/..." if "=" in parts.path else parts.path
    return f"{parts.scheme}://{host}{path}"
