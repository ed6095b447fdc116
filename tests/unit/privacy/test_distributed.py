"""What distributed noise costs, against computations of other kinds; and that the promised noise is there."""

from math import inf, log, sqrt

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm, skellam

from federation.wire.shared_scale import SharedScale
from privacy.distributed import (
    affordable,
    epsilon_of,
    epsilon_rdp,
    least_agents,
    noise_multiplier_for,
    share_variance,
    within,
)
from privacy.errors import TermsError
from privacy.rounded_sum import ORDERS, NoisySum, divergences
from privacy.skellam import Skellam

DELTA = 1e-5
SUMS = [
    NoisySum(noise=21.0, norm=21.0, largest=0.29),
    NoisySum(noise=10.0, norm=7.0, largest=1.0),
    NoisySum(noise=18.0, norm=24.0, largest=6.7),
    NoisySum(noise=5.0, norm=2.0, largest=2.0),
    NoisySum(noise=160.0, norm=107.0, largest=1.47),
]


def logs_of(noise: float, x: float, ks: NDArray[np.int64]) -> NDArray[np.float64]:
    """log P_x(k) by scipy, of a value that is rounded and gets the noise."""
    v = noise**2 / 2
    whole = np.floor(x)
    below = skellam.logpmf(ks - int(whole), v, v)
    if x == whole:
        return np.asarray(below)
    above = skellam.logpmf(ks - int(whole) - 1, v, v)
    return np.asarray(np.logaddexp(np.log(1 - (x - whole)) + below, np.log(x - whole) + above))


def divergence(p: NDArray[np.float64], q: NDArray[np.float64], order: float) -> float:
    usable = np.isfinite(p) & np.isfinite(q)
    return float(logsumexp(order * p[usable] + (1 - order) * q[usable])) / (order - 1)


def gaussian_epsilon(shift: float, delta: float) -> float:
    """Exactly, of the Gaussian mechanism (Balle and Wang 2018, theorem 8); ``shift`` is sensitivity over deviation."""

    def excess(epsilon: float) -> float:
        below = norm.logcdf(-epsilon / shift - shift / 2) + epsilon
        return float(norm.cdf(-epsilon / shift + shift / 2) - np.exp(below)) - delta

    return float(brentq(excess, 0, 1e5))


@pytest.mark.parametrize("each", SUMS)
def test_no_vector_costs_more_than_the_bound(each: NoisySum) -> None:
    """Any coordinate costs at most ``K_a x^2``; so does then any vector, as its coordinates are independent."""
    ks = np.arange(-int(20 * each.noise) - 60, int(20 * each.noise) + 61)
    zero = logs_of(each.noise, 0, ks)
    bounds = divergences(each)
    places = [
        *np.linspace(0, each.largest, 12)[1:],
        *np.arange(1, int(each.largest) + 1),
        1e-2 * each.largest,
    ]
    worst: dict[int, float] = {}
    for x in places:
        shifted = logs_of(each.noise, x, ks)
        for index, order in enumerate(ORDERS):
            if order not in {1.1, 1.5, 2.0, 3.0, 4.5, 8.0, 12.0}:
                continue
            for one, other in ((shifted, zero), (zero, shifted)):
                cost = divergence(one, other, order) / x**2 * each.norm**2
                assert cost <= bounds[index] * (1 + 1e-6)
                worst[index] = max(worst.get(index, 0.0), cost)
    # And not much less: the bound is no wild guess.
    assert all(bounds[index] <= 1.04 * cost for index, cost in worst.items() if ORDERS[index] <= 8)


@pytest.mark.parametrize("each", SUMS)
def test_never_below_the_gaussian(each: NoisySum) -> None:
    bounds = divergences(each)
    gaussian = np.array(ORDERS) * (each.norm / each.noise) ** 2 / 2
    assert (bounds >= gaussian).all()
    close = np.array(ORDERS) <= 4
    assert (bounds[close] <= gaussian[close] * (1 + 6 / each.noise)).all()
    for rounds in (1, 30):
        central = float(compute_epsilon(np.array(ORDERS), gaussian * rounds, DELTA)[0])
        assert epsilon_rdp([each] * rounds, DELTA) >= central
        exact = gaussian_epsilon(sqrt(rounds) * each.norm / each.noise, DELTA)
        assert exact <= epsilon_of([each] * rounds, DELTA) <= epsilon_rdp([each] * rounds, DELTA)


