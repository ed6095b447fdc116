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
from math import ceil, floor, log10, sqrt
from typing import Final

import numpy as np

from privacy.errors import TermsError
from privacy.rounded_sum import ORDERS, NoisySum, divergences

_MAX_NOISE: Final = 1e4
"""In units of the clip norm; more drowns any update."""


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
    """Epsilon of all rounds together.

    Args:
        rounds: In any order, or how many there are of each. Devices need not take part in all; no amplification by sampling is claimed.
        delta: In (0, 1).

    Returns:
        An upper bound, by Renyi differential privacy; 0 for no rounds.

    Raises:
        ValueError: If delta is out of its range.
    """
    from dp_accounting.rdp import compute_epsilon

    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} must be in (0, 1)")
    total = np.zeros(len(ORDERS))
    for each, times in Counter(rounds).items():
        total += times * divergences(each)
    if not total.any():
        return 0.0
    usable = np.isfinite(total)
    return float(compute_epsilon(np.array(ORDERS)[usable], total[usable], delta)[0])


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
        return epsilon_of(spent + Counter({each: more}), delta) <= epsilon

    if at_most <= 0 or fits(at_most):
        return max(0, at_most)
    return bisect_left(range(at_most), True, key=lambda more: not fits(more + 1))


def noise_multiplier_for(
    epsilon: float, delta: float, rounds: int, sum_with: Callable[[float], NoisySum], digits: int = 4
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

    def fits(noise: float) -> bool:
        return epsilon_of({sum_with(noise): rounds}, delta) <= epsilon

    high = 1.0
    while not fits(high):
        high *= 2
        if high > _MAX_NOISE:
            raise TermsError(
                f"{rounds} rounds do not stay within epsilon {epsilon:g} at delta {delta:g} with any noise up to "
                f"{_MAX_NOISE:g} clip norms: allow a larger epsilon or fewer rounds"
            )
    low = high / 2
    while fits(low):
        low, high = low / 2, low
    while high / low > 1 + 10.0**-digits:
        middle = sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    unit = 10.0 ** (floor(log10(high)) + 1 - digits)
    noise = ceil(high / unit) * unit
    return float(f"{noise if fits(noise) else noise + unit:.{digits - 1}e}")
