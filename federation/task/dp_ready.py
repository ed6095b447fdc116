"""Make any model one that has a gradient of each single sample, as training with differential privacy needs.

Three things of everyday models stand in the way, and each is replaced by its nearest relative:

- **BatchNorm** makes what a sample becomes depend on the other samples of its batch. GroupNorm (Wu and He, "Group
  Normalization", 2018) normalises each sample by itself. The names ``weight`` and ``bias`` stay; running statistics, which would
  leave the device without any noise, are gone.
- **Activations that write over their input** destroy what the gradients of single samples are computed from. They now write a new
  tensor, with the same values.
- **In-place additions** (``out += identity`` in the residual blocks of torchvision) do the same. While the model is trained they
  are carried out as ``out = out + identity``.

Then the model is tried out on two random images, and whatever else mixes samples or hides a gradient is named.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from federation.errors import ConfigError
from federation.wire.messages import TaskSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_GROUPS = 32
"""Groups of a GroupNorm: the default of Wu and He 2018, section 4."""

LEAST_GROUP_CHANNELS = 4
"""Channels of a group. With one channel, a map of one pixel would be normalised to nothing but zeros."""

_INPLACE = "inplace"

_FAILURES = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
"""What layers raise."""

_IN_PLACE = (
    "writes over a tensor that gradients of single samples are computed from",
    "Let it write its result into a new tensor (no inplace=True, no method that ends in _)",
)
_MIXING = (
    "mixes the samples of a batch, so that no sample has a gradient of its own",
    "Use GroupNorm, LayerNorm or another layer that sees one sample at a time",
)
_HIDDEN = (
    "has weights that are used without calling it, so that their gradients of single samples cannot be had",
    "Choose a model of convolutions and linear layers, or call each layer that has weights",
)
_REMEMBERING = (
    "keeps statistics of the images in a buffer, which would leave the device without noise",
    "Switch that off (track_running_stats=False)",
)
"""A fault and its remedy."""


def make_dp_ready(model: nn.Module, task: TaskSpec) -> nn.Module:
    """Change a model so that it can be trained with differential privacy, or refuse it.

    The result depends on model and task alone. Names and order of the parameters stay.

    Args:
        model: Freshly built, on the CPU. It is changed; use what is returned.
        task: What the model was built for.

    Returns:
        The model, in training mode.

    Raises:
        ConfigError: If a layer mixes the samples of a batch, or has no gradients of single samples, for a reason that is not known
            here. It names the layer.
    """
    model = _replace_batch_norms(model)
    for module in model.modules():
        if getattr(module, _INPLACE, False):
            module.inplace = False  # type: ignore[assignment]  # no tensor: a switch of activations and dropouts
    model.__class__ = _out_of_place(type(model))
    _try_out(model.train(), task)
    return model


def group_count(channels: int) -> int:
    """The groups into which a GroupNorm divides ``channels``: the most that divide them, within both bounds; at least 1."""
    most = min(MOST_GROUPS, channels // LEAST_GROUP_CHANNELS)
    return next((groups for groups in range(most, 1, -1) if channels % groups == 0), 1)


def _replace_batch_norms(model: nn.Module) -> nn.Module:
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    def replacement(old: _BatchNorm) -> nn.GroupNorm:
        new = nn.GroupNorm(group_count(old.num_features), old.num_features, eps=old.eps, affine=old.affine)
        if old.affine:
            with torch.no_grad():  # some models begin with zeros on purpose
                new.weight.copy_(old.weight)
                new.bias.copy_(old.bias)
            new.weight.requires_grad_(old.weight.requires_grad)
            new.bias.requires_grad_(old.bias.requires_grad)
        return new

    if isinstance(model, _BatchNorm):
        return replacement(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, replacement(child))
    return model


def _out_of_place(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose ``forward`` writes nothing in place while it is trained."""

    def forward(self: nn.Module, images: torch.Tensor) -> Any:
        # What is exported or evaluated is the model as it was written.
        if not self.training:
            return kind.forward(self, images)
        with _writing_anew()():
            return kind.forward(self, images)

    # The name stays: layers are chosen by type nowhere above a whole model, and people read it.
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@lru_cache
def _writing_anew() -> Callable[[], Any]:
    import torch
    from torch.overrides import TorchFunctionMode

    tensor = torch.Tensor
    # ``out += identity`` arrives here as ``out.add_(identity)``, and its result is bound to ``out`` again: so a new tensor serves as
    # well. Not so for ``out.add_(identity)`` as a statement of its own: :func:`_try_out` compares what comes of it.
    anew = {
        tensor.add_: tensor.add,
        tensor.sub_: tensor.sub,
        tensor.mul_: tensor.mul,
        tensor.div_: tensor.div,
    }

    class WritingAnew(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            del types
            given = dict(kwargs or {})
            if given.get(_INPLACE):
                given[_INPLACE] = False
            if function in anew and args[0].requires_grad:  # counters and the like are really changed
                function = anew[function]
            return function(*args, **given)

    return WritingAnew


def _try_out(model: nn.Module, task: TaskSpec) -> None:
    """Train on two random images for one step without taking it, and look at what happens."""
    import torch

    images = torch.randn(2, task.channels, task.height, task.width, requires_grad=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _watched(model) as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer may have nothing but weights to give gradients to
        try:
            logits = model(images)
            torch.autograd.backward(logits[0].sum(), inputs=[images, *_trainable(model)], retain_graph=True)
        except _FAILURES as error:
            if "modified inplace" in str(error) or "modified by an inplace operation" in str(error):
                raise _refusal(task, watch.running, *_IN_PLACE) from error
            raise _refusal(
                task, watch.running, f"fails in training: {str(error)[:200]}", "mend the layer"
            ) from error
        assert images.grad is not None
        if bool(images.grad[1].any()):
            raise _refusal(task, watch.first_mixing(images), *_MIXING)
        hidden = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and name.rpartition(".")[0] not in watch.called
        ]
    model.zero_grad(set_to_none=True)
    if hidden:
        raise _refusal(task, hidden[0].rpartition(".")[0], *_HIDDEN)
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise _refusal(task, name.rpartition(".")[0], *_REMEMBERING)
    _compare(model, task, images.detach())


def _compare(model: nn.Module, task: TaskSpec, images: torch.Tensor) -> None:
    """See that the model computes what it did before its in-place writes were replaced."""
    import torch

    ready = type(model)
    outcomes = []
    for kind in (ready, ready.__bases__[0]):
        with torch.random.fork_rng(devices=[]):  # both drop out the same
            outcomes.append(kind.forward(model, images).detach())  # type: ignore[attr-defined]
    if not torch.equal(*outcomes):
        raise _refusal(task, "", *_IN_PLACE)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class _Watch:
    """What was seen of a model's layers.

    Attributes:
        called: Names of the layers that were called.
        running: The innermost layer that was begun and has not ended; empty for the model itself.
    """

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.running = ""
        self._outputs: list[tuple[str, torch.Tensor]] = []
        self._open: list[str] = []

    def begin(self, name: str) -> None:
        self.called.add(name)
        self._open.append(name)
        self.running = name

    def end(self, name: str, output: object) -> None:
        import torch

        self._open.pop()
        self.running = self._open[-1] if self._open else ""
        if isinstance(output, torch.Tensor) and output.requires_grad:
            self._outputs.append((name, output))

    def first_mixing(self, images: torch.Tensor) -> str:
        """The first layer whose output for the first image depends on the second."""
        import torch

        for name, output in self._outputs:
            (gradient,) = torch.autograd.grad(output[0].sum(), images, retain_graph=True, allow_unused=True)
            if gradient is not None and bool(gradient[1].any()):
                return name
        return ""


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    """Hook all layers, those that learn with backward hooks too: with them autograd forbids in-place writes, as in training."""
    watch, handles = _Watch(), []
    for name, module in model.named_modules():

        def before(_module: nn.Module, _inputs: object, name: str = name) -> None:
            watch.begin(name)

        def after(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            watch.end(name, output)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            handles.append(module.register_full_backward_hook(lambda *_: None))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _refusal(task: TaskSpec, layer: str, fault: str, remedy: str) -> ConfigError:
    where = f"the layer {layer!r}" if layer else "a layer"
    return ConfigError(
        f"model {task.model!r} cannot be trained with differential privacy: {where} {fault}. {remedy}, "
        "or turn privacy.sample off"
    )
