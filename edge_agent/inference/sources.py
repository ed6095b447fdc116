"""What ``--source`` may be, and the feed that each of them becomes."""

import re
from pathlib import Path

from edge_agent.inference.feed import Feed, Pace
from edge_agent.inference.pictures import FolderFeed, StdinFeed
from federation.errors import ConfigError

STDIN = "-"
STDIN_DESCRIPTOR = 0
"""Not ``sys.stdin``'s, which is None for a process that was started without one, whatever its source."""

PICAMERA = "picamera"

VIDEO_SUFFIXES = frozenset(
    {".avi", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
"""What is taken for a video. Any other file is taken for a picture."""

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_live(source: str) -> bool:
    """Whether a source gives frames as time goes by: a camera or a stream."""
    return (
        source == PICAMERA
        or source.isdecimal()
        or _URL.match(source) is not None
        or Path(source).is_char_device()
    )


def open_feed(source: str, *, fps: float, file_fps: float, stdin: int = STDIN_DESCRIPTOR) -> Feed:
    """Make the feed for a source. Nothing of a camera is touched before the feed is started.

    Args:
        source: A camera's number or device file, ``picamera``, the URL of a stream, a video, a picture, a folder, or
            ``-`` for paths on standard input.
        fps: Frames a second to take from a camera or a stream at most; 0 is no limit.
        file_fps: The same for everything else.
        stdin: Descriptor to read paths from.

    Raises:
        ConfigError: If the source does not exist or is not understood, or what it needs is not installed.
    """
    path = Path(source)
    if source == STDIN:
        return StdinFeed(stdin, Pace(file_fps))
    if is_live(source):
        return _live(source, fps)
    if not path.exists():
        raise ConfigError(
            f"--source {source} does not exist: name a camera's number, {PICAMERA}, rtsp://..., http://..., a video, "
            "a picture, a folder, or - for paths on stdin"
        )
    if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
        from edge_agent.inference.videos import VideoFeed

        return VideoFeed(path, Pace(file_fps))
    return FolderFeed(path, Pace(file_fps))


def _live(source: str, fps: float) -> Feed:
    from edge_agent.inference.cameras import SCHEMES, Camera, DeviceCamera, PiCamera, StreamCamera
    from edge_agent.inference.capture import Capture

    camera: Camera
    if source == PICAMERA:
        camera = PiCamera(fps)
    elif source.isdecimal():
        camera = DeviceCamera(Path(f"/dev/video{source}"), f"camera {source}")
    elif not _URL.match(source):
        camera = DeviceCamera(Path(source), source)
    elif source.partition(":")[0].lower() in SCHEMES:
        camera = StreamCamera(source)
    else:
        raise ConfigError(f"--source: {source.partition(':')[0]}:// is not read, only {', '.join(SCHEMES)}")
    return Capture(camera, Pace(fps))
