"""Epsilon of what was spent, and the noise that a target epsilon needs.

The mechanism is the Poisson-subsampled Gaussian: each sample (for client-level privacy: each device) enters a step with
probability ``sample_rate``, independently of all others, and the sum of what entered, each of norm at most C, gets
Gaussian noise of standard deviation ``noise_multiplier * C``. Neighbouring data sets differ by one sample, added or
removed; both directions are accounted for.

Two upper bounds on the same epsilon:

* Renyi differential privacy (Mironov, Talwar, Zhang 2019, "Renyi Differential Privacy of the Sampled Gaussian
  Mechanism", section 3.3; converted to epsilon by Canonne, Kamath, Steinke 2020, proposition 12). Milliseconds.
* Privacy loss distributions (Doroshenko et al. 2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss
  Distributions"), rounded pessimistically. Usually 5 to 15 % lower.

So either may be held against a limit; the tighter one is asked only when the faster one says no. The Gaussian
approximation by the central limit theorem (GDP) is left out: it is no upper bound, and it was found below the truth.

dp-accounting does the mathematics. It is imported late: with scipy it takes 40 MB, which an idle agent need not.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from privacy.errors import OverBudgetError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

RATE_DIGITS, NOISE_DIGITS = 3, 4
"""Significant digits of sampling rates and of derived noise: rounds that coincide are accounted for together."""

RDP_ORDERS = (2.0, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, *map(float, range(6, 33)), 40.0, 48.0, 64.0, 96.0, 128.0, 256.0, 512.0)  # fmt: skip
"""Orders at which Renyi divergences are computed. No fractions below 2.75: there the library's series may not converge."""

HOPELESS_EPSILON = 200.0
"""By RDP; beyond it nothing is protected, and the exact value is not worth the memory that a PLD would take."""

MOST_PLD_STEPS = 10**6
"""Of more steps together only RDP is computed: the bins of a PLD would take hundreds of megabytes."""

NO_NOISE = 1e-6
"""Noise multipliers below it count as none: epsilon is infinite."""

MIN_NOISE, MAX_NOISE = 0.1, 1e5
"""Range of derived noise multipliers. At 0.1 a single step already has an epsilon above 40; 1e5 drowns any gradient."""

_TINY, _HUGE = 1e-12, 1e300
"""Stand for no epsilon and for an infinite one where a logarithm is taken: delta alone may cover a mechanism."""

_PLD_STEP = 0.03
"""Width of a PLD's bins in units of min(epsilon, sqrt(epsilon)) / sqrt(steps). What rounding adds to epsilon was measured to be
about steps * width^2 * max(1, 0.6 / epsilon), so it stays below 0.1 % at this one."""

_NEAR = 2.0
"""The bins need an epsilon to begin with. One that is as close as this factor is good enough; RDP may be far off."""

_MAX_PLD_BINS = 2**20
_TAIL_SIGMAS = 12.0
"""Bins reach as far as the noise does with all but e^-50 of its probability, and a little further."""


