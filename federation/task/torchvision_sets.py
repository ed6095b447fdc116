"""torchvision's classification data sets by name: those on the disk, or downloaded where the network allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from federation.errors import ConfigError
from federation.task.sources import Source, from_dataset, from_pixels
from federation.task.vision import import_torchvision

_DIGITS = tuple("0123456789")

_BY_TRAIN = ({"train": True}, {"train": False})
_BY_SPLIT = ({"split": "train"}, {"split": "test"})
_BY_TRAINVAL = ({"split": "trainval"}, {"split": "test"})
_BY_VAL = ({"split": "train"}, {"split": "val"})


@dataclass(frozen=True, slots=True)
class TorchvisionSet:
    """How torchvision spells one of its data sets.

    Attributes:
        name: The class in ``torchvision.datasets``.
        splits: Its arguments for training and for testing.
        place: Where below PATH its files lie, for the message when they do not.
        downloads: Whether torchvision can fetch it.
        classes: Class names, where torchvision gives none or adds words to them.
        more: Further arguments.
    """

    name: str
    splits: tuple[Mapping[str, Any], Mapping[str, Any]]
    place: str = ""
    downloads: bool = True
    classes: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


SETS: dict[str, TorchvisionSet] = {
    entry.name.lower(): entry
    for entry in (
        TorchvisionSet("MNIST", _BY_TRAIN, "MNIST/raw", classes=_DIGITS),
        TorchvisionSet("FashionMNIST", _BY_TRAIN, "FashionMNIST/raw"),
        TorchvisionSet("KMNIST", _BY_TRAIN, "KMNIST/raw"),
        TorchvisionSet("EMNIST", _BY_TRAIN, "EMNIST/raw", more={"split": "balanced"}),
        TorchvisionSet("CIFAR10", _BY_TRAIN, "cifar-10-batches-py"),
        TorchvisionSet("CIFAR100", _BY_TRAIN, "cifar-100-python"),
        TorchvisionSet("USPS", _BY_TRAIN, classes=_DIGITS),
        TorchvisionSet("SVHN", _BY_SPLIT, classes=_DIGITS),
        TorchvisionSet("STL10", _BY_SPLIT, "stl10_binary"),
        TorchvisionSet("GTSRB", _BY_SPLIT, "gtsrb"),
        TorchvisionSet("DTD", _BY_SPLIT, "dtd"),
        TorchvisionSet("Food101", _BY_SPLIT, "food-101"),
        TorchvisionSet("Flowers102", _BY_SPLIT, "flowers-102"),
        TorchvisionSet("FGVCAircraft", _BY_TRAINVAL, "fgvc-aircraft-2013b"),
        TorchvisionSet("OxfordIIITPet", _BY_TRAINVAL, "oxford-iiit-pet"),
        TorchvisionSet("RenderedSST2", _BY_SPLIT, "rendered-sst2"),
        TorchvisionSet("Country211", _BY_SPLIT, "country211"),
        TorchvisionSet("PCAM", _BY_SPLIT, "pcam"),
        TorchvisionSet("Imagenette", _BY_VAL),
        TorchvisionSet("FER2013", _BY_SPLIT, "fer2013", downloads=False),
        TorchvisionSet("StanfordCars", _BY_SPLIT, "stanford_cars", downloads=False),
        TorchvisionSet("ImageNet", _BY_VAL, downloads=False),
    )
}
"""By the name that a data spec uses."""


def torchvision_set(name: str, folder: Path, *, train: bool) -> Source:
    """Open one of :data:`SETS` below ``folder``; what is not there is downloaded.

    Raises:
        ConfigError: If it is neither there nor to be had from the network, or its files are damaged.
    """
    entry = SETS[name]
    where = f"{name}:{folder}"
    folder = folder.expanduser()
    dataset = _opened(entry, folder, dict(entry.splits[0 if train else 1]), where)
    pixels = np.asarray(data) if (data := getattr(dataset, "data", None)) is not None else None
    if pixels is not None and pixels.dtype == np.uint8 and (pixels.ndim == 3 or pixels.shape[-1] == 3):  # noqa: PLR2004 - grey, or RGB
        classes = entry.classes or tuple(str(label) for label in dataset.classes)
        return from_pixels(where, classes, np.asarray(dataset.targets), pixels)
    return from_dataset(where, dataset, classes=entry.classes)


def _opened(entry: TorchvisionSet, folder: Path, split: dict[str, Any], where: str) -> Any:
    open_set = getattr(import_torchvision().datasets, entry.name)
    arguments: dict[str, Any] = {**split, **entry.more}
    expected = folder / entry.place
    try:
        return open_set(str(folder), **arguments)
    except Exception as error:  # each set has its own way to say that it is not there
        if not entry.downloads:
            raise ConfigError(
                f"{where} cannot be opened: {error}. Its files are expected in {expected}; "
                f"torchvision's page on {entry.name} says where to get them"
            ) from error
    try:
        return open_set(str(folder), **arguments, download=True)
    except Exception as error:  # the network, the disk and damaged files speak in many exceptions
        raise ConfigError(
            f"{where} is not whole on the disk and cannot be downloaded: {error!r}. Its files are expected in "
            f"{expected}: copy them there, or connect this machine to the network. For pictures in one folder "
            "for each class write imagefolder:PATH"
        ) from error
