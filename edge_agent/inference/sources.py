"""Where pictures come from: a file, a folder, or paths on standard input. Cameras will be a further source."""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from msgspec import Struct
from PIL import Image

from federation.errors import ConfigError
from federation.task.preprocessing import UNREADABLE, find_images

STDIN = "-"


class Frame(Struct, frozen=True, kw_only=True):
    """One picture, decoded.

    Attributes:
        name: Its path.
        image: The pixels, in whatever mode and size the file has.
    """

    name: str
    image: Image.Image


class Unreadable(Struct, frozen=True, kw_only=True):
    """A picture that could not be read.

    Attributes:
        name: Its path.
        reason: For people, one line.
    """

    name: str
    reason: str


def frames(source: str, stdin: TextIO) -> Iterator[Frame | Unreadable]:
    """Read pictures one after the other.

    Args:
        source: A picture, a folder (searched recursively, names in order within each folder), or ``-`` for one path
            per line on ``stdin``.
        stdin: Where paths come from when ``source`` is ``-``.

    Raises:
        ConfigError: If ``source`` does not exist.
    """
    for path in _paths(source, stdin):
        yield _read(path)


def _paths(source: str, stdin: TextIO) -> Iterator[Path]:
    path = Path(source)
    if source == STDIN:
        yield from (Path(name) for line in stdin if (name := line.rstrip("\r\n")))
    elif path.exists():
        yield from find_images(path)
    else:
        raise ConfigError(
            f"--source {source} does not exist: name a picture, a folder, or - for paths on stdin"
        )


def _read(path: Path) -> Frame | Unreadable:
    try:
        with Image.open(path) as image:
            image.load()
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Unreadable(name=str(path), reason=" ".join(reason.split()) or type(error).__name__)
    return Frame(name=str(path), image=image)
