"""Clipping the gradients of single samples while they are summed, with Opacus' hooks on the model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from privacy.errors import TermsError
from privacy.per_sample import take_sums

if TYPE_CHECKING:
    from torch import Tensor, nn

_OPACUS_LEFTOVERS = ("activations", "max_batch_len")
"""Attributes that Opacus' hooks leave on layers when a pass is broken off."""

_NORMS = "_norm_sample"
"""Where Opacus' hooks put the norms, ``[n]``, on each weight."""


Sums = dict["Tensor", "Tensor"]


class Mode(StrEnum):
    """How gradients of single samples are clipped."""

    GHOST = "ghost"
    HOOKS = "hooks"


class Clipper(Protocol):
    """Clips gradients of single samples and sums them.

    Attributes:
        mode: How.
    """

    mode: Mode

    def add(self, images: Tensor, labels: Tensor, sums: Sums, count: int) -> None:
        """Add the clipped gradients of the first ``count`` samples to ``sums``; others only fill up the batch.

        A sample whose gradient is not finite adds nothing: whether there is one stays as secret as any other sample.
        """
        ...


@dataclass(frozen=True, slots=True)
class Calls:
    """How a pass goes through a model.

    Attributes:
        first: The smallest weight of the layer that is called first.
        repeated: Whether a weight is used in more than one call.
    """

    first: nn.Parameter
    repeated: bool


def survey(model: nn.Module, example: Tensor) -> Calls:
    """Send blank images through a model and see which layers with weights it calls.

    Args:
        model: In training mode.
        example: Images; only their shape counts.

    Raises:
        TermsError: If there are none.
    """
    import torch

    used: list[nn.Parameter] = []

    def note(module: nn.Module, _inputs: object) -> None:
        used.extend(sorted(_own(module), key=lambda parameter: parameter.numel()))

    handles = [module.register_forward_pre_hook(note) for module in model.modules() if _own(module)]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model(torch.zeros_like(example))
    finally:
        for handle in handles:
            handle.remove()
    if not used:
        raise TermsError("the model calls no layer that has weights to train")
    return Calls(used[0], len(set(used)) < len(used))


class GhostClipper:
    """Computes only the norms of the gradients of single samples, and then their weighted sum.

    Args:
        model: Hooked.
        hooks: Opacus', which leave the norms of each weight's gradients at the weight.
        clip_norm: L2 norm to which the gradient of each sample is clipped.
        first: The smallest weight of the layer that is called first.
        summed: Kinds of layers that leave a function for their weighted sum (:func:`privacy.per_sample.take_sums`). Are there
            others, the sum takes a second backward pass, with weighted losses.
    """

    mode = Mode.GHOST

    def __init__(
        self, model: nn.Module, hooks: Any, clip_norm: float, first: nn.Parameter, summed: frozenset[type]
    ) -> None:
        self._model, self._hooks, self._clip_norm = model, hooks, clip_norm
        self._parameters = trainable(model)
        # Norms need the gradients of what each layer puts out, but of no weight. Asking for one weight of the first
        # layer alone leads the backward pass through all layers and spares it the gradients of the others' weights.
        self._asked = [first]
        self._twice = any(_own(module) and type(module) not in summed for module in model.modules())

    def add(self, images: Tensor, labels: Tensor, sums: Sums, count: int) -> None:
        """See :class:`Clipper`."""
        import torch

        losses = _losses(self._model, images, labels)
        gradients = torch.autograd.grad(
            losses.sum(), self._asked, retain_graph=self._twice, allow_unused=True
        )
        norms = {p: getattr(p, _NORMS) for p in self._parameters if hasattr(p, _NORMS)}
        if len(norms) < len(self._parameters):
            if self._asked != self._parameters:
                self._asked = self._parameters  # not all layers lie behind the first
                self.add(images, labels, sums, count)
                return
            _require_counted(self._model, set(norms), gradients)
        factors = _factors(list(norms.values()), self._clip_norm)
        finite = (factors > 0).nonzero().flatten()
        if len(finite) < len(images):  # the loss of such a sample would make the whole sum NaN
            count = int((finite < count).sum())
            if count:
                self.add(images[finite], labels[finite], sums, count)
            return
        factors[count:] = 0.0
        layers = take_sums(self._model)
        if self._twice:
            layers.clear()
            self._sum_again(losses, factors, sums, set(norms))
        while layers:  # what a layer holds is let go with it
            for parameter, gradient in layers.pop()(factors).items():
                sums[parameter] += gradient

    def _sum_again(self, losses: Tensor, factors: Tensor, sums: Sums, counted: set[nn.Parameter]) -> None:
        import torch

        self._hooks.disable_hooks()
        try:
            gradients = torch.autograd.grad(factors @ losses, self._parameters, allow_unused=True)
        finally:
            self._hooks.enable_hooks()
        _require_counted(self._model, counted, gradients)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                sums[parameter] += gradient


