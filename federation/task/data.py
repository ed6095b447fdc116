"""From a data spec to batches of images that fit a task.

A spec is ``mnist:PATH``, ``cifar10:PATH`` or another torchvision set, ``imagefolder:PATH``, ``digits``, or
``package.module:factory``; a share for trials may follow (:mod:`federation.task.partition`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import structlog
from PIL import Image

from federation.errors import ConfigError
from federation.task.images import ImageData
from federation.task.names import did_you_mean, is_plugin
from federation.task.partition import share, split_spec
from federation.task.preprocessing import Preprocessing
from federation.task.sources import Source, digits, from_plugin, image_folder
from federation.task.torchvision_sets import SETS, torchvision_set
from federation.wire.messages import TaskSpec

DEFAULT_MEMORY_LIMIT_MB = 512
_MIB = 1 << 20

_PHOTO_SIDE = 224
"""Pixels: what torchvision's models were designed for."""

_GREY_MODES = {"1", "L"}
_RGB = 3

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_DIGIT_LABELS = tuple("0123456789")


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a data set without having it: side in pixels, labels, mean and std of its training images."""

    size: int
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_KNOWN = {
    "digits": _Known(8, _DIGIT_LABELS, (0.3053,), (0.3760,)),
    "mnist": _Known(28, _DIGIT_LABELS, (0.1307,), (0.3081,)),
    "fashionmnist": _Known(
        28,
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        (0.2860,),
        (0.3530,),
    ),
    "kmnist": _Known(28, ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"), (0.1918,), (0.3483,)),
    "cifar10": _Known(
        32,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
}

log = structlog.get_logger()


def open_data(
    spec: str,
    task: TaskSpec,
    *,
    train: bool,
    memory_limit_mb: int = DEFAULT_MEMORY_LIMIT_MB,
    allow_single_class: bool = False,
) -> ImageData:
    """Open a data set and bring it into the shape of a task; every image is checked now.

    Args:
        spec: See the module.
        task: Images are converted to its channels and size, labels mapped by name to its labels.
        train: The training or the test split, where the set has two.
        memory_limit_mb: MiB; a decoded set beyond it is decoded anew for each batch.
        allow_single_class: Accept a set (not a share of one) with images of one class only.

    Raises:
        ConfigError: If the spec, the folder, a class, an image or the share is unusable; it says which and why.
    """
    name, partition = split_spec(spec)
    source = open_source(name, train=train, task=task)
    labels = labels_by_name(source, task)
    present = np.unique(labels)
    if len(present) == 1 and not allow_single_class:
        raise ConfigError(
            f"{source.where} has images of one class only, {task.labels[present[0]]!r}: a model trained on it "
            "learns to answer nothing else. Add other classes, or allow it with --allow-single-class"
        )
    rows = np.arange(len(labels)) if partition is None else share(labels, partition)
    labels = labels[rows]
    read = _reader(source, rows, task)
    size_mb = len(labels) * read(0).nbytes / _MIB
    in_memory = size_mb <= memory_limit_mb
    if not in_memory:
        for row in rows:
            source.check(int(row))
    data = ImageData(task, labels, read, in_memory=in_memory)
    log.info(
        "data_opened",
        data=spec,
        train=train,
        samples=len(data),
        size_mb=round(size_mb, 1),
        in_memory=in_memory,
    )
    return data


def task_from_data(
    spec: str, model: str, *, height: int = 0, width: int = 0, channels: int = 0, stand_in: str = ""
) -> TaskSpec:
    """The task of learning a data set: its labels, and a fitting size, channel count, mean and std.

    ``mnist``, ``fashionmnist``, ``kmnist``, ``cifar10`` and ``digits`` need no data for it, and no path. Of
    others the training images are looked at: if all have one size below 224, that is the task's, else 224;
    the task is grey if all of them are. Mean and std are then ImageNet's, which suit photographs.

    Args:
        spec: A data spec; a partition is ignored.
        model: For ``TaskSpec.model``.
        height: Pixels; 0 derives it.
        width: Pixels; 0 derives it.
        channels: 1 or 3; 0 derives it.
        stand_in: A second label for a set with one class only, which is refused without.

    Raises:
        ConfigError: If the data cannot be opened, has one class only, or no task can be made of it.
    """
    name, _ = split_spec(spec)
    known = _KNOWN.get(name.partition(":")[0])
    if known is None:
        source = open_source(name, train=True, task=None)
        own_height, own_width, own_channels = _common_shape(source)
        labels = (*source.classes, stand_in) if stand_in and len(source.classes) == 1 else source.classes
        known = _Known(0, labels, _IMAGENET_MEAN, _IMAGENET_STD)
    else:
        own_height, own_width = known.size, known.size
        own_channels = len(known.mean)
    channels = channels or own_channels
    try:
        return msgspec.convert(
            {
                "model": model,
                "labels": known.labels,
                "channels": channels,
                "height": height or own_height,
                "width": width or own_width,
                "mean": _for_channels(known.mean, channels),
                "std": _for_channels(known.std, channels),
            },
            TaskSpec,
        )
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"no task can be made of {spec!r}: {error}; it has the classes {_few(known.labels)}"
        ) from error


def _common_shape(source: Source) -> tuple[int, int, int]:
    """Height, width and channels that suit all images."""
    sizes: set[tuple[int, int]] = set()
    channels = 1
    for index in range(len(source.labels)):
        image = source.header(index)
        if not isinstance(image, Image.Image):
            depth, height, width = image.shape
            return height, width, depth
        sizes.add((image.height, image.width))
        if image.mode not in _GREY_MODES:
            channels = _RGB
    height, width = sizes.pop()
    if sizes or max(height, width) >= _PHOTO_SIDE:
        return _PHOTO_SIDE, _PHOTO_SIDE, channels
    return height, width, channels


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    return (round(sum(values) / len(values), 4),) * channels


def open_source(name: str, *, train: bool, task: TaskSpec | None) -> Source:
    """Open what a spec without partition names.

    Raises:
        ConfigError: See :func:`open_data`.
    """
    kind, colon, path = name.partition(":")
    if kind == "digits":
        if colon:
            raise ConfigError(f"data {name!r}: digits come with scikit-learn, write just digits")
        return digits(train=train)
    if kind == "imagefolder" or kind in SETS:
        if not path:
            raise ConfigError(f"data {name!r} does not say where: write {kind}:PATH")
        if kind == "imagefolder":
            return image_folder(Path(path), train=train)
        return torchvision_set(kind, Path(path), train=train)
    if is_plugin(name) and ("." in kind or importlib.util.find_spec(kind) is not None):
        return from_plugin(name, train=train, task=task)
    known = ["digits", "imagefolder", *SETS]
    raise ConfigError(
        f"unknown data {kind!r}{did_you_mean(kind, known)} Write imagefolder:PATH, digits, package.module:factory, "
        f"or NAME:PATH with one of {', '.join(SETS)}"
    )


def labels_by_name(source: Source, task: TaskSpec) -> np.ndarray:
    """The source's labels as indices into the task's, int64 ``[samples]``, matched by name.

    Raises:
        ConfigError: If the source has images of a class that the task does not know.
    """
    position = {label: number for number, label in enumerate(task.labels)}
    unknown = [source.classes[c] for c in np.unique(source.labels) if source.classes[c] not in position]
    if unknown:
        raise ConfigError(
            f"{source.where}: class {unknown[0]!r} is not in the federation's task, which has {_few(task.labels)}. "
            "Rename its folder, or take it out of the data"
        )
    mapping = np.array([position.get(label, -1) for label in source.classes], np.int64)
    mapped: np.ndarray = mapping[source.labels]
    return mapped


def _few(labels: tuple[str, ...], most: int = 12) -> str:
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")


def _reader(source: Source, rows: np.ndarray, task: TaskSpec) -> Callable[[int], np.ndarray]:
    """Row of the share to uint8 (from a picture) or float32 (from a tensor) ``[C, H, W]``."""
    shape = (task.channels, task.height, task.width)
    recipe = Preprocessing.of(task)

    def read(row: int) -> np.ndarray:
        image = source.image(int(rows[row]))
        if isinstance(image, Image.Image):
            return recipe.pixels(image)
        if image.shape != shape:
            raise ConfigError(
                f"{source.where}: a tensor of {list(image.shape)} where the task wants {list(shape)}; "
                "give PIL images to have them resized"
            )
        return image

    pixels = source.pixels
    if pixels is not None and task.channels == 1 and pixels.shape[1:] == shape[1:]:
        grey = pixels[:, None]
        return lambda row: grey[rows[row]]
    return read


def write_samples(spec: str, folder: Path, *, count: int) -> Path:
    """Write a few images of the test split as PNG files, named after their labels, as a camera would leave them.

    Args:
        spec: See the module; a partition is ignored.
        folder: Created.
        count: At most this many, taken from the classes in turn.

    Returns:
        ``folder``.

    Raises:
        ConfigError: If the data cannot be opened, or does not consist of pictures.
    """
    name, _ = split_spec(spec)
    source = open_source(name, train=False, task=None)
    folder.mkdir(parents=True, exist_ok=True)
    # The n-th image of every class before the (n+1)-th of any.
    rank = np.empty(len(source.labels), np.int64)
    for label in np.unique(source.labels):
        rows = np.flatnonzero(source.labels == label)
        rank[rows] = np.arange(len(rows))
    for number, row in enumerate(np.lexsort((source.labels, rank))[:count]):
        image = source.image(int(row))
        if not isinstance(image, Image.Image):
            raise ConfigError(
                f"{source.where} holds tensors, not pictures: there is nothing to show as a file"
            )
        image.save(folder / f"{number:02d}-{source.classes[source.labels[row]]}.png")
    return folder
