"""From a model's name to the model, and between models and named arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from federation.errors import ConfigError
from federation.task.dp_ready import make_dp_ready
from federation.task.names import did_you_mean, is_plugin, load_plugin
from federation.task.scattering import scattering
from federation.task.vision import import_torchvision
from federation.wire.messages import TaskSpec

if TYPE_CHECKING:
    from torch import nn

CNN = "cnn"
SCATTERING = "scattering"

_CNN_KERNEL = 5
_CNN_CHANNELS = (32, 64)
_CNN_HIDDEN = (120, 84)
_CNN_SMALLEST_UNPADDED = 16
"""Below this side two unpadded 5x5 convolutions with 2x2 pools leave nothing: such images are padded."""

_AUXILIARY_HEADS = {"googlenet", "inception_v3"}
"""In training these return a tuple of several heads, unless told not to."""

_MISFITS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
"""What models raise, when they are built or run, for an image size that they cannot take."""


def build(task: TaskSpec, *, seed: int = 0) -> nn.Module:
    """A freshly initialised model for ``task``, on the CPU, float32, in training mode.

    The weights depend on ``task`` and ``seed`` alone; the caller's random state is left as it was.

    Args:
        task: ``task.model`` is ``cnn``, ``scattering``, a torchvision classification model, or ``package.module:factory``,
            whose factory is called with ``task``.
        seed: Of the initial weights.

    Returns:
        A module that maps float32 ``[N, channels, height, width]`` to logits ``[N, len(labels)]``.

    Raises:
        ConfigError: If the name is unknown, a plug-in fails, or the model cannot take images of this size.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if task.model == CNN:
            model = _cnn(task)
        elif task.model == SCATTERING:
            model = scattering(task)
        elif is_plugin(task.model):
            model = _plugin(task)
        else:
            model = _torchvision(task)
        _probe(model, task)
        if task.dp_ready:
            model = make_dp_ready(model, task)
    return model.train()


def model_names() -> list[str]:
    """Every model name that :func:`build` knows without a plug-in."""
    torchvision = import_torchvision()
    return [CNN, SCATTERING, *torchvision.models.list_models(module=torchvision.models)]


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Copy what is federated out of a model: its floating-point parameters and buffers.

    Integer buffers (BatchNorm's ``num_batches_tracked``) stay on the device: they are counters, not weights.

    Returns:
        Name to float32 array, C-contiguous, in the order of the model's ``state_dict``.

    Raises:
        ConfigError: If a floating-point entry is not float32.
    """
    import torch

    return {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format).numpy()
        for name, tensor in float_tensors(model).items()
    }


def load_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into a model, on whichever device it is. Integer buffers keep their values.

    Args:
        model: Changed in place, and only if everything fits.
        arrays: Exactly the names and shapes of :func:`state_arrays`, float32.

    Raises:
        ConfigError: If a name is missing or unknown, or a shape or dtype differs.
    """
    import torch

    tensors = float_tensors(model)
    missing, extra = tensors.keys() - arrays.keys(), arrays.keys() - tensors.keys()
    if missing or extra:
        raise ConfigError(
            f"these weights belong to another model: missing {sorted(missing)[:5]}, unknown {sorted(extra)[:5]}"
        )
    for name, tensor in tensors.items():
        array = arrays[name]
        if array.shape != tuple(tensor.shape) or array.dtype != np.float32:
            raise ConfigError(
                f"tensor {name!r} is {array.dtype} {list(array.shape)}, the model wants "
                f"float32 {list(tensor.shape)}: these weights belong to another model"
            )
    for name, tensor in tensors.items():
        # torch warns about read-only memory (a mapped file) and refuses big-endian arrays: such are copied
        tensor.copy_(torch.from_numpy(np.require(arrays[name], np.float32, ["C", "W"])))


def float_tensors(model: nn.Module) -> dict[str, Any]:
    """The model's own floating-point tensors by name, detached but sharing memory, in ``state_dict`` order.

    Raises:
        ConfigError: If a floating-point (or complex) entry is not float32.
    """
    import torch

    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() or tensor.is_complex():
            if tensor.dtype != torch.float32:
                raise ConfigError(f"tensor {name!r} is {tensor.dtype}: only float32 models can be federated")
            tensors[name] = tensor
    return tensors


def _cnn(task: TaskSpec) -> nn.Module:
    """The convolutional network of McMahan et al. 2017's MNIST examples, with LeNet-5's dense layers.

    186,110 parameters at 1x28x28 and ten classes.
    """
    from torch import nn

    smallest = min(task.height, task.width)
    padding = _CNN_KERNEL // 2 if smallest < _CNN_SMALLEST_UNPADDED else 0
    height, width = task.height, task.width
    for _ in _CNN_CHANNELS:
        height = (height + 2 * padding - _CNN_KERNEL + 1) // 2
        width = (width + 2 * padding - _CNN_KERNEL + 1) // 2
    first, second = _CNN_CHANNELS
    wide, narrow = _CNN_HIDDEN
    # Pooling before the ReLU gives the same values as after it, on a quarter of the elements.
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(task.channels, first, _CNN_KERNEL, padding=padding),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, _CNN_KERNEL, padding=padding),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * height * width, wide),
            relu3=nn.ReLU(),
            fc2=nn.Linear(wide, narrow),
            relu4=nn.ReLU(),
            fc3=nn.Linear(narrow, len(task.labels)),
        )
    )


