"""Canaries: samples made to be found again, each put into the training data or not by a coin of its own.

Two kinds, after Steinke, Nasr and Jagielski 2023, section 6:

* **Mislabelled** canaries are real pictures under wrong labels. A model can only answer them by remembering them. The
  attacker sees the finished model alone and scores a canary by its loss (black box).
* **Gradient** canaries each own coordinates of the gradient that no other sample touches, so that nothing but the
  noise hides whether one took part (white box). They are made by real samples of a widened model, through the very
  code that trains devices: no gradient is slipped in behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import nn

GRADIENT_SCALE = 10.0
"""Gradient norm of a canary at the start, in units of the clip norm (nearly): so it is clipped to exactly the clip norm,
also when training has moved its logits and its gradient has shrunk."""

NO_CANARY = -1

_BATCH = 256

Batch = Callable[[NDArray[np.int64]], "tuple[torch.Tensor, torch.Tensor]"]
"""Some rows to images and labels."""


def draw_coins(count: int, random: np.random.Generator) -> np.ndarray:
    """Bool ``[count]``, each true with probability 1/2, independently."""
    return random.random(count) < 0.5  # noqa: PLR2004 - a fair coin


def mislabelled(labels: np.ndarray, classes: int, random: np.random.Generator) -> np.ndarray:
    """For each label another one, each of the others equally likely.

    Args:
        labels: int64 ``[n]`` in [0, classes).
        classes: At least 2.
        random: Not the one that the coins come from in a way that couples them.

    Raises:
        ValueError: If there is only one class.
    """
    if classes < 2:  # noqa: PLR2004 - see the message
        raise ValueError("one class only: no label would be wrong")
    wrong: np.ndarray = (labels + random.integers(1, classes, len(labels))) % classes
    return wrong


def widen(images: torch.Tensor, canaries: np.ndarray) -> torch.Tensor:
    """Flatten pictures and write beside each which gradient canary it is: the input of :func:`with_canaries`.

    Args:
        images: float32 ``[B, C, H, W]``.
        canaries: int ``[B]``; :data:`NO_CANARY` for an ordinary picture.

    Returns:
        float32 ``[B, C * H * W + 1]``.
    """
    import torch

    numbers = torch.from_numpy(canaries.astype(np.float32))[:, None].to(images.device)
    return torch.cat([images.flatten(1), numbers], dim=1)


def with_canaries(
    model: nn.Module, shape: tuple[int, int, int], classes: int, count: int, clip_norm: float
) -> nn.Module:
    """A model that answers ordinary samples as ``model`` does, and gradient canaries from a layer of their own.

    The layer is linear without bias, from ``count`` inputs that are all 0 but for the canary's own. So the gradient of
    canary i lies in the weights ``[:, i]``, which no other sample has a gradient in; and the model's own weights have none
    from canaries.

    Args:
        model: Maps float32 ``[B, *shape]`` to logits ``[B, classes]``. Used, not copied.
        shape: Channels, height, width.
        classes: Of the logits.
        count: Of the canaries.
        clip_norm: To which the gradient of a sample will be clipped.
    """
    from torch import nn

    class Widened(nn.Module):
        """See :func:`with_canaries`; takes what :func:`widen` gives."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.canaries = nn.Linear(count, classes, bias=False)
            nn.init.zeros_(self.canaries.weight)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            numbers = batch[:, -1].long()
            own = nn.functional.one_hot(numbers.clamp_min(0), count) * (numbers >= 0)[:, None]
            ordinary = self.model(batch[:, :-1].view(-1, *shape)) * (numbers < 0)[:, None]
            answer: torch.Tensor = ordinary + self.canaries(own * (GRADIENT_SCALE * clip_norm))
            return answer

    return Widened()


def gradient_scores(weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How far the weights of each canary have moved the way that its own gradient points.

    At the start all logits are 0 and the negative gradient of canary i with label y is proportional to
    ``e_y - (1, ..., 1) / K``: the score is the product with it.

    Args:
        weights: float ``[classes, count]``, of the layer ``canaries`` after training.
        labels: int64 ``[count]``, under which the canaries were trained on, or would have been.
    """
    moved: np.ndarray = weights[labels, np.arange(len(labels))] - weights.mean(axis=0)
    return moved


@dataclass(frozen=True, slots=True)
class Answers:
    """How a model answers samples.

    Attributes:
        losses: Cross-entropy of each, nats, float64 ``[n]``.
        accuracy: Share whose likeliest label is right.
    """

    losses: np.ndarray
    accuracy: float


def answers(model: nn.Module, batch: Batch, samples: int) -> Answers:
    """Ask a model about samples, in evaluation mode; its mode is put back afterwards.

    Args:
        model: On the device of the batches.
        batch: Gives images and labels of some rows in 0 ... samples - 1.
        samples: How many.
    """
    import torch

    was_training, parts, right = model.training, [], 0
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, samples, _BATCH):
                images, labels = batch(np.arange(start, min(start + _BATCH, samples)))
                logits = model(images)
                parts.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").cpu())
                right += int((logits.argmax(dim=1) == labels).sum())
    finally:
        model.train(was_training)
    return Answers(torch.cat(parts).double().numpy(), right / samples)
