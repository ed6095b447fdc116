"""The model ``scattering``: fixed wavelets and one layer that learns. Made for training under differential privacy.

Noise hurts the more, the more weights there are, and features that need not be learned cost no privacy: Tramèr and Boneh
("Differentially Private Learning Needs Better Features (or Much More Data)", ICLR 2021) put a linear layer on the scattering transform of Bruna and Mallat
("Invariant Scattering Convolution Networks", 2013)::

    S0 = x * phi      S1 = |x * psi_(j,a)| * phi      S2 = ||x * psi_(0,a)| * psi_(1,b)| * phi

with Morlet wavelets ``psi`` at scales j = 0, 1 and eight angles a, b, a Gaussian ``phi``, and a step of 4 pixels: 81 maps. Here wavelets are cut off
at about two standard deviations, and the second one is applied as the first one at half the resolution, which takes less time.
Groups of three maps are normalised in each image by itself, as Tramèr and Boneh do without data to take
statistics from. Four angles cost 0.1 points at epsilon 3 (``benchmarks.dp``).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

from federation.wire.messages import TaskSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

STRIDE = 4
"""Pixels between features: 2 to the power of the number of scales."""

_ANGLES = 8
_MAPS = 1 + 2 * _ANGLES + _ANGLES**2
_GROUP_MAPS = 3
"""Maps that are normalised together."""

_SIGMA, _FREQUENCY, _SLANT = 0.8, 0.75 * math.pi, 4 / _ANGLES
"""Of the Morlet wavelet at scale 0: standard deviation along its waves, their frequency, and how much it is longer across; as
Kymatio has them (Andreux et al., "Kymatio: Scattering Transforms in Python", JMLR 2020)."""

_REACH = {0: 3, 1: 5}
"""Pixels from a wavelet's middle to its end, by scale."""

_SMALLEST_ROOT = 1e-12
"""Keeps the slope of a root finite at zero."""


def scattering(task: TaskSpec) -> nn.Module:
    """Build the model: 3,969 features of an MNIST image, 39,700 weights for ten classes, beginning at zero.

    Args:
        task: Any size; the number of weights grows with the number of pixels.
    """
    from torch import nn

    maps = _MAPS * task.channels
    down, right = -(-task.height // STRIDE), -(-task.width // STRIDE)
    head = nn.Linear(maps * down * right, len(task.labels))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    features = nn.Sequential(
        OrderedDict[str, nn.Module](
            scattering=_features(),
            norm=nn.GroupNorm(maps // _GROUP_MAPS, maps, affine=False),
            flatten=nn.Flatten(),
        )
    )
    vars(features)["fixed"] = True  # a trainer may compute them once for all rounds
    return nn.Sequential(OrderedDict[str, nn.Module](features=features, head=head))


def morlet(scale: int, angle: float, reach: int) -> tuple[Tensor, Tensor]:
    """A wavelet's real and imaginary part.

    ``psi(u, v) = exp(-(u^2 + s^2 v^2) / (2 sigma^2)) (exp(i f u) - k)`` with ``(u, v)`` turned by ``angle``, over the Gaussian's integral, and ``k``
    such that it sums to zero.

    Args:
        scale: ``j``: ``sigma`` is ``0.8 * 2^j``, ``f`` is ``0.75 pi / 2^j``.
        angle: Radians.
        reach: It is ``2 * reach + 1`` pixels wide and high.

    Returns:
        Two float32 tensors.
    """
    import torch

    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    sigma, frequency = _SIGMA * 2**scale, _FREQUENCY / 2**scale
    envelope = torch.exp(-(u**2 + (_SLANT * v) ** 2) / (2 * sigma**2))
    envelope /= 2 * math.pi * sigma**2 / _SLANT
    wave = torch.cos(frequency * u)
    balance = (envelope * wave).sum() / envelope.sum()
    return (envelope * (wave - balance)).float(), (envelope * torch.sin(frequency * u)).float()


def _gaussian(sigma: float, reach: int) -> Tensor:
    import torch

    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-(line**2) / (2 * sigma**2))
    weights /= weights.sum()
    return torch.outer(weights, weights).float()[None, None]


def _bank(scale: int) -> Tensor:
    """All real parts, then all imaginary ones: ``[2 * angles, 1, side, side]``."""
    import torch

    pairs = [morlet(scale, math.pi * index / _ANGLES, _REACH[scale]) for index in range(_ANGLES)]
    return torch.stack([part for parts in zip(*pairs, strict=True) for part in parts])[:, None]


def _features() -> nn.Module:
    import torch
    from torch import nn
    from torch.nn import functional

    def filtered(images: Tensor, filters: Tensor, stride: int, groups: int = 1) -> Tensor:
        reach = filters.shape[-1] // 2
        # A mirror at the edge makes no edge; it cannot be longer than the image.
        mirrored = reach < min(images.shape[-2:])
        images = functional.pad(images, (reach,) * 4, mode="reflect" if mirrored else "replicate")
        return functional.conv2d(images, filters, stride=stride, groups=groups)

    def modulus(waves: Tensor) -> Tensor:
        real, imaginary = waves.chunk(2, dim=1)
        return torch.sqrt(real * real + imaginary * imaginary + _SMALLEST_ROOT)

    def smooth(maps: Tensor, kernel: Tensor, stride: int) -> Tensor:
        return filtered(maps, kernel.expand(maps.shape[1], -1, -1, -1), stride, groups=maps.shape[1])

    class Scattering(nn.Module):
        """``[n, channels, height, width]`` to ``[n, 81 * channels, ceil(height / 4), ceil(width / 4)]``."""

        wavelets0: Tensor
        wavelets1: Tensor
        gaussian: Tensor
        half_gaussian: Tensor

        def __init__(self) -> None:
            super().__init__()
            # They follow from the code, so that no checkpoint and no update carries them.
            self.register_buffer("wavelets0", _bank(0), persistent=False)
            self.register_buffer("wavelets1", _bank(1), persistent=False)
            self.register_buffer("gaussian", _gaussian(2 * _SIGMA, 5), persistent=False)
            self.register_buffer("half_gaussian", _gaussian(_SIGMA, 3), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            n, channels, height, width = images.shape
            planes = images.reshape(n * channels, 1, height, width)
            fine = modulus(filtered(planes, self.wavelets0, 1))
            coarse = modulus(filtered(planes, self.wavelets1, 2))
            halved = functional.avg_pool2d(fine, 2, ceil_mode=True)
            halves = halved.reshape(-1, 1, *halved.shape[-2:])
            twice = modulus(filtered(halves, self.wavelets0, 1)).reshape(-1, _ANGLES**2, *halved.shape[-2:])
            maps = torch.cat(
                [
                    smooth(planes, self.gaussian, STRIDE),
                    smooth(fine, self.gaussian, STRIDE),
                    smooth(coarse, self.half_gaussian, 2),
                    smooth(twice, self.half_gaussian, 2),
                ],
                dim=1,
            )
            return maps.reshape(n, channels * _MAPS, *maps.shape[-2:])

    return Scattering()
