import numpy as np
import pytest
import torch
from torch import nn

from privacy import dpsgd
from privacy.accounting import epsilon_pld, noise_multiplier_for
from privacy.audit.bounds import LowerBound, one_run_bound
from privacy.audit.canaries import (
    GRADIENT_SCALE,
    NO_CANARY,
    answers,
    draw_coins,
    gradient_scores,
    mislabelled,
    widen,
    with_canaries,
)
from privacy.budget import PrivateRound

CLASSES, SHAPE = 4, (1, 3, 3)
EPSILON, DELTA, RATE, STEPS, CLIP = 1.0, 1e-5, 0.3, 12, 1.0


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def audited(private: PrivateRound, *, canaries: int = 600, seed: int = 0) -> LowerBound:
    """Train a small model by the private step of devices, with gradient canaries for a clip norm of 1."""
    random = np.random.default_rng(seed)
    inside, own = draw_coins(canaries, random), np.arange(canaries) % CLASSES
    planted = np.flatnonzero(inside)
    ordinary = 60
    images = torch.randn((ordinary + len(planted), *SHAPE), generator=torch.Generator().manual_seed(seed))
    numbers = np.concatenate([np.full(ordinary, NO_CANARY), planted])
    labels = torch.from_numpy(np.concatenate([random.integers(0, CLASSES, ordinary), own[planted]]))
    wide = widen(images, numbers)
    model = with_canaries(small_model(), SHAPE, CLASSES, canaries, CLIP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    dpsgd.train(model, optimizer, private, samples=len(wide), batch=lambda rows: (wide[rows], labels[rows]))
    scores = gradient_scores(model.get_parameter("canaries.weight").detach().numpy(), own)
    return one_run_bound(scores, inside, delta=DELTA)


@pytest.fixture(scope="module")
def noise() -> float:
    found = noise_multiplier_for(EPSILON, DELTA, [], RATE, STEPS)
    assert epsilon_pld([PrivateRound(found, CLIP, RATE, STEPS).spend], DELTA) <= EPSILON
    return found


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("seed", range(3))
def test_training_that_keeps_its_promise_is_not_accused(noise: float, seed: int) -> None:
    assert audited(PrivateRound(noise, CLIP, RATE, STEPS), seed=seed).epsilon <= EPSILON


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_noise_that_is_off_is_caught(noise: float) -> None:
    assert audited(PrivateRound(noise / 1000, CLIP, RATE, STEPS)).epsilon > 3 * EPSILON


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_noise_of_a_fifth_is_caught(noise: float) -> None:
    assert audited(PrivateRound(noise / 5, CLIP, RATE, STEPS), canaries=1500).epsilon > EPSILON


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_clipping_that_is_off_is_caught(noise: float) -> None:
    """Gradients up to 20 times as long pass, beside noise for a clip norm of 1."""
    without = PrivateRound(noise / (2 * GRADIENT_SCALE), 2 * GRADIENT_SCALE * CLIP, RATE, STEPS)
    assert audited(without).epsilon > EPSILON


def test_canaries_own_their_coordinates() -> None:
    model = with_canaries(small_model(), SHAPE, CLASSES, 5, CLIP)
    images = torch.randn(3, *SHAPE)
    labels = torch.tensor([0, 1, 2])
    gradients = []
    for row, number in enumerate([NO_CANARY, 2, 4]):
        model.zero_grad()
        batch = widen(images[row : row + 1], np.array([number]))
        torch.autograd.backward(torch.nn.functional.cross_entropy(model(batch), labels[row : row + 1]))
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})  # fmt: skip
    ordinary, second, fourth = gradients
    assert not ordinary["canaries.weight"].any()
    assert ordinary["model.1.weight"].any()
    for number, gradient in ((2, second), (4, fourth)):
        assert not any(values.any() for name, values in gradient.items() if name != "canaries.weight")
        own = gradient["canaries.weight"]
        assert own[:, number].norm() == pytest.approx(GRADIENT_SCALE * CLIP * (1 - 1 / CLASSES) ** 0.5)
        assert not own[:, [other for other in range(5) if other != number]].any()


def test_ordinary_samples_are_answered_as_before() -> None:
    inner = small_model()
    model = with_canaries(inner, SHAPE, CLASSES, 5, CLIP)
    images = torch.randn(7, *SHAPE)
    torch.testing.assert_close(model(widen(images, np.full(7, NO_CANARY))), inner(images))


def test_scores_follow_the_canarys_own_gradient() -> None:
    weights = np.zeros((CLASSES, 3))
    weights[1, 0] = 0.5
    weights[2, 1] = -0.5
    assert gradient_scores(weights, np.array([1, 2, 3])).tolist() == pytest.approx([0.375, -0.375, 0.0])


def test_wrong_labels_are_wrong_and_even() -> None:
    labels = np.repeat(np.arange(CLASSES), 3000)
    wrong = mislabelled(labels, CLASSES, np.random.default_rng(0))
    assert not (wrong == labels).any()
    assert np.bincount(wrong[:3000], minlength=CLASSES)[1:].min() > 900
    with pytest.raises(ValueError, match="one class only"):
        mislabelled(np.zeros(3, np.int64), 1, np.random.default_rng(0))


def test_answers_are_those_of_single_samples_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(9, CLASSES)).train()
    images, labels = torch.randn(300, *SHAPE), torch.arange(300) % CLASSES
    found = answers(model, lambda rows: (images[rows], labels[rows]), 300)
    assert model.training
    model.eval()
    losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    assert found.losses == pytest.approx(losses.detach().numpy(), abs=1e-5)
    assert found.accuracy == pytest.approx(float((model(images).argmax(1) == labels).float().mean()))
