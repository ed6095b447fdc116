"""Gradients of single samples of convolutions and linear layers, and their norms without the gradients.

Both layers multiply: with the rows ``a_t`` that go in at position ``t`` and the gradients ``b_t`` of what comes out, the gradient of a
sample's loss in the weights is ``sum_t b_t a_t'``. Its squared norm can be had in two ways, of which the cheaper is taken::

    |sum_t b_t a_t'|^2                                the gradient itself, p d numbers
    sum_(s,t) (a_s' a_t) (b_s' b_t)                    ghost norm, T^2 numbers

(Goodfellow, "Efficient Per-Example Gradient Computations", 2015, for T = 1; Bu, Mao and Xu, "Scalable and Efficient Training of Large
Convolutional Neural Networks with Differential Privacy", NeurIPS 2022, for convolutions.) Opacus 1.6 has no norms for
convolutions, computes the gradients of grouped ones for all pairs of groups, disregards ``padding_mode``, and knows no norm of a linear layer on
images of four dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

ByWeight = dict["Tensor", "Tensor"]
"""For each weight of a layer that learns, a tensor."""


def linear_norms(layer: nn.Linear, inputs: list[Tensor], gradients: Tensor) -> ByWeight:
    """ByWeight of a linear layer's gradients.

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
    return _norms(layer, a, b, n)


def convolution_norms(layer: nn.Conv2d, inputs: list[Tensor], gradients: Tensor) -> ByWeight:
    """ByWeight of a convolution's gradients.

    Args:
        layer: The layer.
        inputs: One tensor, ``[n, channels, height, width]``.
        gradients: Of what comes out.

    Returns:
        As :func:`linear_norms`.
    """
    a, b = _operands(layer, inputs[0], gradients)
    return _norms(layer, a, b, len(gradients))


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


def _norms(layer: nn.Conv2d | nn.Linear, a: Tensor, b: Tensor, n: int) -> ByWeight:
    """From the operands ``[n * groups, T, p]`` and ``[n * groups, T, d]``."""
    import torch

    found: ByWeight = {}
    if layer.weight.requires_grad:
        positions, wide, deep = a.shape[1], a.shape[2], b.shape[2]
        if positions * (wide + deep) < wide * deep:
            squared = torch.bmm(a, a.transpose(1, 2)).mul_(torch.bmm(b, b.transpose(1, 2))).sum(dim=(1, 2))
            norms = squared.clamp(min=0).sqrt()  # rounding may bring it below
        else:
            norms = torch.linalg.vector_norm(torch.bmm(b.transpose(1, 2), a), dim=(1, 2))
        found[layer.weight] = norms.reshape(n, -1).norm(dim=1)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = b.sum(dim=1).reshape(n, -1).norm(dim=1)
    return found


def _operands(layer: nn.Conv2d, images: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution as a product: windows ``[n * groups, T, height * width * channels]``, gradients ``[n * groups, T, d]``."""
    from torch.nn import functional

    padding = layer._reversed_padding_repeated_twice  # noqa: SLF001 - what its own forward pads with; "same" is resolved
    if any(padding):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        images = functional.pad(images, padding, mode=mode)
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
