"""Real pictures to calibrate with and to measure on, and the refusal of what is none."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from federation.errors import ConfigError
from federation.task.data import labels_by_name, open_source
from federation.task.partition import share, split_spec
from federation.task.preprocessing import PICTURE_MODES, UNREADABLE, Preprocessing, find_images
from federation.task.sources import Source, image_folder
from federation.wire.messages import TaskSpec

CALIBRATION_PICTURES = 256
"""Enough for the ranges of activations: more changed no accuracy that was measured."""

DEFAULT_MEASURED = 1000
"""Pictures of the accuracy gate by default: half a point is five of them, and a ResNet-18 needs half a minute."""

FEWEST_TO_CALIBRATE = 16
"""Below this a class or a lighting that matters is likely missing from the ranges."""

_MAX_BYTES = 256 * 2**20
"""Of decoded pictures in memory."""

_SAMPLE_FRAMES = 64
"""Pictures that are also kept in their own size, for the golden set."""

_LONGEST_SIDE = 160
"""Pixels of such a picture: a golden set travels to every device with every release."""

_SPLITS = {"train", "test", "val", "valid", "validation"}
_SEED = 20_240_229

_LOOKED_AT = 256
"""Pixels of the side of the middle part that is tested for noise."""

_BLANK_STD = 1.0
"""Grey levels: a picture that varies less shows nothing."""

_NOISE_CORRELATION = 0.3
"""Neighbouring pixels of pictures correlate: handwritten digits of 8 x 8 pixels 0.5 in the median, MNIST 0.7, photographs
0.9 and more. White noise has none: 0."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures in the shape of a task.

    Attributes:
        where: For messages.
        pixels: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``, indices into the task's labels; None where nobody said what the pictures show.
        frames: A few of them, uint8 ``[H, W, 3]`` or ``[H, W]``, in their own sizes, up to 160 pixels.
        correlations: Of neighbouring pixels of each, before resizing; NaN for one that is blank.
    """

    where: str
    pixels: np.ndarray
    labels: np.ndarray | None
    frames: tuple[np.ndarray, ...]
    correlations: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)


def read_pictures(data: str, task: TaskSpec, *, train: bool, limit: int) -> Pictures:
    """Read pictures, chosen evenly at random but always alike.

    Args:
        data: A data spec (:mod:`federation.task.data`); or a folder with one folder for each class, a folder of pictures
            without labels, or one picture.
        task: Pictures are brought into its shape; labels matched by name.
        train: The training or the test split, where there are two.
        limit: At most this many; fewer if they took more than 256 MiB.

    Raises:
        ConfigError: If nothing can be read, or labelled data does not fit the task.
    """
    recipe = Preprocessing.of(task)
    mode = PICTURE_MODES.get(task.channels)
    limit = min(limit, max(1, _MAX_BYTES // (task.channels * task.height * task.width)))
    path = Path(data).expanduser()
    labels: np.ndarray | None = None
    images: Iterator[Image.Image | np.ndarray]
    if path.exists() and not _is_labelled(path, task):
        images = _unlabelled(path)
    else:
        source, rows, known = _labelled(data, path, task, train=train)
        chosen = _choose(len(rows), limit)
        labels = known[chosen]
        images = (source.image(int(row)) for row in rows[chosen])
    pixels: list[np.ndarray] = []
    frames: list[np.ndarray] = []
    correlations: list[float] = []
    for image in images:
        if isinstance(image, Image.Image):
            plain = image if image.mode == mode or mode is None else image.convert(mode)
            pixels.append(recipe.pixels(plain))
            if len(frames) < _SAMPLE_FRAMES:
                frames.append(_small(plain))
            correlations.append(neighbour_correlation(np.asarray(plain.convert("L"))))
        else:
            pixels.append(_bytes_of(image, task, data))
            correlations.append(neighbour_correlation(pixels[-1].mean(axis=0)))
        if len(pixels) == limit:
            break
    if not pixels:
        raise ConfigError(
            f"--data {data} holds no readable picture: name a picture, a folder of them or a data set"
        )
    return Pictures(data, np.stack(pixels), labels, tuple(frames), np.array(correlations))


def refuse_unreal(pictures: Pictures) -> None:
    """Refuse to calibrate with what is not pictures: too few, blank ones, or noise.

    The ranges of a network's activations on white noise say nothing about those on photographs: 99.2 % became 93.6 on MNIST.
    Neighbouring pixels of real pictures are alike (Ruderman and Bialek 1994, "Statistics of natural images"); those of
    white noise are not.

    Raises:
        ConfigError: Saying what was found.
    """
    different = len({picture.tobytes() for picture in pictures.pixels})
    if different < FEWEST_TO_CALIBRATE:
        raise ConfigError(
            f"--data {pictures.where} holds {different} different pictures, int8 needs at least {FEWEST_TO_CALIBRATE} to "
            "calibrate with: name more, or choose --format fp32"
        )
    shown = pictures.correlations[~np.isnan(pictures.correlations)]
    if len(shown) < len(pictures) / 2:
        raise ConfigError(
            f"{len(pictures) - len(shown)} of {len(pictures)} pictures in --data {pictures.where} are blank: int8 is "
            "calibrated with pictures of what the cameras will see"
        )
    typical = float(np.median(shown))
    if typical < _NOISE_CORRELATION:
        raise ConfigError(
            f"--data {pictures.where} looks like noise: neighbouring pixels correlate by {typical:.2f}, in pictures by "
            f"{_NOISE_CORRELATION} and more. int8 is calibrated with pictures of what the cameras will see"
        )


def neighbour_correlation(grey: np.ndarray) -> float:
    """Correlation of pixels with their right and lower neighbours, in the middle of a picture ``[H, W]``; NaN if blank."""
    height, width = grey.shape
    top, left = max(0, (height - _LOOKED_AT) // 2), max(0, (width - _LOOKED_AT) // 2)
    middle = grey[top : top + _LOOKED_AT, left : left + _LOOKED_AT].astype(np.float64)
    middle = middle - middle.mean()
    variance = float((middle**2).mean())
    if variance < _BLANK_STD**2:
        return float("nan")
    beside = [
        float((first * second).mean())
        for first, second in ((middle[:, :-1], middle[:, 1:]), (middle[:-1], middle[1:]))
        if first.size
    ]
    return sum(beside) / len(beside) / variance if beside else float("nan")


def _is_labelled(path: Path, task: TaskSpec) -> bool:
    """Whether a folder holds splits, or folders named after the task's labels."""
    if not path.is_dir():
        return False
    try:
        inside = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    except OSError as error:
        raise ConfigError(f"cannot list --data {path}: {error.strerror or error}") from error
    return bool(inside) and (inside <= _SPLITS or bool(inside & set(task.labels)))


