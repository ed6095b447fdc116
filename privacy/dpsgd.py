"""Training with differential privacy for each sample: DP-SGD. The only module that knows Opacus.

**Algorithm** (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, Algorithm 1), for each of ``steps`` steps::

    B  = each of the n samples with probability q, independently of all others       (Poisson sampling)
    g  = 1 / (q n) * (sum over i in B of g_i * min(1, C / |g_i|)  +  N(0, (sigma C)^2 I))

where ``g_i`` is the gradient of sample ``i``'s loss in all weights together. ``g`` goes to an ordinary optimizer: whatever that makes
of it (momentum, Adam) is post-processing. The divisor is the *expected* size of a batch; the size that was drawn is secret. An
empty batch is a step of noise alone.

**Neighbours** are data sets that differ by one sample, added or removed: the sensitivity of the sum is ``C``.

**Randomness** comes from the operating system, for the batches and for the noise: no seed repeats it (:mod:`privacy.gaussian`).

**Clipping** is done in physical batches, whose size bounds the memory and changes nothing else. In ``ghost`` mode (Li et al., "Large
Language Models Can Be Strong Differentially Private Learners", ICLR 2022) only the norms of the ``g_i`` are computed, layer by layer, and
the clipped sum follows from what the backward pass brought to each layer (:mod:`privacy.per_sample`). Where a layer is called more than once in a pass, ``|g_i|`` is not a
sum over calls, and the ``g_i`` themselves are kept (``hooks``).
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from privacy import gaussian
from privacy.budget import PrivateRound
from privacy.clipping import Clipper, GhostClipper, HooksClipper, Mode, Sums, forget, survey, trainable
from privacy.errors import TermsError
from privacy.lean_opacus import import_opacus

if TYPE_CHECKING:
    from torch import Tensor, nn

PHYSICAL_BATCH = 32
"""Samples that are clipped at a time, where memory suffices. 64 saved no time with the seed CNN and took 17 MB more."""

_MOST = 256
"""The same for models so small that their gradients of single samples fit into _SMALL_BYTES: ``scattering`` takes a third less time."""

_SMALL_BYTES = 16 * 2**20

_FILL = 16
"""Sizes of physical batches are multiples of it."""

_MEMORY_SHARE = 4
"""One part in so many of the memory that is free may go to the gradients of single samples."""

_WORD_BITS = 64


class Optimizer(Protocol):
    """Takes the gradients to the weights."""

    def step(self) -> None:
        """Update the weights from their gradients."""
        ...


Batch = Callable[[NDArray[np.int64]], "tuple[Tensor, Tensor]"]


def train(
    model: nn.Module,
    optimizer: Optimizer,
    private: PrivateRound,
    *,
    samples: int,
    batch: Batch,
    before_batch: Callable[[], None] = lambda: None,
    physical_batch: int = PHYSICAL_BATCH,
) -> Mode:
    """Train a classifier for one round.

    Whatever happens, no hook and no gradient is left on the model.

    Args:
        model: In training mode, without BatchNorm and the like; changed in place.
        optimizer: Over the model's weights.
        private: What was paid for; carried out to the letter.
        samples: In the data, n.
        batch: Gives images and labels (int64) of some rows in 0 … n - 1, on the model's device.
        before_batch: Called before each physical batch and each step; may raise to stop.
        physical_batch: Most samples to be clipped at a time.

    Returns:
        How gradients were clipped.

    Raises:
        TermsError: If the model cannot be trained so, or ``private`` is out of range.
        ModuleNotFoundError: If Opacus is not installed.
    """
    _check_round(private, samples)
    check_model(model)
    parameters = trainable(model)
    std = private.noise_multiplier * private.clip_norm
    expected = private.sample_rate * samples
    sums: Sums = {parameter: _zeros(parameter) for parameter in parameters}
    example = batch(np.zeros(1, np.int64))[0]
    try:
        with clipping(model, private.clip_norm, example) as clipper:
            for _ in range(private.steps):
                before_batch()
                rows = poisson_rows(samples, private.sample_rate)
                for start in range(0, len(rows), physical_batch):
                    before_batch()
                    part = rows[start : start + physical_batch]
                    clipper.add(*batch(_filled_up(part, min(_FILL, physical_batch))), sums, len(part))
                for parameter in parameters:
                    _add_noise(sums[parameter], std)
                    parameter.grad = sums[parameter].div_(expected)
                optimizer.step()
                for total in sums.values():
                    total.zero_()
            return clipper.mode
    finally:
        model.zero_grad(set_to_none=True)


def poisson_rows(samples: int, rate: float) -> NDArray[np.int64]:
    """Each of ``samples`` rows with probability ``rate`` (to 2^-64), independently, in ascending order.

    The order tells nothing: a clipped sum has none.
    """
    words = np.frombuffer(os.urandom(samples * _WORD_BITS // 8), dtype=np.uint64)
    if rate >= 1:
        return np.arange(samples)
    return np.flatnonzero(words < np.uint64(int(rate * 2**_WORD_BITS)))


def _filled_up(rows: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Repeat the first row until there is a multiple of rows.

    PyTorch compiles and keeps a kernel for each size that it meets: with all sizes that chance makes, the seed CNN takes 100 MB
    and half the time more.
    """
    return np.pad(rows, (0, -len(rows) % multiple), constant_values=rows[0])