def _plugin(task: TaskSpec) -> nn.Module:
    from torch import nn

    factory = load_plugin(task.model)
    try:
        model = factory(task)
    except Exception as error:  # foreign code may raise anything
        raise ConfigError(f"the model factory {task.model!r} failed: {error!r}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model factory {task.model!r} returned {type(model).__name__}, not a torch.nn.Module"
        )
    return model


def _torchvision(task: TaskSpec) -> nn.Module:
    torchvision = import_torchvision()
    name = task.model
    known = model_names()
    if name not in known:
        raise ConfigError(
            f"unknown model {name!r}{did_you_mean(name, known)} Known are cnn, scattering, torchvision's classification "
            "models by name, and package.module:factory"
        )
    options: dict[str, Any] = {"weights": None, "num_classes": len(task.labels)}
    if name in _AUXILIARY_HEADS:
        options |= {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options["image_size"] = task.height
    elif name.startswith("maxvit_"):
        options["input_size"] = (task.height, task.width)
    try:
        model: nn.Module = torchvision.models.get_model(name, **options)
    except _MISFITS as error:
        raise _misfit(task, error) from error
    _adapt_first_convolution(model, task.channels)
    return model


def _adapt_first_convolution(model: nn.Module, channels: int) -> None:
    from torch import nn

    name, old = next(
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    )
    if old.in_channels == channels:
        return
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]  # declared as tuple[int, ...], always a pair here
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _probe(model: nn.Module, task: TaskSpec) -> None:
    """Run one blank image through, so that a misfit is told now and not by a device in its first round."""
    import torch

    model.eval()
    image = torch.zeros(1, task.channels, task.height, task.width)
    try:
        with torch.inference_mode():
            logits = model(image)
    except _MISFITS as error:
        raise _misfit(task, error) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, len(task.labels)):
        raise ConfigError(
            f"model {task.model!r} gives {shape} for one image, not logits of shape (1, {len(task.labels)}): "
            "one number for each label"
        )


def _misfit(task: TaskSpec, error: Exception) -> ConfigError:
    detail = str(error).strip().partition("\n")[0][:200]
    return ConfigError(
        f"model {task.model!r} cannot take images of {task.channels}x{task.height}x{task.width} "
        f"(channels x height x width): {detail}. Choose a larger image size or another model, such as cnn"
    )
