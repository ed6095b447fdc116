"""Gradient inversion: recover pictures from the gradient that they gave.

Zhu, Liu and Han 2019 ("Deep Leakage from Gradients") look for pictures whose gradient equals the one that was seen;
Geiping et al. 2020 ("Inverting Gradients") compare directions, prefer smooth pictures, and step by the sign of the
search's own gradient with Adam. This is the latter, with the labels known to the attacker, as Zhao et al. 2020 ("iDLG")
read them off the last layer for a single picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

STEPS = 300
SMOOTHNESS = 0.01
"""Weight of the mean absolute difference of neighbouring pixels (total variation)."""

_LEARNING_RATE = 0.1
_DECAYS = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the steps after which the rate falls to a tenth, as in Geiping et al."""

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an attacker made of a gradient.

    Attributes:
        images: float32 ``[B, C, H, W]``, normalised as the model's input.
        distance: One minus the cosine between the gradient of ``images`` and the one seen: 0 is a perfect match.
    """

    images: np.ndarray
    distance: float


def gradient(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of the mean cross-entropy for each parameter, detached.

    Args:
        model: In the mode in which it is attacked.
        images: float32 ``[B, C, H, W]``.
        labels: int64 ``[B]``.
    """
    return [part.detach() for part in _gradient(model, images, labels, differentiable=False)]


def clip_and_noise(
    parts: Sequence[torch.Tensor], clip_norm: float, noise_multiplier: float
) -> list[torch.Tensor]:
    """What DP-SGD lets out of one picture's gradient: ``g min(1, C / |g|) + N(0, (sigma C)^2)``.

    Args:
        parts: Of one gradient, as :func:`gradient` gives them.
        clip_norm: ``C``.
        noise_multiplier: ``sigma``.
    """
    import torch

    norm = math.sqrt(sum(float(part.square().sum()) for part in parts))
    scale = min(1.0, clip_norm / max(norm, _TINY))
    deviation = noise_multiplier * clip_norm
    return [part * scale + deviation * torch.randn_like(part) for part in parts]


def invert(
    model: nn.Module,
    seen: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    low: torch.Tensor,
    high: torch.Tensor,
    seed: int = 0,
    steps: int = STEPS,
) -> Recovered:
    """Search for pictures that give the gradient that was seen.

    Minimises ``1 - cos(gradient(x), seen) + smoothness TV(x)`` over pictures within the range of pixels.

    Args:
        model: As when the gradient was taken; its parameters are left as they are.
        seen: One tensor for each parameter.
        labels: int64 ``[B]``, known to the attacker.
        low: float32 ``[C, H, W]``: the darkest pixel, normalised.
        high: The brightest.
        seed: Of the first guess.
        steps: Of the search.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((len(labels), *low.shape), generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=_LEARNING_RATE)
    milestones = [int(steps * share) for share in _DECAYS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    distance = torch.ones(())
    for _ in range(steps):
        parts = _gradient(model, images, labels, differentiable=True)
        distance = 1 - _cosine(parts, seen)
        (direction,) = torch.autograd.grad(distance + SMOOTHNESS * _variation(images), images)
        images.grad = direction.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.copy_(torch.maximum(torch.minimum(images, high), low))
    return Recovered(images.detach().numpy(), float(distance.detach()))


def similarity(recovered: np.ndarray, original: np.ndarray) -> float:
    """Pearson's correlation of the pixels of two pictures: 1 is the same picture up to contrast, 0 is unrelated.

    Args:
        recovered: float ``[C, H, W]``.
        original: Of the same shape.
    """
    first, second = recovered.ravel() - recovered.mean(), original.ravel() - original.mean()
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale > _TINY else 0.0


def _gradient(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, differentiable: bool
) -> tuple[torch.Tensor, ...]:
    import torch

    loss = torch.nn.functional.cross_entropy(model(images), labels)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, parameters, create_graph=differentiable)


def _cosine(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    along = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    norms = [torch.stack([part.square().sum() for part in parts]).sum().sqrt() for parts in (first, second)]
    return along / (norms[0] * norms[1]).clamp_min(_TINY)


def _variation(images: torch.Tensor) -> torch.Tensor:
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    right = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    return down + right
