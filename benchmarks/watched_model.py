"""A small model that tells on whoever trains it: each training pass is written to a file before it is computed.

It is a plug-in (``benchmarks.watched_model:watched``), so it knows nothing of ledgers: only where to write, and which file
shall be there before a sample is touched. What it writes survives ``kill -9``: the system has it.
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from federation.wire.messages import TaskSpec

WITNESS, HEAD = "FEDGE_WITNESS", "FEDGE_WITNESS_HEAD"
"""Environment variables: the file to write to, and the head of the ledger."""

NAME = "benchmarks.watched_model:watched"
HIDDEN = 32

_ENTRIES = re.compile(rb'"entries":(\d+)')


class Watched(nn.Sequential):
    """Counts its training passes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Compute; in training, first write down who does, and how many entries the ledger has."""
        if self.training and torch.is_grad_enabled() and WITNESS in os.environ:
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
    """Build it for a task."""
    pixels = task.channels * task.height * task.width
    return Watched(nn.Flatten(), nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(task.labels)))
