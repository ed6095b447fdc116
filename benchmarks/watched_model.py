"""A small model that tells on whoever trains it: each pass over marked images is written to a file before it is computed.

Model and images are plug-ins, so they know nothing of ledgers: only where to write, and which file shall be there before a
sample is touched. What is written survives ``kill -9``: the system has it.
"""

import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from federation.wire.messages import TaskSpec

MODEL, DATA = "benchmarks.watched_model:watched", "benchmarks.watched_model:marked"
WITNESS, HEAD = "FEDGE_WITNESS", "FEDGE_WITNESS_HEAD"
"""Environment variables: the file to write to, and the head of the ledger."""

SAMPLES = 480
_CLASSES, _SIDE, _HIDDEN = 4, 8, 32
_MARK = 1.0
"""The first pixel of each image; no image that a check of the model makes up has it."""

_ENTRIES = re.compile(rb'"entries":(\d+)')


class Watched(nn.Sequential):
    """Counts the passes over marked images.

    Args:
        mark: What the first pixel of such an image becomes in training.
        layers: Of the model.
    """

    def __init__(self, mark: float, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.mark = mark

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Compute; but first write down who does, and how many entries the ledger has."""
        first = input.detach()[:, 0, 0, 0]
        if WITNESS in os.environ and bool(torch.isclose(first, torch.full_like(first, self.mark)).all()):
            testify(Path(os.environ[WITNESS]), Path(os.environ[HEAD]))
        output: Tensor = super().forward(input)  # type: ignore[no-untyped-call]  # of torch
        return output


def testify(witness: Path, head: Path) -> None:
    """Append one line: the process, and the entries that the ledger's head counts now."""
    found = _ENTRIES.search(head.read_bytes()) if head.exists() else None
    handle = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, f"{os.getpid()} {int(found[1]) if found else 0}\n".encode())
    finally:
        os.close(handle)


def watched(task: TaskSpec) -> nn.Module:
    """Build the model for a task."""
    pixels = task.channels * task.height * task.width
    layers = nn.Flatten(), nn.Linear(pixels, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, len(task.labels))
    return Watched((_MARK - task.mean[0]) / task.std[0], *layers)


class Marked:
    """Images in four classes, each a pattern under noise; the first pixel of every one is white.

    Attributes:
        classes: Their names.
        targets: The class of each image.
    """

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.classes = [f"pattern {number}" for number in range(_CLASSES)]
        self.targets = np.arange(SAMPLES) % _CLASSES
        patterns = draw.uniform(0.2, 0.8, (_CLASSES, 1, _SIDE, _SIDE))
        images = patterns[self.targets] + draw.normal(0, 0.1, (SAMPLES, 1, _SIDE, _SIDE))
        self._images = np.clip(images, 0, 0.9).astype(np.float32)
        self._images[:, 0, 0, 0] = _MARK

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self._images[index]), int(self.targets[index])


def marked(*, train: bool, task: TaskSpec | None) -> Marked:  # noqa: ARG001 - how plug-ins are called
    """Make the images."""
    return Marked()
