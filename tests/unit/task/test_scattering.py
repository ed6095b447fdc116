import math
from collections.abc import Callable

import pytest
import torch

from federation.task.models import build, state_arrays
from federation.task.scattering import morlet
from federation.wire.messages import TaskSpec

NewTask = Callable[..., TaskSpec]


def test_only_the_head_is_learned_and_sent(new_task: NewTask) -> None:
    model = build(new_task("scattering"))

    assert {name: array.shape for name, array in state_arrays(model).items()} == {
        "head.weight": (10, 3969),
        "head.bias": (10,),
    }
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (8, 8), (28, 30), (33, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_channels(new_task: NewTask, size: tuple[int, int], channels: int) -> None:
    model = build(new_task("scattering", size=size, channels=channels))

    assert model(torch.randn(3, channels, *size)).shape == (3, 10)


@pytest.mark.parametrize("scale", [0, 1])
def test_wavelets_sum_to_zero_and_answer_to_their_own_wave(scale: int) -> None:
    real, imaginary = morlet(scale, 0.0, 15)
    assert float(real.sum()) == pytest.approx(0, abs=1e-6)
    assert float(imaginary.sum()) == pytest.approx(0, abs=1e-6)

    line = torch.arange(-15, 16).float()
    frequency = 0.75 * math.pi / 2**scale
    across, along = torch.cos(frequency * line)[None, :], torch.cos(frequency * line)[:, None]
    assert abs(float((real * across).sum())) > 10 * abs(float((real * along).sum()))


def test_a_shift_of_the_image_moves_features_little(new_task: NewTask) -> None:
    features = build(new_task("scattering")).get_submodule("features.scattering")
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 8:20, 12:16] = 1.0
    shifted, turned = image.roll(1, dims=3), image.transpose(2, 3)

    with torch.no_grad():
        here, there, else_ = features(image), features(shifted), features(turned)
    assert float((here - there).norm()) < 0.5 * float((here - else_).norm())
