"""What the part of a model that does not learn makes of each image, computed once for all rounds.

A model says which part that is by ``fixed = True`` on its first child (``federation.task.scattering``). An epoch then takes a
fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

_AT_A_TIME = 256
"""Images."""

_FLOAT_BYTES = 4


class Samples(Protocol):
    """What a training loop learns from."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`federation.task.images.ImageData.batch`."""
        ...


class FixedFeatures:
    """Samples as a model's fixed part makes them.

    Args:
        features: float32 ``[n, ...]``, on the device on which they are learned from.
        labels: int64 ``[n]``, there too.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self._features, self._labels = features, labels

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: np.ndarray, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Samples`."""
        import torch

        rows = torch.from_numpy(indices).to(device)
        return self._features[rows], self._labels[rows]


def split(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """A model's fixed part and the one that learns; None if it has no fixed part."""
    from torch import nn

    if not isinstance(model, nn.Sequential) or not getattr(model[0], "fixed", False):
        return None
    return model[0], model[1] if len(model) == 2 else nn.Sequential(*list(model)[1:])  # noqa: PLR2004 - then no wrapper is needed


def compute(
    front: nn.Module, data: Samples, device: str, memory_bytes: int, before_batch: Callable[[], None]
) -> FixedFeatures | None:
    """Compute the features of all samples.

    Args:
        front: The fixed part, on ``device``.
        data: The images.
        device: Where to compute and keep.
        memory_bytes: That they may take.
        before_batch: Called before each batch; may raise to stop.

    Returns:
        None if they take more.
    """
    import torch

    features = labels = None
    with torch.no_grad():
        for start in range(0, len(data), _AT_A_TIME):
            before_batch()
            rows = np.arange(start, min(start + _AT_A_TIME, len(data)))
            images, classes = data.batch(rows, device)
            made = front(images)
            if features is None or labels is None:
                if made[0].numel() * _FLOAT_BYTES * len(data) > memory_bytes:
                    return None
                features = torch.empty((len(data), *made.shape[1:]), device=device)
                labels = torch.empty(len(data), dtype=torch.int64, device=device)
            features[start : start + len(rows)], labels[start : start + len(rows)] = made, classes
    if features is None or labels is None:
        return None
    return FixedFeatures(features, labels)