@pytest.mark.parametrize(
    ("x", "coordinates", "noise", "rounds"), [(0.3, 400, 20.0, 1), (0.8, 60, 6.0, 4), (1.5, 30, 12.0, 3)]
)
def test_epsilon_against_privacy_loss_distributions(
    x: float, coordinates: int, noise: float, rounds: int
) -> None:
    """The loss of one coordinate as a distribution, composed over coordinates and rounds: another way, without orders."""
    ks = np.arange(-int(9 * noise), int(9 * noise) + 1)
    one, zero = logs_of(noise, x, ks), logs_of(noise, 0, ks)
    lower = dict(zip(ks.tolist(), zero, strict=True))
    upper = dict(zip(ks.tolist(), one, strict=True))
    times = coordinates * rounds
    loss = pld.from_two_probability_mass_functions(
        lower, upper, value_discretization_interval=2e-5, symmetric=False
    )
    exact = loss.self_compose(times).get_epsilon_for_delta(DELTA)
    bound = epsilon_of([NoisySum(noise=noise, norm=x * sqrt(coordinates), largest=x)] * rounds, DELTA)
    assert exact <= bound <= 1.04 * exact
    assert bound < epsilon_rdp([NoisySum(noise=noise, norm=x * sqrt(coordinates), largest=x)] * rounds, DELTA)


def test_rounding_that_is_coarser_than_the_values_is_not_charged_by_its_length() -> None:
    """After rounding, the vector is several times as long as before; what it costs is what it cost before."""
    x, coordinates, noise = 0.05, 60_000, 20.0
    length = x * sqrt(coordinates)
    after = sqrt(coordinates * x)
    assert after > 4 * length
    cost = epsilon_of([NoisySum(noise=noise, norm=length, largest=x)], DELTA)
    charged = epsilon_rdp([NoisySum(noise=noise, norm=after, largest=after)], DELTA)
    central = gaussian_epsilon(length / noise, DELTA)
    assert central <= cost < 1.01 * central
    assert charged > 4 * cost


@pytest.mark.parametrize(
    ("agents", "dropouts", "left"),
    [
        (10, 0, 10),
        (10, 1 / 3, 7),
        (9, 1 / 3, 6),
        (100, 0.3, 70),
        (3, 0.5, 2),
        (2, 0.5, 1),
        (1, 0.5, 1),
        (4096, 0.5, 2048),
    ],
)
def test_how_many_must_be_left(agents: int, dropouts: float, left: int) -> None:
    assert least_agents(agents, dropouts) == left


@pytest.mark.parametrize("dropouts", [0.0, 0.3, 1 / 3, 0.5])
def test_the_noise_of_those_who_must_be_left_is_what_was_promised(dropouts: float) -> None:
    agents, noise, clip_norm, step, count = 20, 1.5, 3.0, 0.11, 40_000
    variance = share_variance(
        noise_multiplier=noise, clip_norm=clip_norm, step=step, agents=agents, dropouts=dropouts
    )
    left = least_agents(agents, dropouts)
    assert left * variance * step**2 == pytest.approx((noise * clip_norm) ** 2, rel=1e-12)
    scale = SharedScale.of(
        {"w": (100,)},
        clip_norm=clip_norm,
        modulus_bits=16,
        agents=agents,
        noise_multiplier=noise,
        dropouts=dropouts,
    )
    assert agents * variance * step**2 == pytest.approx((scale.noise_multiplier * clip_norm) ** 2, rel=1e-12)
    share = Skellam(variance)
    total = np.zeros(count, dtype=np.int64)
    for _ in range(left):
        total += share.sample(count)
    # The variance of an empirical variance of a nearly Gaussian sum: 2 v^2 / n.
    assert abs(total.var() * step**2 / (noise * clip_norm) ** 2 - 1) < 6 * sqrt(2 / count)


