"""Labelled images in the shape of a task: in memory as bytes, or decoded for each batch.

torch is imported by the first batch, not by opening: a device that waits for its first round needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from federation.task.preprocessing import PIXEL_SCALE
from federation.wire.messages import TaskSpec

if TYPE_CHECKING:
    import torch


class ImageData:
    """Labelled images in the shape of a task.

    Args:
        task: Gives channels, size, mean and std.
        labels: int64 ``[samples]``, indices into ``task.labels``.
        read: Sample index to uint8 ``[C, H, W]``, or to float32 in [0, 1].
        in_memory: Read all samples now, and never again.
    """

    def __init__(
        self, task: TaskSpec, labels: np.ndarray, read: Callable[[int], np.ndarray], *, in_memory: bool
    ) -> None:
        self.task = task
        self.labels = labels
        scale = np.array(task.std, np.float64)[:, None, None]
        self._factor = {
            np.dtype(np.uint8): (PIXEL_SCALE / scale).astype(np.float32),
            np.dtype(np.float32): (1 / scale).astype(np.float32),
        }
        self._offset = (np.array(task.mean, np.float64)[:, None, None] / scale).astype(np.float32)
        # What is decoded needs its reader no more, and with it the files or arrays that it came from.
        self._pixels = _stack(read, np.arange(len(labels))) if in_memory else None
        self._read = None if in_memory else read

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether the decoded images are held in memory; if not, each is decoded whenever a batch needs it."""
        return self._pixels is not None

    def batch(self, indices: np.ndarray, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Some samples, normalised by the task's mean and std.

        Args:
            indices: int64 ``[B]``.
            device: Where the tensors shall be.

        Returns:
            float32 ``[B, C, H, W]`` and int64 ``[B]``.

        Raises:
            ConfigError: If an image that is read from its file now is damaged or gone.
        """
        import torch

        if self._pixels is not None:
            pixels = self._pixels[indices]
        else:
            assert self._read is not None
            pixels = _stack(self._read, indices)
        factor = torch.from_numpy(self._factor[pixels.dtype]).to(device)
        # Bytes travel to an accelerator, not floats: a quarter of the traffic.
        images = torch.from_numpy(pixels).to(device).to(torch.float32, copy=True)
        images.mul_(factor).sub_(torch.from_numpy(self._offset).to(device))
        return images, torch.from_numpy(self.labels[indices]).to(device)


def _stack(read: Callable[[int], np.ndarray], indices: np.ndarray) -> np.ndarray:
    first = read(int(indices[0]))
    stacked = np.empty((len(indices), *first.shape), first.dtype)
    for row, index in enumerate(indices):
        stacked[row] = read(int(index))
    return stacked
