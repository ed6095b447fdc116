"""Where images come from: folders, scikit-learn's digits, plug-ins. Nothing is decoded until it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from federation.errors import ConfigError
from federation.task.names import did_you_mean, load_plugin
from federation.wire.messages import TaskSpec

_SPLITS = {True: ("train",), False: ("test", "val", "valid", "validation")}

_DIGITS_WHITE = 16
"""scikit-learn's digits count the dark pixels of 4x4 blocks: 0 to 16."""

_DIGITS_HELD_OUT = 0.2
_DIGITS_SPLIT_SEED = 0

_DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that are missing, damaged or monstrous."""


@dataclass(frozen=True, slots=True)
class Source:
    """A labelled set of images, of any sizes and modes.

    Attributes:
        where: For messages: the folder or the name.
        classes: Class names; ``labels`` are indices into it.
        labels: int64 ``[samples]``.
        image: Sample index to its image, or to float32 ``[C, H, W]`` in [0, 1] from a plug-in; raises ConfigError.
        check: Sample index; raises ConfigError if the image is damaged, at less than the cost of ``image``.
        header: As ``image``, but only size and mode are sure to be there; the pixels may not be decoded.
        pixels: All images as uint8 ``[samples, H, W]`` or ``[samples, H, W, 3]``, where they are in memory anyway.
    """

    where: str
    classes: tuple[str, ...]
    labels: np.ndarray
    image: Callable[[int], Image.Image | np.ndarray]
    check: Callable[[int], None]
    header: Callable[[int], Image.Image | np.ndarray]
    pixels: np.ndarray | None = None


def from_pixels(where: str, classes: Sequence[str], labels: np.ndarray, pixels: np.ndarray) -> Source:
    """A source whose images are in memory, uint8 ``[samples, H, W]`` or ``[samples, H, W, 3]``."""
    return Source(
        where=where,
        classes=tuple(classes),
        labels=labels.astype(np.int64),
        image=lambda index: Image.fromarray(pixels[index]),
        check=lambda index: None,  # noqa: ARG005 - an array cannot be half there
        header=lambda index: Image.fromarray(pixels[index]),
        pixels=pixels,
    )


def image_folder(folder: Path, *, train: bool) -> Source:
    """Images in one sub-folder for each class; deeper folders belong to their class, hidden entries to none.

    Where the folder holds nothing but splits (``train`` and ``test``, say), the one asked for is taken; else
    all images are, whatever ``train`` says.

    Raises:
        ConfigError: If the folder is missing or empty, or a class folder has no image.
    """
    folder = _split_of(folder.expanduser(), train=train)
    class_folders = _sub_folders(folder)
    if not class_folders:
        raise ConfigError(
            f"{folder} has no class folders: put the images of each class into a folder named after it"
        )
    kinds = Image.registered_extensions()
    files: list[Path] = []
    labels: list[int] = []
    for number, class_folder in enumerate(class_folders):
        found = _files(class_folder, kinds)
        if not found:
            raise ConfigError(
                f"class folder {class_folder} holds no images: add some (.jpg, .png, ...), or remove the folder"
            )
        files += found
        labels += [number] * len(found)
    return Source(
        where=str(folder),
        classes=tuple(entry.name for entry in class_folders),
        labels=np.array(labels, np.int64),
        image=lambda index: _decode(files[index]),
        check=lambda index: _check(files[index]),
        header=lambda index: _header(files[index]),
    )


def digits(*, train: bool) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey; 80 % to train, 20 % held out, stratified, always alike."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows = train_test_split(
        np.arange(len(data.target)),
        test_size=_DIGITS_HELD_OUT,
        random_state=_DIGITS_SPLIT_SEED,
        stratify=data.target,
    )[0 if train else 1]
    pixels = np.rint(data.images[rows] * (255 / _DIGITS_WHITE)).astype(np.uint8)
    return from_pixels("digits", [str(digit) for digit in data.target_names], data.target[rows], pixels)


def from_plugin(name: str, *, train: bool, task: TaskSpec | None) -> Source:
    """What the factory ``package.module:factory`` makes, called with ``train`` and ``task``.

    It returns a map-style dataset of (PIL image, or float tensor ``[C, H, W]`` in [0, 1]; int label). Its
    ``classes`` names the labels where it has one, else the task does, else they are their numbers.

    Raises:
        ConfigError: If the factory or the dataset fails, or gives something else.
    """
    factory = load_plugin(name)
    try:
        dataset = factory(train=train, task=task)
    except Exception as error:  # foreign code may raise anything
        raise ConfigError(f"the data factory {name!r} failed: {error!r}") from error
    return from_dataset(name, dataset, fallback_classes=task.labels if task else ())


def from_dataset(
    where: str, dataset: Any, *, classes: Sequence[str] = (), fallback_classes: Sequence[str] = ()
) -> Source:
    """A map-style dataset of (image, int label) as a source.

    Args:
        where: For messages.
        dataset: ``len(dataset)`` and ``dataset[i]``; ``targets``, ``labels`` or ``_labels`` and ``classes`` are
            used where it has them.
        classes: Override the dataset's own.
        fallback_classes: Used where the dataset has none.

    Raises:
        ConfigError: If it is empty, or a label is not one of the classes.
    """

    def item(index: int) -> tuple[Any, int]:
        try:
            image, label = dataset[index]
            return image, int(label)
        except Exception as error:  # foreign code may raise anything
            raise ConfigError(f"{where}: sample {index} cannot be read: {error!r}") from error

    def image(index: int) -> Image.Image | np.ndarray:
        return _plain_image(item(index)[0], f"{where}: sample {index}")

    try:
        count = len(dataset)
    except TypeError as error:
        raise ConfigError(f"{where} is not a map-style dataset of (image, label): {error}") from error
    if count == 0:
        raise ConfigError(f"{where} holds no samples")
    known = next(
        (v for key in ("targets", "labels", "_labels") if (v := getattr(dataset, key, None)) is not None),
        None,
    )
    if known is None or len(known) != count:
        known = [item(index)[1] for index in range(count)]
    labels = np.asarray(known, dtype=np.int64)
    own = classes or getattr(dataset, "classes", ()) or fallback_classes or range(int(labels.max()) + 1)
    # Imagenette names a class by a tuple of synonyms, of which the first is the usual one.
    names = tuple(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in own)
    wrong = labels[(labels < 0) | (labels >= len(names))]
    if wrong.size:
        raise ConfigError(f"{where}: label {wrong[0]} is not one of its {len(names)} classes, counted from 0")

    def check(index: int) -> None:
        image(index)

    return Source(where, names, labels, image, check, header=image)


def _plain_image(image: Any, what: str) -> Image.Image | np.ndarray:
    import torch

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor) and image.is_floating_point() and image.dim() == 3:  # noqa: PLR2004 - C, H, W
        return image.detach().to("cpu", torch.float32).numpy()
    raise ConfigError(
        f"{what} is {type(image).__name__}, not a PIL image or a float tensor of [channels, height, width]"
    )


def _split_of(folder: Path, *, train: bool) -> Path:
    if not folder.is_dir():
        near = did_you_mean(folder.name, (e.name for e in _sub_folders(folder.parent)))
        raise ConfigError(f"data folder {folder} does not exist{near} Check the path, or mount the disk")
    names = {entry.name for entry in _sub_folders(folder)}
    if not names or names - {name for split in _SPLITS.values() for name in split}:
        return folder
    wanted = next((name for name in _SPLITS[train] if name in names), None)
    if wanted is None:
        raise ConfigError(
            f"{folder} holds {sorted(names)}, but no folder {_SPLITS[train][0]!r}: name the one to use"
        )
    return folder / wanted


def _sub_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    try:
        return sorted(
            entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise ConfigError(f"cannot list the data folder {folder}: {error.strerror}") from error


def _files(folder: Path, kinds: dict[str, str]) -> list[Path]:
    def unlisted(error: OSError) -> None:
        raise ConfigError(f"cannot list {error.filename}: {error.strerror}") from error

    found = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in kinds
        ]
    return sorted(found)


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _check(path: Path) -> None:
    try:
        with Image.open(path) as image:
            image.draft(None, (1, 1))  # a JPEG is then read to its end, but decoded at an eighth of its size
            image.load()
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _header(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"image {path} cannot be read: {error}. Remove it, or copy it here again")
