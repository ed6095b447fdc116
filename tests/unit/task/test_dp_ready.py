from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import nn

from federation.errors import ConfigError
from federation.task import models
from federation.task.dp_ready import group_count
from federation.wire.messages import TaskSpec

NewTask = Callable[..., TaskSpec]

VISION = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
]


class _Mean(nn.Module):
    """Mixes the samples of a batch, as BatchNorm does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images - images.mean(dim=0)


class _Statement(nn.Module):
    """Changes its input by a statement whose result nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(images.flatten(1))
        out.mul_(2.0)
        return out


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        out = self.inner(flat)
        out += flat
        logits: torch.Tensor = self.head(torch.nn.functional.relu(out, inplace=True))
        return logits


class _Borrowed(nn.Module):
    """Uses a layer's weights without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(images.flatten(1), self.inner.weight)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.flatten(1, 2)
        logits: torch.Tensor = self.head(self.attention(rows, rows, rows)[0].flatten(1))
        return logits


def attention(_task: TaskSpec) -> nn.Module:
    return _Attention()


def mixing(_task: TaskSpec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), _Mean(), nn.Linear(32, 10))


def statement(_task: TaskSpec) -> nn.Module:
    return _Statement()


def residual(_task: TaskSpec) -> nn.Module:
    return _Residual()


def borrowed(_task: TaskSpec) -> nn.Module:
    return _Borrowed()


def remembering(_task: TaskSpec) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), nn.Linear(144, 10)
    )


def lone_norm(_task: TaskSpec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Linear(64, 10))


def task_of(new_task: NewTask, factory: Callable[[TaskSpec], nn.Module]) -> TaskSpec:
    return ready(new_task(f"{__name__}:{factory.__name__}", size=(8, 8)))


def ready(task: TaskSpec) -> TaskSpec:
    return msgspec.structs.replace(task, dp_ready=True)


@pytest.mark.parametrize("name", VISION)
def test_names_stay_statistics_go_and_the_seed_decides(new_task: NewTask, name: str) -> None:
    task = new_task(name, channels=3, size=(32, 32))
    plain, made, again = (
        models.build(task),
        models.build(ready(task), seed=3),
        models.build(ready(task), seed=3),
    )

    assert dict(made.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert not any("running" in key or "tracked" in key for key in made.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not any(getattr(module, "inplace", False) for module in made.modules())


def test_a_model_that_needs_nothing_gives_what_it_gave(new_task: NewTask) -> None:
    images = torch.randn(2, 1, 28, 28)

    assert torch.equal(
        models.build(new_task(), seed=1)(images), models.build(ready(new_task()), seed=1)(images)
    )


def test_residual_additions_stay_additions(new_task: NewTask) -> None:
    task = task_of(new_task, residual)
    images = torch.randn(3, 1, 8, 8)
    made, plain = (
        models.build(task, seed=1),
        models.build(msgspec.structs.replace(task, dp_ready=False), seed=1),
    )

    assert torch.equal(made(images), plain(images))
    assert torch.equal(made.eval()(images), plain.eval()(images))


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (16, 4), (24, 6), (29, 1), (58, 2), (64, 16), (96, 24), (512, 32)],
)
def test_groups_divide_the_channels_and_are_no_single_ones(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


def test_a_batch_norm_keeps_what_it_began_with(new_task: NewTask) -> None:
    model = models.build(ready(new_task("resnet18", size=(32, 32))))
    norm = model.get_submodule("bn1")

    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (16, 64)
    assert isinstance(models.build(task_of(new_task, lone_norm)).get_submodule("1"), nn.GroupNorm)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (mixing, ["'2'", "mixes the samples", "GroupNorm"]),
        (statement, ["writes over", "inplace=True"]),
        (attention, ["'attention.out_proj'", "convolutions and linear layers"]),
        (borrowed, ["'inner'", "without calling it"]),
        (remembering, ["'1'", "statistics", "track_running_stats=False"]),
    ],
)
def test_what_cannot_be_made_ready_is_named(
    new_task: NewTask, factory: Callable[[TaskSpec], nn.Module], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        models.build(task_of(new_task, factory))

    assert all(word in str(caught.value) for word in [*words, "privacy.sample off"]), str(caught.value)
