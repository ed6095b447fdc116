"""A part of MNIST as a data set of its own, for ``--data benchmarks.subset:images``: what five small devices share."""

import os
from pathlib import Path
from typing import Any

from benchmarks.runner import BenchmarkError

SIZE = 12_000
"""Training images: 2,400 for each of five agents."""

SPEC = f"{__name__}:images"


def folder() -> Path | None:
    """The folder ``mnist`` below ``FEDGE_DATA``; None if there is none."""
    named = os.environ.get("FEDGE_DATA", "")
    path = Path(named).expanduser().resolve() / "mnist"
    return path if named and path.is_dir() else None


def images(*, train: bool, task: object = None) -> Any:  # noqa: ARG001 - how data factories are called
    """The first ``SIZE`` training images, or all test images.

    Raises:
        BenchmarkError: If ``FEDGE_DATA`` holds no MNIST.
    """
    from torchvision.datasets import MNIST

    where = folder()
    if where is None:
        raise BenchmarkError("no MNIST: set FEDGE_DATA to a folder with mnist/MNIST/raw in it")
    dataset = MNIST(str(where), train=train)
    if train:  # they are in random order already
        dataset.data, dataset.targets = dataset.data[:SIZE], dataset.targets[:SIZE]
    return dataset
