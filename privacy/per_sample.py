"""Gradients of single samples: their norms layer by layer, and their weighted sums.

Both layers multiply: with the rows ``a_t`` that go in at position ``t`` and the gradients ``b_t`` of what comes out, the gradient of a
sample's loss in the weights is ``sum_t b_t a_t'``. Its squared norm can be had in two ways, of which the cheaper is taken::

    |sum_t b_t a_t'|^2                                the gradient itself, p d numbers
    sum_(s,t) (a_s' a_t) (b_s' b_t)                    ghost norm, T^2 numbers

(Goodfellow, "Efficient Per-Example Gradient Computations", 2015, for T = 1; Bu, Mao and Xu, "Scalable and Efficient Training of Large
Convolutional Neural Networks with Differential Privacy", NeurIPS 2022, for convolutions.)

The sum of the clipped gradients follows from the same ``a`` and ``b``: ``sum_i c_i sum_t b_t a_t'`` is what the layer's ordinary backward pass makes of
``c_i b_t``. So no second pass through the model is needed (Bu, Wang, Zha and Karypis, "Differentially Private Optimization on Large Model at Small
Cost", ICML 2023, "book-keeping"). The norm functions leave at each layer a function that computes it, see :func:`take_sums`.

Opacus 1.6 has no norms for
convolutions, computes the gradients of grouped ones for all pairs of groups, disregards ``padding_mode``, and knows no norm of a linear layer on
images of four dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

ByWeight = dict["Tensor", "Tensor"]
"""For each weight of a layer that learns, a tensor."""


_SUMS = "_weighted_sums"

_SLICE = 2**18
"""Numbers (1 MiB) that the norms of convolutions keep at a time: in a processor's cache, and not mapped anew by the system each time."""

WeightedSums = Callable[["Tensor"], ByWeight]
"""From a factor for each sample, ``[n]``, to the sums of a layer's gradients."""


def take_sums(model: nn.Module) -> list[WeightedSums]:
    """What the norm functions have left at a model's layers, which is no longer there afterwards."""
    return [vars(module).pop(_SUMS) for module in model.modules() if _SUMS in vars(module)]


def linear_norms(layer: nn.Linear, inputs: list[Tensor], gradients: Tensor) -> ByWeight:
    """Norms of a linear layer's gradients.

    Args:
        layer: The layer.
        inputs: One tensor, ``[n, ..., p]``.
        gradients: Of what comes out, ``[n, ..., d]``.

    Returns:
        For each weight that learns, a norm for each sample: ``[n]``.
    """
    (rows,) = inputs
    n = len(rows)
    a, b = rows.reshape(n, -1, rows.shape[-1]), gradients.reshape(n, -1, gradients.shape[-1])
    vars(layer)[_SUMS] = partial(_linear_sums, layer, a, b)
    found: ByWeight = {}
    if layer.weight.requires_grad:
        found[layer.weight] = _norms(a, b, n)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = b.sum(dim=1).norm(dim=1)
    return found


