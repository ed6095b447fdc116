import numpy as np
import pytest
import torch

from federation.task.data import open_data, task_from_data
from federation.task.images import ImageData
from federation.task.models import build
from privacy.audit.inversion import clip_and_noise, gradient, invert, similarity


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return open_data("digits", task_from_data("digits", "cnn"), train=True)


def recovered(digits: ImageData, noise_multiplier: float | None) -> float:
    """Correlation of the first digit with what is recovered from its gradient."""
    model = build(digits.task, seed=1)
    before = [parameter.clone() for parameter in model.parameters()]
    images, labels = digits.batch(np.array([0]))
    seen = gradient(model, images, labels)
    if noise_multiplier is not None:
        seen = clip_and_noise(seen, 1.0, noise_multiplier)
    mean, std = float(digits.task.mean[0]), float(digits.task.std[0])
    low, high = torch.full_like(images[0], -mean / std), torch.full_like(images[0], (1 - mean) / std)
    found = invert(model, seen, labels, low=low, high=high, steps=150)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert found.images.min() >= float(low.min())
    assert found.images.max() <= float(high.max())
    return similarity(found.images[0], images[0].numpy())


def test_a_picture_comes_back_from_its_gradient(digits: ImageData) -> None:
    assert recovered(digits, None) > 0.95


def test_clipping_alone_hides_nothing_and_noise_hides_the_picture(digits: ImageData) -> None:
    assert recovered(digits, 0.0) > 0.95
    assert recovered(digits, 0.1) < 0.6


def test_the_gradient_is_clipped_and_noised_as_said() -> None:
    seen = clip_and_noise([torch.full((100,), 3.0), torch.full((100,), 4.0)], 2.0, 0.0)
    assert float(torch.cat(seen).norm()) == pytest.approx(2.0)
    short = clip_and_noise([torch.tensor([0.6, 0.8])], 2.0, 0.0)
    assert short[0].tolist() == pytest.approx([0.6, 0.8])
    noise = clip_and_noise([torch.zeros(200_000)], 2.0, 1.5)[0]
    assert float(noise.std()) == pytest.approx(3.0, rel=0.02)


def test_similarity() -> None:
    picture = np.random.default_rng(0).normal(size=(1, 5, 5))
    assert similarity(3 * picture + 7, picture) == pytest.approx(1.0)
    assert similarity(-picture, picture) == pytest.approx(-1.0)
    assert similarity(np.ones((1, 5, 5)), picture) == 0
