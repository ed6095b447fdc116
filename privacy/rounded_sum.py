"""What a sum of rounded vectors with Skellam noise costs: Renyi divergences computed from the noise itself.

A device holds a vector x of norm at most N, counted in steps, each coordinate of magnitude at most B. It rounds each coordinate
stochastically to a neighbouring integer, with the mean unchanged; the sum over all devices has Skellam noise of variance v
at least. Neighbouring federations differ by one device, whose vector is replaced by zero. What the others add is independent
of it, and so is what is done with the sum, the remainder by the modulus included: neither can cost more.

Rounding is part of the mechanism, not a step before it. Per coordinate, with P the law of the noise, the outcome for ``x = m + q``,
m whole and ``0 <= q <= 1``, is drawn from ``P_x = (1 - q) P(. - m) + q P(. - m - 1)``, and for zero from P. All coordinates are
independent, so the Renyi divergences of order a add up over them::

    D_a(P_x, P) = log E_P[(P_x / P)^a] / (a - 1)            D_a(P, P_x) = log E_P[(P_x / P)^(1 - a)] / (a - 1)
    K_a = sup over 0 < x <= B of either, over x^2           sum_j D_a(x_j) <= K_a sum_j x_j^2 <= K_a N^2

That is tighter than to charge for the norm after rounding (Kairouz, Liu and Steinke 2021, The Distributed Discrete Gaussian
Mechanism for Federated Learning with Secure Aggregation, section 4; Agarwal, Kairouz and Liu 2021, The Skellam Mechanism
for Differentially Private Federated Learning, theorem 3.5). Rounding may lengthen a vector of D coordinates to
``sqrt(N^2 + D / 4)``, by conditional rounding hardly more; but it does so with randomness of its own, which hides as well as noise
does. Here one step may be many times larger than a coordinate, and hence a byte is enough. Bao et al. 2022 (Skellam Mixture
Mechanism, PVLDB 15) account for rounding and noise together too.

K_a is computed from P itself, without asymptotics. It is never below the Gaussian's ``a / (2 v)``, by the inequality of
Hammersley, Chapman and Robbins.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, floor, inf, log
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privacy.skellam import log_pmf

ORDERS: Final = (
    *(1 + i / 10 for i in range(1, 11)),
    *(3 + i / 4 for i in range(28)),
    *map(float, range(10, 33)),
    *(36.0, 40.0, 48.0, 64.0, 80.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0),
)
"""At which divergences are computed. None between 2 and 3, where the convexity that the bound needs does not hold."""

_MODERATE_ORDER: Final = 24.0
_ORDERS_PER_NOISE: Final = 16.0
"""Larger orders are worth their time only for much noise: the best is near ``1 + z sqrt(2 log(1 / delta) / rounds)``."""

_CELLS: Final = 16
"""In which a unit of x is divided; with m, fewer are needed: errors are relative to x."""

_TAIL: Final = 14.0
"""Deviations beyond the largest shift over which P is summed."""

_NEGLIGIBLE: Final = 1e-14


@dataclass(frozen=True, slots=True)
class NoisySum:
    """What of a round's sum decides about privacy; everything in steps of the shared scale.

    Attributes:
        noise: Standard deviation of the noise in the sum, at least.
        norm: L2 norm of a device's update before rounding, at most.
        largest: Magnitude of a coordinate before rounding, at most.

    Raises:
        ValueError: If one of them is not positive.
    """

    noise: float
    norm: float
    largest: float

    def __post_init__(self) -> None:
        if not (0 < self.noise < inf and 0 < self.norm < inf and self.largest > 0):
            raise ValueError(
                f"noise {self.noise}, norm {self.norm} and largest {self.largest} must be positive"
            )

    @classmethod
    def of(cls, *, noise_multiplier: float, clip_norm: float, step: float, largest: float) -> "NoisySum":
        """From the terms of a plan and the scale that follows from them.

        Args:
            noise_multiplier: z: deviation of the noise that is promised, in units of the clip norm.
            clip_norm: C, in the units of the update.
            step: g, in the units of the update.
            largest: In steps.
        """
        norm = clip_norm / step
        return cls(noise_multiplier * norm, norm, min(largest, norm))


@lru_cache(maxsize=256)
def divergences(each: NoisySum) -> NDArray[np.float64]:
    """Bounds ``K_a N^2`` of a round's Renyi divergences, for all :data:`ORDERS`; infinite where none was computed.

    For ``0 < x <= 1``: with ``y = P(k - 1) / P(k) - 1``, of mean 0 under P, and an exponent e,

        ``g(x) = E_P[(1 + x y)^e] = 1 + x^2 h(x)``,   ``h(x) = E_P[y^2 f(x y)]``,   ``f(u) = ((1 + u)^e - 1 - e u) / u^2``

    where ``f(u) = e (e - 1) (integral of (1 - t) (1 + t u)^(e - 2) for t from 0 to 1)``, whose second derivative has the sign
    of ``e (e - 1) (e - 2) (e - 3)``. That is at least 0 for all exponents here, so h is convex: within a cell from a to c it is
    at most the larger of h(a) and h(c), and ``log(1 + x^2 h) / x^2`` at most what it is with that at a. ``h(0) = e (e - 1) / 2
    E_P[y^2]``.

    For ``m < x <= m + 1``: g is convex too, as a power of what is linear in q. Within a cell from a to c it lies below its chord;
    the logarithm of that is above the chord of the logarithms by ``log(g(c) / g(a))^2 / 8`` at most (Hoeffding's lemma), and the
    chord of ``x^2`` above ``x^2`` by ``(c - a)^2 / 4``.
    """
    limit = max(_MODERATE_ORDER, _ORDERS_PER_NOISE * each.noise / each.norm)
    orders = np.array([order for order in ORDERS if order <= limit])
    law = Shifts(each, orders)
    worst = np.zeros(law.exponents.size)
    below = law.exponents * (law.exponents - 1) / 2 * law.square_of_ratio()
    for a, c in pairwise(np.linspace(0, min(each.largest, 1.0), _CELLS + 1)):
        above = np.expm1(law.log_moments(c)) / c**2
        highest = np.maximum(below, above)
        worst = np.maximum(worst, np.log1p(a**2 * highest) / a**2 if a else highest)
        below = above
    for a, c in pairwise(edges_beyond_one(each.largest)):
        below, above = law.log_moments(a), law.log_moments(c)
        slope = np.maximum(below / a**2, above / c**2)
        cell = slope * (1 + (c - a) ** 2 / (4 * a**2)) + (above - below) ** 2 / (8 * a**2)
        worst = np.maximum(worst, cell)
    both = np.maximum(worst[: orders.size], worst[orders.size :]) / (orders - 1)
    result = np.full(len(ORDERS), inf)
    result[: orders.size] = both * each.norm**2
    result.flags.writeable = False
    return result


class Shifts:
    """The law of the noise, and moments of its ratio to itself, shifted and rounded.

    Args:
        each: The sum.
        orders: Ascending.

    Attributes:
        exponents: The orders a, then 1 - a for each.
        noise: Deviation of P.
    """

    def __init__(self, each: NoisySum, orders: NDArray[np.float64]) -> None:
        self.exponents = np.concatenate((orders, 1 - orders))
        self.noise, self._shift = each.noise, ceil(each.largest) + 1
        # P^(1 - a) P(. - x)^a is a bell around a x.
        self._reach = ceil(orders[-1] * self._shift + _TAIL * each.noise) + ceil(_TAIL)
        self._tabulate()
        while self._cut_off(float(min(each.largest, self._shift - 1))):
            self._reach *= 2
            self._tabulate()

    def square_of_ratio(self) -> float:
        """``E_P[y^2]``."""
        return float((np.exp(self._at(0)) * np.expm1(self._at(1) - self._at(0)) ** 2).sum())

    def log_moments(self, x: float) -> NDArray[np.float64]:
        """``log E_P[(P_x / P)^e]`` for each exponent."""
        terms = self._terms(x)
        peaks = terms.max(axis=1)
        return np.asarray(peaks + np.log(np.exp(terms - peaks[:, np.newaxis]).sum(axis=1)))

    def _tabulate(self) -> None:
        half = log_pmf(self.noise**2, self._reach + self._shift)
        self._logs = np.concatenate((half[:0:-1], half))

    def _at(self, shift: int) -> NDArray[np.float64]:
        """``log P(k - shift)`` for k from -reach to reach."""
        start = self._shift - shift
        return self._logs[start : start + 2 * self._reach + 1]

    def log_ratios(self, x: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """``log P(k)`` and ``log P_x(k) / P(k)``, for all k in the table."""
        whole = floor(x)
        shifted = self._at(whole)
        if x > whole:
            part = x - whole
            shifted = np.logaddexp(np.log1p(-part) + shifted, log(part) + self._at(whole + 1))
        return self._at(0), shifted - self._at(0)

    def _terms(self, x: float) -> NDArray[np.float64]:
        base, ratios = self.log_ratios(x)
        return base + self.exponents[:, np.newaxis] * ratios

    def _cut_off(self, x: float) -> bool:
        """Whether what lies beyond the table might count."""
        terms = self._terms(x)
        ends = np.maximum(terms[:, 0], terms[:, -1])
        return bool((ends > terms.max(axis=1) + log(_NEGLIGIBLE)).any())


def edges_beyond_one(largest: float) -> list[float]:
    """From 1 to ``largest``, all whole numbers between them, and so many more that a cell is short against its place."""
    edges = [1.0] if largest > 1 else []
    for whole in range(1, ceil(largest)):
        cells = ceil(_CELLS / whole)
        edges += [min(whole + part / cells, largest) for part in range(1, cells + 1)]
    return sorted(set(edges))