def convolution_norms(layer: nn.Conv2d, inputs: list[Tensor], gradients: Tensor) -> ByWeight:
    """Norms of a convolution's gradients.

    Args:
        layer: The layer.
        inputs: One tensor, ``[n, channels, height, width]``.
        gradients: Of what comes out.

    Returns:
        As :func:`linear_norms`.
    """
    import torch

    (images,) = inputs
    vars(layer)[_SUMS] = partial(_convolution_sums, layer, images, gradients)
    found: ByWeight = {}
    if layer.weight.requires_grad:
        positions = gradients.shape[2] * gradients.shape[3]
        numbers = positions * layer.weight[0].numel() * layer.groups + layer.weight.numel()
        slices = (torch.split(each, max(1, _SLICE // numbers)) for each in (images, gradients))
        norms = [_norms(*_operands(layer, *parts), len(parts[0])) for parts in zip(*slices, strict=True)]
        found[layer.weight] = torch.cat(norms)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = gradients.sum(dim=(2, 3)).norm(dim=1)
    return found


def small_norms(
    sampler: Callable[[nn.Module, list[Tensor], Tensor], ByWeight],
) -> Callable[[nn.Module, list[Tensor], Tensor], ByWeight]:
    """Norms for a layer with so few weights that the gradients of single samples may be kept, such as GroupNorm.

    Args:
        sampler: Opacus' function for these gradients.
    """

    def norms(layer: nn.Module, inputs: list[Tensor], gradients: Tensor) -> ByWeight:
        single = {weight: each.flatten(1) for weight, each in sampler(layer, inputs, gradients).items()}
        vars(layer)[_SUMS] = lambda factors: {
            weight: (factors @ each).view_as(weight) for weight, each in single.items()
        }
        return {weight: each.norm(dim=1) for weight, each in single.items()}

    return norms


def convolution_gradients(layer: nn.Conv2d, inputs: list[Tensor], gradients: Tensor) -> ByWeight:
    """Gradients of single samples in a convolution's weights.

    Args:
        layer: The layer.
        inputs: One tensor, ``[n, channels, height, width]``.
        gradients: Of what comes out.

    Returns:
        For each weight that learns, ``[n, *weight.shape]``.
    """
    import torch

    n = len(gradients)
    found: ByWeight = {}
    if layer.weight.requires_grad:
        a, b = _operands(layer, inputs[0], gradients)
        out, channels, height, width = layer.weight.shape
        product = torch.bmm(b.transpose(1, 2), a).reshape(n, out, height, width, channels)
        found[layer.weight] = product.permute(0, 1, 4, 2, 3)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = gradients.sum(dim=(2, 3))
    return found


def _linear_sums(layer: nn.Linear, a: Tensor, b: Tensor, factors: Tensor) -> ByWeight:
    weighted = (b * factors[:, None, None]).flatten(0, 1)
    found: ByWeight = {}
    if layer.weight.requires_grad:
        found[layer.weight] = weighted.T @ a.flatten(0, 1)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = weighted.sum(dim=0)
    return found


def _convolution_sums(layer: nn.Conv2d, images: Tensor, gradients: Tensor, factors: Tensor) -> ByWeight:
    import torch

    weighted = gradients * factors[:, None, None, None]
    padding: tuple[int, ...] | str = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        images, padding = _padded(layer, images), (0, 0)
    found: ByWeight = {}
    if layer.weight.requires_grad:
        _, found[layer.weight], _ = torch.ops.aten.convolution_backward(
            weighted,
            images,
            layer.weight.detach(),
            None,
            layer.stride,
            padding,
            layer.dilation,
            False,
            (0, 0),
            layer.groups,
            (False, True, False),
        )
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = weighted.sum(dim=(0, 2, 3))
    return found


def _norms(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Norms ``[n]`` from the operands ``[n * groups, T, p]`` and ``[n * groups, T, d]``."""
    import torch

    positions, wide, deep = a.shape[1], a.shape[2], b.shape[2]
    if positions * (wide + deep) < wide * deep:
        squared = torch.bmm(a, a.transpose(1, 2)).mul_(torch.bmm(b, b.transpose(1, 2))).sum(dim=(1, 2))
        norms = squared.clamp(min=0).sqrt()  # rounding may bring it below
    else:
        norms = torch.linalg.vector_norm(torch.bmm(b.transpose(1, 2), a), dim=(1, 2))
    total: Tensor = torch.linalg.vector_norm(norms.reshape(n, -1), dim=1)
    return total


def _operands(layer: nn.Conv2d, images: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution as a product: windows ``[n * groups, T, height * width * channels]``, gradients ``[n * groups, T, d]``."""
    images = _padded(layer, images)
    pixels = images.permute(0, 2, 3, 1).contiguous()  # windows are cut in runs of all channels
    n, _, _, channels = pixels.shape
    down, right = gradients.shape[2:]
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    image, row, column, one = pixels.stride()
    windows = pixels.as_strided(
        (n, down, right, *kernel, channels),
        (image, row * stride[0], column * stride[1], row * dilation[0], column * dilation[1], one),
    )
    positions, groups = down * right, layer.groups
    each = channels // groups
    if groups == 1:
        a = windows.reshape(n, positions, -1)
        b = gradients.permute(0, 2, 3, 1).reshape(n, positions, -1)
        return a, b
    a = (
        windows.reshape(n, positions, -1, groups, each)
        .permute(0, 3, 1, 2, 4)
        .reshape(n * groups, positions, -1)
    )
    b = gradients.permute(0, 2, 3, 1).reshape(n, positions, groups, -1).permute(0, 2, 1, 3)
    return a, b.reshape(n * groups, positions, -1)


def _padded(layer: nn.Conv2d, images: Tensor) -> Tensor:
    from torch.nn import functional

    padding = layer._reversed_padding_repeated_twice  # noqa: SLF001 - what its own forward pads with; "same" is resolved
    if not any(padding):
        return images
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(images, padding, mode=mode)