def _labelled(data: str, path: Path, task: TaskSpec, *, train: bool) -> tuple[Source, np.ndarray, np.ndarray]:
    """A source, the rows of it that are meant, and their labels."""
    if path.is_dir():
        source, partition = image_folder(path, train=train), None
    else:
        name, partition = split_spec(data)
        source = open_source(name, train=train, task=task)
    labels = labels_by_name(source, task)
    rows = np.arange(len(labels)) if partition is None else share(labels, partition)
    return source, rows, labels[rows]


def _unlabelled(path: Path) -> Iterator[Image.Image]:
    found = list(find_images(path))
    for number in _choose(len(found), len(found), in_order=False):
        try:
            with Image.open(found[number]) as image:
                image.load()
        except UNREADABLE:
            continue  # a folder's odd broken file says nothing about the model
        yield image


def _choose(count: int, limit: int, *, in_order: bool = True) -> np.ndarray:
    chosen = np.random.default_rng(_SEED).permutation(count)[:limit]
    return np.sort(chosen) if in_order else chosen


def _small(image: Image.Image) -> np.ndarray:
    if max(image.size) > _LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return np.asarray(image)


def _bytes_of(image: np.ndarray, task: TaskSpec, data: str) -> np.ndarray:
    """A plug-in's float32 tensor in [0, 1] as pixels."""
    shape = (task.channels, task.height, task.width)
    if image.shape != shape:
        raise ConfigError(
            f"--data {data} gives tensors of {list(image.shape)}, the model takes {list(shape)}: give PIL images to have "
            "them resized"
        )
    pixels: np.ndarray = np.rint(np.clip(image, 0, 1) * np.iinfo(np.uint8).max).astype(np.uint8)
    return pixels
