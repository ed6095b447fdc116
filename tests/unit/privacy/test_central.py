"""privacy.central: no update moves the mean further than C / n, the noise is as large as stated, and the budget holds."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from privacy.accounting import Spend, epsilon_pld, within
from privacy.central import (
    LARGEST_CLIP_NORM,
    LEAST_CLIP_NORM,
    Adaptation,
    ClientMechanism,
    affordable,
)
from privacy.gaussian import grid_step

Update = dict[str, NDArray[np.float32]]


def update_of(norm: float, seed: int = 0, size: int = 1000) -> Update:
    rng = np.random.default_rng(seed)
    flat = rng.standard_normal(size)
    flat *= norm / np.linalg.norm(flat)
    return {"w": flat[10:].astype(np.float32).reshape(-1, 10), "b": flat[:10].astype(np.float32)}


def norm_of(arrays: dict[str, NDArray[np.float64]]) -> float:
    return math.sqrt(sum(float(np.sum(array.astype(np.longdouble) ** 2)) for array in arrays.values()))


def test_an_update_within_the_norm_is_kept_but_for_the_grid() -> None:
    update = update_of(0.7)
    clipped, within_norm = ClientMechanism(1.0, 1.0, 5.0).clip(update)
    assert within_norm
    for name, array in clipped.items():
        np.testing.assert_allclose(array, update[name], atol=2.0**-30, rtol=0)
        steps = array / grid_step(1.0, 30)
        np.testing.assert_array_equal(steps, np.rint(steps))


@pytest.mark.parametrize("norm", [1.0001, 3.0, 1e15])
def test_a_longer_one_is_scaled_down_over_all_tensors_together(norm: float) -> None:
    update = update_of(norm)
    clipped, within_norm = ClientMechanism(1.0, 1.0, 5.0).clip(update)
    assert not within_norm
    assert 1 - 1e-5 < norm_of(clipped) <= 1
    for name, array in clipped.items():
        np.testing.assert_allclose(array, update[name].astype(np.float64) / norm, rtol=1e-5, atol=1e-8)


def test_sums_of_clipped_updates_are_exact() -> None:
    mechanism = ClientMechanism(0.3, 1.0, 5.0)
    parts = [mechanism.clip(update_of(1.0, seed))[0]["w"] for seed in range(50)]
    forth, back = sum(parts, np.zeros(parts[0].shape)), sum(parts[::-1], np.zeros(parts[0].shape))
    np.testing.assert_array_equal(forth, back)
    exact = sum((part.astype(np.longdouble) for part in parts), np.zeros(parts[0].shape, np.longdouble))
    np.testing.assert_array_equal(forth, exact)


@pytest.mark.parametrize("adaptation", [None, Adaptation(0.5, 0.2)])
def test_the_noise_on_the_mean_is_that_which_is_paid_for(adaptation: Adaptation | None) -> None:
    mechanism = ClientMechanism(0.5, 2.0, 8.0, adaptation)
    mean = mechanism.noisy_mean({"w": np.zeros((300, 300)), "b": np.full(10_000, 8.0), "one": np.zeros(())})
    assert isinstance(mean["one"], np.ndarray), "a tensor without dimensions is one too"
    std = mechanism.sum_noise * 0.5 / 8
    assert stats.kstest(mean["w"].ravel() / std, "norm").pvalue > 1e-7
    assert stats.kstest((mean["b"] - 1.0) / std, "norm").pvalue > 1e-7
    expected = mechanism.noise_norm(90_000)
    assert np.linalg.norm(mean["w"]) == pytest.approx(expected, rel=6 / math.sqrt(2 * 90_000))


def test_a_fixed_norm_spends_all_noise_on_the_sum() -> None:
    mechanism = ClientMechanism(0.5, 2.0, 8.0)
    assert mechanism.sum_noise == 2.0
    assert mechanism.next_clip_norm(below=0, delivered=8) == 0.5


@pytest.mark.parametrize(("expected", "count_noise"), [(1000.0, 50.0), (5.0, 1.1)])
def test_sum_and_count_together_cost_what_was_stated(expected: float, count_noise: float) -> None:
    """Two Gaussian mechanisms on the same data are one, with 1 / z^2 = 1 / z_sum^2 + 1 / (2 sigma_b)^2."""
    mechanism = ClientMechanism(1.0, 1.1, expected, Adaptation(0.5, 0.2))
    assert mechanism.count_noise == count_noise
    assert 1 / mechanism.sum_noise**2 + 1 / (2 * count_noise) ** 2 == pytest.approx(1 / 1.1**2)
    assert mechanism.sum_noise >= 1.1


def test_the_count_is_noisy() -> None:
    mechanism = ClientMechanism(1.0, 1.0, 100.0, Adaptation(0.5, 1.0))
    logs = [math.log(mechanism.next_clip_norm(below=50, delivered=100)) for _ in range(3000)]
    assert stats.kstest(np.array(logs) / (5.0 / 100), "norm").pvalue > 1e-7


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.05, 20.0])
def test_an_adaptive_norm_finds_its_quantile(quantile: float, start: float) -> None:
    norms = np.random.default_rng(5).lognormal(mean=0.0, sigma=0.5, size=1000)
    clip_norm, late = start, []
    for number in range(200):
        mechanism = ClientMechanism(clip_norm, 1.0, 1000.0, Adaptation(quantile, 0.2))
        clip_norm = mechanism.next_clip_norm(below=int(np.sum(norms <= clip_norm)), delivered=1000)
        if number >= 150:
            late.append(float(np.mean(norms <= clip_norm)))
    # sigma_b is 5 % of the devices; the norm averages over about 1 / eta rounds.
    assert np.mean(late) == pytest.approx(quantile, abs=0.05)


def test_those_that_do_not_deliver_pull_neither_way() -> None:
    mechanism = ClientMechanism(1.0, 1e-3, 1000.0, Adaptation(0.5, 1.0))
    logs = [math.log(mechanism.next_clip_norm(below=0, delivered=0)) for _ in range(200)]
    assert abs(np.mean(logs)) < 6 * 0.05 / math.sqrt(200)


@pytest.mark.parametrize(("below", "limit"), [(0, LARGEST_CLIP_NORM), (10**6, LEAST_CLIP_NORM)])
def test_an_adaptive_norm_stays_a_number(below: int, limit: float) -> None:
    mechanism = ClientMechanism(limit, 1.0, 10**6, Adaptation(0.5, 100.0))
    assert mechanism.next_clip_norm(below=below, delivered=10**6) == limit


@pytest.mark.parametrize(("rate", "budget"), [(1.0, 8.0), (0.1, 3.0), (1.0, 0.5)])
def test_the_budget_pays_for_so_many_rounds_and_not_for_one_more(rate: float, budget: float) -> None:
    step = Spend(2.0, rate, 1)
    before = [Spend(3.0, 1.0, 2)] if budget > 1 else []
    count = affordable(before, step, budget, 1e-5, at_most=400)
    assert within([*before, Spend(2.0, rate, count)], 1e-5, budget)
    assert count == 400 or not within([*before, Spend(2.0, rate, count + 1)], 1e-5, budget)
    assert (count == 0) == (budget == 0.5)


def test_a_budget_that_lasts_is_not_searched() -> None:
    step = Spend(5.0, 0.01, 1)
    assert affordable([], step, 8.0, 1e-5, at_most=50) == 50
    assert affordable([], step, 8.0, 1e-5, at_most=0) == 0
    assert affordable([Spend(0.3, 1.0, 9)], step, 8.0, 1e-5, at_most=50) == 0


def test_secret_draws_cost_less_than_taking_everybody() -> None:
    everybody, drawn = (epsilon_pld([Spend(1.0, rate, 50)], 1e-5) for rate in (1.0, 0.05))
    assert drawn < everybody / 5