@dataclass(frozen=True, slots=True, order=True)
class Spend:
    """Steps of one mechanism.

    Attributes:
        noise_multiplier: Standard deviation of the noise on a step's sum, in units of the clip norm.
        sample_rate: Probability with which a sample enters a step; 1 claims no amplification by sampling.
        steps: How many.

    Raises:
        ValueError: If a value is out of its range.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 < self.noise_multiplier < math.inf and 0 < self.sample_rate <= 1 and self.steps >= 0):
            raise ValueError(
                f"noise_multiplier {self.noise_multiplier} must be positive, sample_rate {self.sample_rate} in (0, 1], "
                f"and steps {self.steps} not negative"
            )


def epsilon_rdp(spends: Iterable[Spend], delta: float) -> float:
    """Epsilon of all spends together, by Renyi differential privacy.

    Args:
        spends: In any order; composition is adaptive, so later ones may depend on the outcome of earlier ones.
        delta: In (0, 1).

    Returns:
        An upper bound; 0 if nothing was spent, infinity if there is none.
    """
    from dp_accounting.rdp import compute_epsilon

    _check_delta(delta)
    segments = merged(spends)
    if not segments:
        return 0.0
    total = [0.0] * len(RDP_ORDERS)
    for segment in segments:
        curve = _rdp_curve(segment.noise_multiplier, segment.sample_rate)
        total = [before + segment.steps * value for before, value in zip(total, curve, strict=True)]
    return float(compute_epsilon(RDP_ORDERS, total, delta)[0])


def epsilon_pld(spends: Iterable[Spend], delta: float) -> float:
    """Epsilon of all spends together, by privacy loss distributions: the figure to report.

    Args:
        spends: As for :func:`epsilon_rdp`.
        delta: In (0, 1).

    Returns:
        An upper bound, never above that of :func:`epsilon_rdp`.
    """
    segments = merged(spends)
    fast = epsilon_rdp(segments, delta)
    if not 0 < fast < HOPELESS_EPSILON or sum(segment.steps for segment in segments) > MOST_PLD_STEPS:
        return fast
    tight, assumed = 0.0, math.inf
    while assumed > _NEAR * (tight or fast):
        assumed = tight or fast
        tight = _composed_epsilon(segments, delta, _bin_width(segments, assumed))
    return min(fast, tight)


def within(spends: Iterable[Spend], delta: float, epsilon: float) -> bool:
    """Whether spends stay within a limit: RDP is asked first, and PLD only if RDP says no.

    Args:
        spends: As for :func:`epsilon_rdp`.
        delta: In (0, 1).
        epsilon: The limit.
    """
    spends = merged(spends)
    return epsilon_rdp(spends, delta) <= epsilon or epsilon_pld(spends, delta) <= epsilon


def noise_multiplier_for(
    epsilon: float, delta: float, so_far: Iterable[Spend], sample_rate: float, steps: int
) -> float:
    """The least noise with which so many more steps fit into a budget, together with what is spent already.

    Args:
        epsilon: The budget, for all spends together.
        delta: In (0, 1).
        so_far: What is spent already.
        sample_rate: Of the steps to come.
        steps: To come.

    Returns:
        A noise multiplier with :data:`NOISE_DIGITS` significant digits, rounded up; :data:`MIN_NOISE` at least.

    Raises:
        OverBudgetError: If no noise is enough: what is spent already leaves nothing.
    """
    from scipy.optimize import brentq

    spent = merged(so_far)

    def fits(noise: float) -> bool:
        return within((*spent, Spend(noise, sample_rate, steps)), delta, epsilon)

    high = 1.0
    while not fits(high):
        high *= 2
        if high > MAX_NOISE:
            used = epsilon_pld(spent, delta)
            raise OverBudgetError(
                f"epsilon {used:.3g} of {epsilon:g} is spent (delta {delta:g}), and {steps} more steps at sampling "
                f"rate {sample_rate:g} do not fit with any noise",
                spent=used,
                limit=epsilon,
            )
    low = high / 2
    while low > MIN_NOISE and fits(low):
        low, high = low / 2, low
    if low <= MIN_NOISE and fits(MIN_NOISE):
        return MIN_NOISE

    def excess(log_noise: float) -> float:
        tried = epsilon_pld((*spent, Spend(math.exp(log_noise), sample_rate, steps)), delta)
        return math.log(min(max(tried, _TINY), _HUGE) / max(epsilon, _TINY))

    # Epsilon is nearly a power of the noise, so a few steps of a root finder suffice.
    digit = 10.0 ** (1 - NOISE_DIGITS)
    root = brentq(excess, math.log(max(low, MIN_NOISE)), math.log(high), xtol=digit / 4)
    noise = snapped_up(math.exp(root), NOISE_DIGITS)
    while not fits(noise):  # by the tolerance of the root, and since the bins of a PLD depend on the noise
        noise = snapped_up(noise * (1 + digit), NOISE_DIGITS)
    return noise


def merged(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Equal mechanisms as one, without those of no steps, in a fixed order."""
    steps: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        steps[spend.noise_multiplier, spend.sample_rate] += spend.steps
    return tuple(sorted(Spend(noise, rate, count) for (noise, rate), count in steps.items() if count))


def snapped_up(value: float, digits: int = RATE_DIGITS) -> float:
    """The next larger number with so many significant digits, or ``value`` itself if it has no more.

    What is rounded up is used in training as it is: what is accounted for is what is done.
    """
    near = float(f"{value:.{digits - 1}e}")
    if near >= value:
        return near
    step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{near + step:.{digits - 1}e}")


@lru_cache(maxsize=4096)
def _rdp_curve(noise_multiplier: float, sample_rate: float) -> tuple[float, ...]:
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    if noise_multiplier < NO_NOISE:
        return (math.inf,) * len(RDP_ORDERS)
    accountant = RdpAccountant(RDP_ORDERS)
    step = GaussianDpEvent(noise_multiplier)
    accountant.compose(step if sample_rate == 1 else PoissonSampledDpEvent(sample_rate, step))
    return tuple(float(value) for value in accountant.rdp)


def _composed_epsilon(segments: tuple[Spend, ...], delta: float, width: float) -> float:
    total = _composed(segments[0], width)
    for segment in segments[1:]:
        total = total.compose(_composed(segment, width))
    return float(total.get_epsilon_for_delta(delta))


def _bin_width(segments: tuple[Spend, ...], epsilon: float) -> float:
    """A power of two, so that the distributions of earlier calls can be used again."""
    steps = sum(segment.steps for segment in segments)
    widest = max(
        1 / (2 * segment.noise_multiplier**2) + _TAIL_SIGMAS / segment.noise_multiplier
        for segment in segments
    )
    width = max(_PLD_STEP * min(epsilon, math.sqrt(epsilon)) / math.sqrt(steps), 2 * widest / _MAX_PLD_BINS)
    return float(2.0 ** math.floor(math.log2(width)))


@lru_cache(maxsize=32)
def _composed(segment: Spend, width: float) -> "PrivacyLossDistribution":
    return _one_step(segment.noise_multiplier, segment.sample_rate, width).self_compose(segment.steps)


@lru_cache(maxsize=16)
def _one_step(noise_multiplier: float, sample_rate: float, width: float) -> "PrivacyLossDistribution":
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        standard_deviation=noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=width
    )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} must be in (0, 1)")