@pytest.mark.parametrize(("agents", "bits", "dropouts"), [(10, 8, 0.0), (30, 8, 0.3), (30, 16, 0.5)])
def test_the_sum_errs_as_much_as_central_noise(agents: int, bits: int, dropouts: float) -> None:
    """From updates to the mean: rounding, noise and modulus together, when as many vanish as was assumed."""
    noise, clip_norm, seed = 1.0, 2.0, bytes(16)
    schema = {"w": (40_000,)}
    scale = SharedScale.of(
        schema,
        clip_norm=clip_norm,
        modulus_bits=bits,
        agents=agents,
        noise_multiplier=noise,
        dropouts=dropouts,
    )
    assert scale.wrap_probability < 1e-5
    share = Skellam(
        share_variance(
            noise_multiplier=noise, clip_norm=clip_norm, step=scale.step, agents=agents, dropouts=dropouts
        )
    )
    left = least_agents(agents, dropouts)
    rng = np.random.default_rng(12)
    total, exact = np.zeros(scale.size, dtype=scale.dtype), np.zeros(40_000)
    for _ in range(left):
        values = rng.normal(size=40_000).astype(np.float32)
        values *= np.float32(clip_norm) / np.linalg.norm(values)
        total += scale.reduced(scale.integers({"w": values}, seed) + share.sample(scale.size))
        exact += values
    error = np.linalg.norm(scale.mean(total, seed, left)["w"] * left - exact) / sqrt(40_000)
    assert error == pytest.approx(noise * clip_norm, rel=0.03)


def test_epsilon_of_nothing() -> None:
    assert epsilon_of([], DELTA) == 0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, inf])
def test_delta_must_be_a_probability(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon_of([SUMS[0]], delta)


@pytest.mark.parametrize(
    "values", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (inf, 1, 1), (1, -1, 1), (float("nan"), 1, 1)]
)
def test_sums_that_cannot_be(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        NoisySum(*values)


@settings(max_examples=3, deadline=None)
@given(
    noise=st.floats(2.0, 60.0),
    ratio=st.floats(0.2, 8.0),
    largest=st.floats(0.05, 3.0),
    rounds=st.integers(1, 50),
)
def test_epsilon_grows_with_rounds_and_falls_with_noise(
    noise: float, ratio: float, largest: float, rounds: int
) -> None:
    each = NoisySum(noise=noise, norm=noise / ratio, largest=largest)
    quieter = NoisySum(noise=noise, norm=0.7 * noise / ratio, largest=largest)
    epsilon = epsilon_of([each] * rounds, DELTA)
    assert epsilon_of([quieter] * rounds, DELTA) < epsilon
    assert epsilon < epsilon_of([each] * (rounds + 1), DELTA)
    assert epsilon_of([each] * rounds, DELTA / 10) > epsilon
    assert epsilon_of([each] * (rounds - 1) + [quieter], DELTA) < epsilon


@pytest.mark.parametrize(("epsilon", "rounds"), [(3.0, 1), (8.0, 30)])
def test_the_least_noise_for_an_epsilon(epsilon: float, rounds: int) -> None:
    def sum_with(noise: float) -> NoisySum:
        scale = SharedScale.of(
            {"w": (186_110,)}, clip_norm=2.0, modulus_bits=8, agents=50, noise_multiplier=noise
        )
        return NoisySum.of(noise_multiplier=noise, clip_norm=2.0, step=scale.step, largest=scale.largest)

    noise = noise_multiplier_for(epsilon, DELTA, rounds, sum_with)
    assert epsilon_of([sum_with(noise)] * rounds, DELTA) <= epsilon
    assert epsilon_of([sum_with(noise * 0.98)] * rounds, DELTA) > epsilon
    # By hand, from Renyi divergence a / (2 z^2) and the simplest conversion, which is a little weaker.
    order = 1 + noise * sqrt(2 * log(1 / DELTA) / rounds)
    by_hand = rounds * order / (2 * noise**2) + log(1 / DELTA) / (order - 1)
    assert epsilon < by_hand < 1.35 * epsilon


def test_what_a_budget_pays_for_is_what_fits() -> None:
    each, other = SUMS[0], SUMS[4]
    limit = epsilon_of({each: 7, other: 2}, DELTA)
    assert affordable([other, other], each, limit, DELTA, at_most=100) == 7
    assert affordable([other, other], each, limit, DELTA, at_most=5) == 5
    assert affordable([other] * 60, each, limit, DELTA, at_most=100) == 0
    assert affordable([], each, limit, DELTA, at_most=0) == 0
    assert within({each: 7, other: 2}, DELTA, limit)
    assert not within({each: 8, other: 2}, DELTA, limit)


def test_no_noise_is_enough_for_no_epsilon() -> None:
    with pytest.raises(TermsError, match="100000 rounds do not stay within epsilon 1e-06"):
        noise_multiplier_for(
            1e-6, 1e-9, 100_000, lambda noise: NoisySum(noise=30.0, norm=30 / noise, largest=0.1)
        )
