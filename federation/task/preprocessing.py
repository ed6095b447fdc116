"""From a picture to the array that a model takes: the one recipe, for training and for devices. No torch."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct
from PIL import Image

from federation.errors import ConfigError
from federation.wire.fields import Finite, Positive
from federation.wire.messages import TaskSpec

PIXEL_SCALE = 1 / 255
"""Brings 8-bit pixels into [0, 1]."""

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""What is taken for a picture in a folder; a file that is named explicitly may have any name."""

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that are missing, no picture, damaged, truncated or absurdly large."""

PICTURE_MODES = {1: "L", 3: "RGB"}
"""Pillow's name of the pictures that a model with so many channels takes."""


class Preprocessing(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The recipe, as it is written into an exported model.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        height: Pixels.
        width: Pixels.
        mean: Per channel, subtracted from scaled pixels.
        std: Per channel, divided by after that.
        scale: Pixels are multiplied by it first.
        layout: Order of the axes that the model takes.
        resize: ``bilinear-antialias`` is Pillow's BILINEAR: a triangle filter that widens when it shrinks.
    """

    channels: Annotated[int, Meta(ge=1, le=64)]
    height: Annotated[int, Meta(ge=1, le=4096)]
    width: Annotated[int, Meta(ge=1, le=4096)]
    mean: Annotated[tuple[Finite, ...], Meta(min_length=1, max_length=64)]
    std: Annotated[tuple[Positive, ...], Meta(min_length=1, max_length=64)]
    scale: Positive = PIXEL_SCALE
    layout: Literal["NCHW"] = "NCHW"
    resize: Literal["bilinear-antialias"] = "bilinear-antialias"

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} stds for {self.channels} channels")

    @classmethod
    def of(cls, task: TaskSpec) -> "Preprocessing":
        """The recipe of a task."""
        return cls(channels=task.channels, height=task.height, width=task.width, mean=task.mean, std=task.std)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Bring a picture's colours and size into shape.

        Returns:
            uint8 ``[channels, height, width]``.

        Raises:
            ConfigError: If the model takes neither grey nor RGB pictures.
        """
        mode = PICTURE_MODES.get(self.channels)
        if mode is None:
            raise ConfigError(
                f"the model takes {self.channels} channels: only grey (1) and RGB (3) can be made from a picture"
            )
        size = (self.width, self.height)
        if image.mode != mode:
            image = image.convert(mode)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        array = np.asarray(image, dtype=np.uint8)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)  # noqa: PLR2004 - a grey picture has two axes

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Scale, centre and divide.

        Args:
            pixels: uint8 ``[..., channels, height, width]``.

        Returns:
            float32 of the same shape, C-contiguous.
        """
        factor, offset = self.affine()
        return np.ascontiguousarray(pixels * factor - offset)

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalisation with one multiplication and one subtraction for each pixel.

        ``(x * scale - mean) / std = x * (scale / std) - mean / std``.

        Returns:
            ``scale / std`` and ``mean / std``, float32 ``[channels, 1, 1]``.
        """
        return _affine(self.scale, self.mean, self.std)

    def apply(self, image: Image.Image) -> np.ndarray:
        """From a picture to float32 ``[channels, height, width]``, normalised."""
        return self.normalise(self.pixels(image))


@lru_cache(maxsize=8)
def _affine(scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Kept: for a model of 28 x 28 pixels, making the two would take as long as normalising a picture."""
    divisor = np.array(std, dtype=np.float64)[:, None, None]
    centre = np.array(mean, dtype=np.float64)[:, None, None]
    return (scale / divisor).astype(np.float32), (centre / divisor).astype(np.float32)


def find_images(path: Path) -> Iterator[Path]:
    """Pictures below a folder, depth first, in the order of their names within each folder; or ``path`` itself.

    Hidden entries are passed over, and folders that are symbolic links not entered: they may lead in a circle.
    """
    if not path.is_dir():
        yield path
        return
    for parent, children, names in os.walk(path):
        children[:] = sorted(name for name in children if not name.startswith("."))
        shown = (name for name in sorted(names) if not name.startswith("."))
        yield from (Path(parent, name) for name in shown if Path(name).suffix.lower() in IMAGE_SUFFIXES)
