"""Epsilon and noise: against published figures, against the closed form, in both directions, and never below the truth."""

import math

import pytest

from privacy.accounting import (
    MIN_NOISE,
    Spend,
    epsilon_pld,
    epsilon_rdp,
    merged,
    noise_multiplier_for,
    snapped_up,
    within,
)
from privacy.errors import OverBudgetError

DELTA = 1e-5
CLASSIC = Spend(1.1, 0.01, 1000)
HARD = Spend(0.6, 0.02, 500)


def gaussian_delta(epsilon: float, noise: float) -> float:
    """Balle and Wang 2018, theorem 8: the exact delta of the Gaussian mechanism with sensitivity 1."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(1 / (2 * noise) - epsilon * noise) - math.exp(epsilon) * phi(
        -1 / (2 * noise) - epsilon * noise
    )


def exact_gaussian_epsilon(noise: float, delta: float) -> float:
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, noise) > delta else (low, middle)
    return high


def test_a_known_setting() -> None:
    assert epsilon_rdp([CLASSIC], DELTA) == pytest.approx(1.71, abs=0.02)
    assert epsilon_pld([CLASSIC], DELTA) == pytest.approx(1.515, abs=0.003)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 10), (20.0, 100), (100.0, 3)])
def test_without_sampling_it_is_the_exact_gaussian(noise: float, steps: int) -> None:
    exact = exact_gaussian_epsilon(noise / math.sqrt(steps), DELTA)
    reported = epsilon_pld([Spend(noise, 1.0, steps)], DELTA)
    assert exact <= reported <= exact * 1.005
    assert reported <= epsilon_rdp([Spend(noise, 1.0, steps)], DELTA)


def test_nothing_costs_nothing() -> None:
    for epsilon in (epsilon_rdp, epsilon_pld):
        assert epsilon([], DELTA) == 0.0
        assert epsilon([Spend(1.0, 0.1, 0)], DELTA) == 0.0
    assert within([], DELTA, 0.0)


def test_equal_mechanisms_count_as_one_whatever_the_order() -> None:
    parts = [Spend(1.1, 0.01, 400), HARD, Spend(1.1, 0.01, 600)]
    assert merged(parts) == (HARD, CLASSIC)
    assert epsilon_pld(parts, DELTA) == epsilon_pld([CLASSIC, HARD], DELTA)


def test_rounds_of_different_kinds_add_up() -> None:
    both = epsilon_pld([CLASSIC, HARD], DELTA)
    alone = epsilon_pld([CLASSIC], DELTA), epsilon_pld([HARD], DELTA)
    assert max(alone) < both < sum(alone)
    assert both <= epsilon_rdp([CLASSIC, HARD], DELTA)


def test_the_tighter_bound_is_asked_before_it_is_over() -> None:
    fast, tight = epsilon_rdp([CLASSIC], DELTA), epsilon_pld([CLASSIC], DELTA)
    limit = (fast + tight) / 2
    assert fast > limit > tight
    assert within([CLASSIC], DELTA, limit)
    assert not within([CLASSIC], DELTA, tight * 0.999)


@pytest.mark.parametrize("noise", [1e-6, 0.01, 0.05])
def test_next_to_no_noise_takes_no_memory_and_is_never_within(noise: float) -> None:
    for rate in (1e-4, 0.5, 1.0):
        spend = Spend(noise, rate, 1000)
        assert epsilon_pld([spend], DELTA) > 200
        assert not within([spend], DELTA, 100.0)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "so_far"),
    [
        (1.2, 0.0054, 1870, []),
        (7.0, 0.0054, 1870, []),
        (8.0, 1.0, 50, []),
        (3.0, 0.0054, 935, [Spend(1.0, 0.0054, 935)]),
        (0.01, 0.01, 100, []),
    ],
)
def test_noise_for_a_target_fits_and_hardly_more(
    epsilon: float, rate: float, steps: int, so_far: list[Spend]
) -> None:
    noise = noise_multiplier_for(epsilon, DELTA, so_far, rate, steps)
    assert epsilon * 0.99 < epsilon_pld([*so_far, Spend(noise, rate, steps)], DELTA) <= epsilon
    assert noise == snapped_up(noise, 4)


def test_a_generous_target_still_gets_some_noise() -> None:
    assert noise_multiplier_for(1e6, DELTA, [], 0.01, 1) == MIN_NOISE


def test_no_noise_is_enough_when_all_is_spent() -> None:
    with pytest.raises(OverBudgetError, match=r"epsilon 1\.52 of 1 is spent") as refused:
        noise_multiplier_for(1.0, DELTA, [CLASSIC], 0.01, 10)
    assert refused.value.spent == pytest.approx(1.516, abs=0.003)
    assert refused.value.limit == 1.0


@pytest.mark.parametrize(
    ("value", "up"),
    [(1 / 3, 0.334), (0.1, 0.1), (64 / 12000, 0.00534), (9.999, 10.0), (1.0, 1.0), (0.9996, 1.0)],
)
def test_rates_are_rounded_up(value: float, up: float) -> None:
    assert snapped_up(value) == up


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (0.0, 0.1, 1),
        (-1.0, 0.1, 1),
        (math.inf, 0.1, 1),
        (math.nan, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, 0.1, -1),
    ],
)
def test_impossible_spends_are_refused(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Spend(noise, rate, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_impossible_deltas_are_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon_pld([CLASSIC], delta)