class HooksClipper:
    """Keeps the gradients of single samples, for models that call a layer more than once.

    Args:
        model: Hooked.
        clip_norm: L2 norm to which the gradient of each sample is clipped.
    """

    mode = Mode.HOOKS

    def __init__(self, model: nn.Module, clip_norm: float) -> None:
        self._model, self._clip_norm = model, clip_norm
        self._parameters = trainable(model)

    def add(self, images: Tensor, labels: Tensor, sums: Sums, count: int) -> None:
        """See :class:`Clipper`."""
        import torch

        losses = _losses(self._model, images, labels)
        gradients = torch.autograd.grad(losses.sum(), self._parameters, allow_unused=True)
        single = {
            parameter: parameter.grad_sample.flatten(1)  # type: ignore[attr-defined]  # where Opacus puts it
            for parameter in self._parameters
            if getattr(parameter, "grad_sample", None) is not None
        }
        _require_counted(self._model, set(single), gradients)
        factors = _factors([each.norm(dim=1) for each in single.values()], self._clip_norm)
        factors[count:] = 0.0
        for parameter, each in single.items():
            sums[parameter] += (factors @ each.nan_to_num(0.0, 0.0, 0.0)).view_as(parameter)


def _losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    import torch

    forget(model)
    return torch.nn.functional.cross_entropy(model(images), labels, reduction="none")


def _factors(norms: list[Tensor], clip_norm: float) -> Tensor:
    """``min(1, C / |g_i|)`` from the norms in each weight, ``[n]`` each; 0 where ``|g_i|`` is not finite."""
    import torch

    total = torch.stack(norms).norm(dim=0)
    factors: Tensor = clip_norm / total.clamp(min=clip_norm)
    return factors.masked_fill(~total.isfinite(), 0.0)


def _require_counted(
    model: nn.Module, counted: set[nn.Parameter], gradients: tuple[Tensor | None, ...]
) -> None:
    """Refuse to sum a gradient whose norm was not counted.

    Raises:
        TermsError: It names the weight.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for (name, parameter), gradient in zip(named, gradients, strict=True):
        if gradient is not None and parameter not in counted:
            raise TermsError(
                f"the gradients of single samples of {name!r} cannot be had: its layer is used without being called. Choose "
                "another model, or turn privacy.sample off"
            )


def forget(model: nn.Module) -> None:
    """Drop what an earlier pass, perhaps one that was broken off, left on layers and weights."""
    take_sums(model)
    for module in model.modules():
        for name in _OPACUS_LEFTOVERS:
            if hasattr(module, name):
                delattr(module, name)
    for parameter in model.parameters():
        for name in (_NORMS, "_current_grad_sample"):
            if hasattr(parameter, name):
                delattr(parameter, name)
        if hasattr(parameter, "_forward_counter"):
            parameter._forward_counter = 0  # noqa: SLF001 - where Opacus counts
            parameter.grad_sample = None  # type: ignore[attr-defined]


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The weights that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
