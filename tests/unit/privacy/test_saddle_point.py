"""The integral over a line: against exact composition for updates of every kind, and the supremum between its points."""

from math import sqrt

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import skellam

from privacy.distributed import epsilon_of, epsilon_rdp
from privacy.rounded_sum import NoisySum, Shifts
from privacy.saddle_point import _FREQUENCIES, HEIGHTS, _log_magnitudes, _suprema

DELTA = 1e-5
WIDE = NoisySum(noise=12.0, norm=12.0, largest=1.5)


def exact_epsilon(parts: dict[float, int], noise: float) -> float:
    """Of an update that has so many coordinates of each magnitude, composed by privacy loss distributions, both directions."""
    ks, v = np.arange(-int(9 * noise), int(9 * noise) + 1), noise**2 / 2
    zero = skellam.logpmf(ks, v, v)
    width = 2e-5 * min(1.0, 2500 / sum(parts.values()))  # it rounds each loss up by half of that
    total = None
    for x, count in parts.items():
        whole, part = int(x), x - int(x)
        below, above = skellam.pmf(ks - whole, v, v), skellam.pmf(ks - whole - 1, v, v)
        shifted = np.log((1 - part) * below + part * above)
        loss = pld.from_two_probability_mass_functions(
            dict(zip(ks.tolist(), zero, strict=True)),
            dict(zip(ks.tolist(), shifted, strict=True)),
            value_discretization_interval=width,
            symmetric=False,
        ).self_compose(count)
        total = loss if total is None else total.compose(loss)
    assert total is not None
    return float(total.get_epsilon_for_delta(DELTA))


@pytest.mark.parametrize(
    "parts",
    [
        {1.5: 64},
        {1.0: 144},
        {0.5: 576},
        {0.2: 3600},
        {1.25: 46, 0.75: 64, 0.25: 577},
    ],
)
def test_no_update_costs_more_and_none_much_less(parts: dict[float, int]) -> None:
    """All have a norm of 12 or a hair less: the bound is for the norm, however it is spread."""
    norm = sqrt(sum(x**2 * count for x, count in parts.items()))
    assert 11.98 < norm < 12.0 + 1e-9
    bound = epsilon_of([WIDE], DELTA)
    assert exact_epsilon(parts, 12.0) <= bound <= 1.04 * exact_epsilon(parts, 12.0)
    assert bound < 0.97 * epsilon_rdp([WIDE], DELTA)


@pytest.mark.parametrize("each", [WIDE, NoisySum(25.5, 18.0, 0.25), NoisySum(160.0, 110.0, 3.7)])
@pytest.mark.parametrize("height", [1.0, 6.0, 40.0])
def test_the_supremum_holds_between_its_points(each: NoisySum, height: float) -> None:
    index = int(np.searchsorted(HEIGHTS, height))
    law = Shifts(each, np.array([1 + HEIGHTS[index]]))

    some = np.arange(0, _FREQUENCIES.size, 23)
    bound = _suprema(each, index)[some]
    for x in np.random.default_rng(3).uniform(0.01 * each.largest, each.largest, 12):
        for exponent in (1 + HEIGHTS[index], -HEIGHTS[index]):
            at = _log_magnitudes(law, float(x), float(exponent), _FREQUENCIES[some]) / x**2
            assert (at <= bound + 1e-9).all()


def test_sums_of_every_mth_term_are_the_sums() -> None:
    each = NoisySum(160.0, 110.0, 1.5)
    law = Shifts(each, np.array([8.0]))
    u = np.array([0.0, 0.3, 2.0, 11.0, 60.0])
    coarse = _log_magnitudes(law, 0.7, 8.0, u)
    base, ratios = law.log_ratios(0.7)
    whole = [np.log(abs(np.exp(base + (8.0 + 1j * each_u) * ratios).sum())) for each_u in u]
    np.testing.assert_allclose(coarse, whole, atol=1e-10)