def largest_physical_batch(model: nn.Module, memory_bytes: int) -> int:
    """How many samples may be clipped at a time: at least 1, and :data:`PHYSICAL_BATCH` where memory suffices; more if they are small.

    Counted are the gradients of single samples that are in memory at once: those of the largest layer.

    Args:
        model: To be trained.
        memory_bytes: That is free.
    """
    largest = max(
        sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False))
        for module in model.modules()
    )
    wanted = min(_MOST, max(PHYSICAL_BATCH, _SMALL_BYTES // max(largest, 1)))
    fitting = max(1, min(wanted, memory_bytes // _MEMORY_SHARE // max(largest, 1)))
    return fitting - fitting % _FILL if fitting > _FILL else fitting  # what does not need filling up


def check_model(model: nn.Module) -> None:
    """Have Opacus validate a model.

    Raises:
        TermsError: If a layer has no gradients of single samples, or the model has no weights to train. It names the layer.
        ModuleNotFoundError: If Opacus is not installed.
    """
    from torch import nn

    _, validator = _opacus()
    if not trainable(model):
        raise TermsError("the model has no weights to train")
    for name, module in model.named_modules():
        learns = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        faults = (
            validator.VALIDATORS[type(module)](module)
            if learns and type(module) in validator.VALIDATORS
            else []
        )
        if faults:
            reason = str(faults[0]).partition(". ")[0]
            raise TermsError(
                f"the layer {name!r} ({type(module).__name__}) cannot be trained with differential privacy: {reason}. "
                "Build the model with task.dp_ready, or choose another"
            )
        if isinstance(module, nn.Conv1d | nn.Conv3d) and module.padding_mode != "zeros":
            raise TermsError(
                f"the layer {name!r} ({type(module).__name__}) pads with {module.padding_mode!r}, of which Opacus computes wrong "
                "gradients: use padding_mode='zeros'"
            )


def try_out(model: nn.Module, images: Tensor) -> Mode:
    """Clip the gradients of some images and forget them: what :func:`train` would trip over, this trips over.

    Args:
        model: As for :func:`train`; its weights are not changed.
        images: Any; their classes do not matter.

    Raises:
        TermsError: If the model cannot be trained so.
        ModuleNotFoundError: If Opacus is not installed.
    """
    import torch

    check_model(model)
    sums: Sums = {parameter: _zeros(parameter) for parameter in trainable(model)}
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    try:
        with torch.random.fork_rng(devices=[]), clipping(model, 1.0, images) as clipper:
            clipper.add(images, labels, sums, len(images))
            return clipper.mode
    except (
        NotImplementedError,
        RuntimeError,
    ) as error:  # what Opacus and torch.func raise for layers that they do not know
        raise TermsError(f"gradients of single samples cannot be had: {str(error)[:300]}") from error


@contextmanager
def clipping(model: nn.Module, clip_norm: float, example: Tensor) -> Iterator[Clipper]:
    """Hook a model for clipping, in the mode that it supports, and unhook it at the end.

    Args:
        model: As for :func:`train`.
        clip_norm: L2 norm to which the gradient of each sample is clipped.
        example: One image or more; only the shape counts.

    Raises:
        TermsError: If Opacus does not know a layer.
    """
    calls = survey(model, example)
    samplers, _ = _opacus()
    try:
        if calls.repeated:
            hooks = samplers.hooks(model, loss_reduction="sum")
            clipper: Clipper = HooksClipper(model, clip_norm)
        else:
            hooks = samplers.ghost(model, loss_reduction="sum", max_grad_norm=clip_norm)
            clipper = GhostClipper(model, hooks, clip_norm, calls.first, samplers.summed)
    except NotImplementedError as error:  # a layer that learns and has buffers
        raise TermsError(f"gradients of single samples cannot be had: {str(error)[:300]}") from error
    try:
        with warnings.catch_warnings():
            # The images want no gradient, and need none.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            yield clipper
    finally:
        hooks.cleanup()
        forget(model)


def _add_noise(total: Tensor, std: float) -> None:
    """Add noise of standard deviation ``std`` in place."""
    # The numbers as they lie in memory, whatever the order of dimensions: the noise is the same for all.
    flat = total.as_strided((total.numel(),), (1,))
    values = flat.cpu().numpy()  # on the CPU the same memory
    gaussian.add(values, std)
    if flat.device.type != "cpu":
        import torch

        flat.copy_(torch.from_numpy(values))


def _zeros(parameter: nn.Parameter) -> Tensor:
    """A tensor for a sum, laid out as the weight: PyTorch's fused optimizers go by memory."""
    import torch

    total = torch.zeros_like(parameter, requires_grad=False)
    assert total.stride() == parameter.stride(), "weights have no gaps"
    return total


def _check_round(private: PrivateRound, samples: int) -> None:
    for name, value, fits in (
        ("samples", samples, samples >= 1),
        ("noise_multiplier", private.noise_multiplier, 0 < private.noise_multiplier < math.inf),
        ("clip_norm", private.clip_norm, 0 < private.clip_norm < math.inf),
        ("sample_rate", private.sample_rate, 0 < private.sample_rate <= 1),
        ("steps", private.steps, private.steps >= 1),
    ):
        if not fits:
            raise TermsError(f"a private round with {name} = {value} cannot be carried out")


@dataclass(frozen=True, slots=True)
class _Samplers:
    ghost: Any
    hooks: Any
    summed: frozenset[type]


@lru_cache
def _opacus() -> tuple[_Samplers, Any]:
    """Opacus' hooks with our ways for convolutions and linear layers, and its validator."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    try:
        grad_sample, validators = import_opacus("opacus.grad_sample"), import_opacus("opacus.validators")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"training with differential privacy needs Opacus, which cannot be imported: {error}. Install it with: "
            "pip install 'fedge[train]'",
            name="opacus",
        ) from error
    finally:
        root.handlers[:] = handlers  # Opacus configures the logging of whoever imports it
    from torch import nn

    from privacy import per_sample

    own = {nn.Conv2d: per_sample.convolution_norms, nn.Linear: per_sample.linear_norms} | {
        kind: per_sample.small_norms(grad_sample.GradSampleHooks.GRAD_SAMPLERS[kind])
        for kind in (nn.GroupNorm, nn.LayerNorm)
    }

    ghost = type(
        "Ghost",
        (grad_sample.GradSampleHooksFastGradientClipping,),
        {"NORM_SAMPLERS": {**grad_sample.GradSampleHooksFastGradientClipping.NORM_SAMPLERS, **own}},
    )
    hooks = type(
        "Hooks",
        (grad_sample.GradSampleHooks,),
        {
            "GRAD_SAMPLERS": {
                **grad_sample.GradSampleHooks.GRAD_SAMPLERS,
                nn.Conv2d: per_sample.convolution_gradients,
            }
        },
    )
    return _Samplers(ghost, hooks, frozenset(own)), validators.ModuleValidator
