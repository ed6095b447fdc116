from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from federation.errors import ConfigError
from federation.task import models
from federation.wire.messages import TaskSpec

NewTask = Callable[..., TaskSpec]


class _Tuple(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images


def tiny(task: TaskSpec) -> nn.Module:
    pixels = task.channels * task.height * task.width
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, len(task.labels)))


def double(task: TaskSpec) -> nn.Module:
    return tiny(task).double()


def pair(_task: TaskSpec) -> nn.Module:
    return _Tuple()


def no_module(_task: TaskSpec) -> str:
    return "a model"


def broken(_task: TaskSpec) -> nn.Module:
    raise KeyError("weights")


def plugin(factory: Callable[..., object]) -> str:
    return f"{__name__}:{factory.__name__}"


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_cnn_is_the_classic_network(new_task: NewTask) -> None:
    model = models.build(new_task())

    assert parameters(model) == 186_110
    assert model.training
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_pooling_before_relu_changes_nothing(new_task: NewTask) -> None:
    model = models.build(new_task(), seed=3)
    classic = nn.Sequential(
        *(getattr(model, name) for name in ("conv1", "relu1", "pool1", "conv2", "relu2", "pool2")),
        *(getattr(model, name) for name in ("flatten", "fc1", "relu3", "fc2", "relu4", "fc3")),
    )
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))

    assert torch.equal(model(images), classic(images))


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (15, 40), (16, 16), (17, 33), (64, 48)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_cnn_takes_any_size_and_channel_count(
    new_task: NewTask, size: tuple[int, int], channels: int
) -> None:
    model = models.build(new_task(size=size, channels=channels, labels=("a", "b", "c")))

    assert model(torch.zeros(1, channels, *size)).shape == (1, 3)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "resnet50"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_take_the_tasks_channels_and_classes(
    new_task: NewTask, name: str, channels: int
) -> None:
    model = models.build(new_task(name, channels=channels, size=(32, 32), labels=("a", "b", "c", "d", "e")))

    assert model.training
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 5)


def test_googlenet_gives_one_head_in_training(new_task: NewTask) -> None:
    model = models.build(new_task("googlenet", size=(64, 64)))

    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 10)


def test_a_vision_transformer_takes_the_tasks_image_size(new_task: NewTask) -> None:
    assert models.build(new_task("vit_b_32", channels=3, size=(64, 64)))(torch.zeros(1, 3, 64, 64)).shape == (
        1,
        10,
    )


def test_weights_depend_on_the_seed_alone(new_task: NewTask) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = models.state_arrays(models.build(new_task(), seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = models.state_arrays(models.build(new_task(), seed=1))
    other = models.state_arrays(models.build(new_task(), seed=2))

    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])


def test_a_plugin_builds_the_model(new_task: NewTask) -> None:
    assert parameters(models.build(new_task(plugin(tiny), size=(5, 4)))) == 5 * 4 * 10 + 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet81", ["'resnet81'", "did you mean 'resnet18'?"]),
        ("no_such_package.models:make", ["no_such_package.models", "PYTHONPATH"]),
        (f"{__name__}:tyni", ["'tyni'", "did you mean 'tiny'?"]),
        (plugin(no_module), ["returned str", "torch.nn.Module"]),
        (plugin(broken), ["failed", "KeyError"]),
        (plugin(pair), ["tuple", "(1, 10)"]),
    ],
)
def test_an_unusable_model_is_refused_with_its_reason(new_task: NewTask, name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        models.build(new_task(name))

    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1", "vit_b_16", "maxvit_t", "inception_v3"])
def test_images_too_small_for_a_model_are_refused(new_task: NewTask, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' cannot take images of 3x4x4 .*larger image size"):
        models.build(new_task(name, channels=3, size=(4, 4)))


def test_state_goes_out_and_in_again(new_task: NewTask) -> None:
    task = new_task("resnet18", size=(32, 32))
    source, target = models.build(task, seed=1), models.build(task, seed=2)
    source(torch.randn(4, 1, 32, 32))  # moves the running statistics and the integer counters
    arrays = models.state_arrays(source)

    models.load_arrays(target, arrays)

    assert not any(name.endswith("num_batches_tracked") for name in arrays)
    assert [name for name in source.state_dict() if name in arrays] == list(arrays)
    assert all(a.dtype == np.float32 and a.flags["C_CONTIGUOUS"] for a in arrays.values())
    assert all(torch.equal(target.state_dict()[name], source.state_dict()[name]) for name in arrays)
    assert int(target.state_dict()["bn1.num_batches_tracked"]) == 0


def test_state_arrays_are_copies_even_in_channels_last(new_task: NewTask) -> None:
    model = models.build(new_task(channels=3))
    for module in model.modules():
        module.to(memory_format=torch.channels_last)
    arrays = models.state_arrays(model)
    kept = arrays["conv2.weight"].copy()
    model.state_dict()["conv2.weight"].zero_()

    assert arrays["conv2.weight"].flags["C_CONTIGUOUS"]
    assert np.array_equal(arrays["conv2.weight"], kept)


def test_read_only_arrays_load_without_a_warning(new_task: NewTask, recwarn: pytest.WarningsRecorder) -> None:
    model = models.build(new_task())
    arrays = models.state_arrays(model)
    for array in arrays.values():
        array.flags.writeable = False

    models.load_arrays(model, arrays)

    assert not list(recwarn)


def test_weights_of_another_model_are_refused_and_change_nothing(new_task: NewTask) -> None:
    model = models.build(new_task())
    arrays = models.state_arrays(model)
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()}

    with pytest.raises(ConfigError, match=r"missing \['conv1.bias'\], unknown \['conv9.bias'\]"):
        models.load_arrays(
            model, {name.replace("conv1.b", "conv9.b"): value for name, value in zeros.items()}
        )
    with pytest.raises(ConfigError, match=r"'fc3.bias' is float32 \[11\], the model wants float32 \[10\]"):
        models.load_arrays(model, zeros | {"fc3.bias": np.zeros(11, np.float32)})
    with pytest.raises(ConfigError, match=r"'fc3.bias' is float64"):
        models.load_arrays(model, zeros | {"fc3.bias": np.zeros(10)})

    after = models.state_arrays(model)
    assert all(np.array_equal(after[name], arrays[name]) for name in arrays)


def test_a_model_that_is_not_float32_is_refused(new_task: NewTask) -> None:
    model = tiny(new_task()).double()

    with pytest.raises(ConfigError, match=r"torch.float64: only float32"):
        models.state_arrays(model)
    with pytest.raises(ConfigError):
        models.build(new_task(plugin(double)))
