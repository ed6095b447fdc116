"""Distributed differential privacy: each device adds a part of the noise, so that the sum has enough of it.

Under secure aggregation nobody sees a single update, so no device needs the whole noise by itself, and nobody is trusted to
add it. Of n devices n' are assumed to be left at the end, so each adds Skellam noise of variance ``(z C / g)^2 / n'`` to its
integers: any n' of them together have the deviation z C. If more are left, there is more noise than needed.

The guarantee is against whoever sees only sums of n' devices or more: the aggregator, the other devices, everybody who gets the model.
Devices that tell the aggregator what they have added take their noise away from the sum; choose n' without them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import ceil, floor, inf, log10, sqrt
from typing import Final

import numpy as np

from privacy.errors import TermsError
from privacy.rounded_sum import ORDERS, NoisySum, divergences
from privacy.saddle_point import tighter_epsilon

_MAX_NOISE: Final = 1e4
"""In units of the clip norm; more drowns any update."""

_AT_LEAST: Final = 0.85
"""Share of the noise by the faster bound that the tighter one needs."""


def least_agents(agents: int, dropouts: float) -> int:
    """n': devices that must be left when the assumed share has dropped out, at least 1. No smaller sum may be unmasked.

    Args:
        agents: Of the cohort.
        dropouts: 0 to 1, excluded.
    """
    return max(1, agents - floor(agents * dropouts))


def least_survivors(min_agents: int, *, agents: int, dropouts: float, noise_multiplier: float) -> int:
    """Least devices whose sum may be opened: as many as were promised, and under noise as many as give enough of it.

    Args:
        min_agents: That were promised.
        agents: Of the cohort.
        dropouts: Share of the cohort that may drop out.
        noise_multiplier: 0 for no noise.
    """
    return max(min_agents, least_agents(agents, dropouts)) if noise_multiplier else min_agents


def share_variance(
    *, noise_multiplier: float, clip_norm: float, step: float, agents: int, dropouts: float
) -> float:
    """Variance of the Skellam noise that one device adds, in squared steps: ``(z C / g)^2 / n'``.

    Args:
        noise_multiplier: z.
        clip_norm: C.
        step: g.
        agents: n: of the cohort.
        dropouts: Share of the cohort that may drop out.
    """
    return (noise_multiplier * clip_norm / step) ** 2 / least_agents(agents, dropouts)


def epsilon_of(rounds: Iterable[NoisySum] | Mapping[NoisySum, int], delta: float) -> float:
    """Epsilon of all rounds together: the figure to report, a tenth of a second for each new kind of round.

    Args:
        rounds: In any order, or how many there are of each. Devices need not take part in all; no amplification by sampling
            is claimed.
        delta: In (0, 1).

    Returns:
        An upper bound, never above :func:`epsilon_rdp`; 0 for no rounds.

    Raises:
        ValueError: If delta is out of its range.
    """
    counts = Counter(rounds)
    by_rdp = epsilon_rdp(counts, delta)
    return tighter_epsilon(counts, delta, by_rdp) if 0 < by_rdp < inf else by_rdp


def epsilon_rdp(rounds: Iterable[NoisySum] | Mapping[NoisySum, int], delta: float) -> float:
    """The same by Renyi differential privacy: faster, and 8 % more."""
    from dp_accounting.rdp import compute_epsilon

    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} must be in (0, 1)")
    total = np.zeros(len(ORDERS))
    for each, times in Counter(rounds).items():
        if times:
            total += times * divergences(each)
    if not total.any():
        return 0.0
    usable = np.isfinite(total)
    return float(compute_epsilon(np.array(ORDERS)[usable], total[usable], delta)[0])


def within(rounds: Iterable[NoisySum] | Mapping[NoisySum, int], delta: float, epsilon: float) -> bool:
    """Whether rounds stay within a limit: the faster bound is asked first, and the tighter one only if that says no."""
    counts = Counter(rounds)
    return epsilon_rdp(counts, delta) <= epsilon or epsilon_of(counts, delta) <= epsilon


def affordable(
    so_far: Iterable[NoisySum], each: NoisySum, epsilon: float, delta: float, *, at_most: int
) -> int:
    """How many more rounds a budget pays for.

    Args:
        so_far: That were paid for.
        each: What one more round costs.
        epsilon: The budget.
        delta: In (0, 1).
        at_most: Rounds that are wanted.

    Returns:
        The largest number up to ``at_most`` with which the whole stays within epsilon.
    """
    spent = Counter(so_far)

    def fits(more: int) -> bool:
        return within(spent + Counter({each: more}), delta, epsilon)

    if at_most <= 0 or fits(at_most):
        return max(0, at_most)
    return bisect_left(range(at_most), True, key=lambda more: not fits(more + 1))


def noise_multiplier_for(
    epsilon: float, delta: float, rounds: int, sum_with: Callable[[float], NoisySum], digits: int = 3
) -> float:
    """The least noise with which so many rounds stay within epsilon.

    Args:
        epsilon: The budget.
        delta: In (0, 1).
        rounds: At least 1.
        sum_with: From a noise multiplier to the sum that a round then has: the step depends on the noise.
        digits: Significant ones of the result, which is rounded up.

    Raises:
        TermsError: If no noise is enough.
    """
    high = 1.0
    while epsilon_rdp({sum_with(high): rounds}, delta) > epsilon:
        high *= 2
        if high > _MAX_NOISE:
            raise TermsError(
                f"{rounds} rounds do not stay within epsilon {epsilon:g} at delta {delta:g} with any noise up to "
                f"{_MAX_NOISE:g} clip norms: allow a larger epsilon or fewer rounds"
            )

    def least(fits: Callable[[float], bool], low: float, high: float) -> float:
        while fits(low):
            low, high = low / 2, low
        while high / low > 1 + 10.0**-digits:
            middle = sqrt(low * high)
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    # The faster bound brings it near: the tighter one needs up to a tenth less noise.
    near = least(lambda noise: epsilon_rdp({sum_with(noise): rounds}, delta) <= epsilon, high / 2, high)
    high = least(lambda noise: within({sum_with(noise): rounds}, delta, epsilon), _AT_LEAST * near, near)
    unit = 10.0 ** (floor(log10(high)) + 1 - digits)
    return float(f"{ceil(high / unit) * unit:.{digits - 1}e}")
