"""Epsilon of many rounded sums together, without the 8 % that are lost on the way through Renyi divergences.

Let L be the privacy loss, ``log P_x / P`` under P_x, summed over all coordinates and rounds, and M(z) = E exp(z L). By the inverse
Laplace transform of ``max(0, 1 - exp(-w))``, which is ``1 / (z (z + 1))``, for any a > 0 and z = a + i u::

    delta(epsilon) = 1 / (2 pi) integral of M(z) exp(-epsilon z) / (z (1 + z)) du
                  <= 1 / pi     integral over u >= 0 of abs(M(z)) exp(-epsilon a) / (abs(z) abs(1 + z)) du

(Alghamdi et al. 2023, The Saddle-Point Method in Differential Privacy). For a Gaussian loss and the best a, the path through the
saddle point, the phases that the absolute value drops are nearly 0, and little is lost: 0.2 % of epsilon. All coordinates are
independent, so with ``k(z) = sup over 0 < x <= B of log(abs(M_x(z))) / x^2`` a round has ``log(abs(M(z))) <= N^2 k(z)``, whatever the
update was. As in :mod:`privacy.rounded_sum`, rounding is part of the mechanism, and both directions are looked at::

    M_x(z) = E_P[(P_x / P)^(1 + z)]          M_x(z) = E_P[(P_x / P)^(-z)]

The supremum is taken over points x that are dense against the scale on which it changes; between them it may be higher by what a
parabola through three of them rises, times two. For frequencies u at which it changes faster than that, or at which P's being
integers could show, ``abs(M(z)) <= M(a)`` is all that is used.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import ceil, inf, log, pi
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privacy.rounded_sum import NoisySum, Shifts

HEIGHTS: Final = np.geomspace(0.2, 400.0, 96)
"""a: the one is taken that gives the least epsilon."""

_FREQUENCIES: Final = np.concatenate(([0.0], np.geomspace(5e-3, 2e5, 1000)))
"""u: neighbours differ by 1.8 %, by half of which sums from the left overestimate the integral: less than 0.1 % of epsilon."""

_WIDTHS: Final = 12.0
"""The integrand of a Gaussian loss of deviation m has fallen by exp(-72) at ``12 / m``; further on, points may lie apart."""

_APART: Final = 16
_CELLS: Final = 12
"""Of x in (0, min(B, 1)]; beyond 1, points are a quarter of x apart, but no more than 1."""

_TURN: Final = 1.5
"""Radians by which the phase of one deviation of the noise may change between neighbouring x."""

_FINE: Final = 8.0
"""Points in a deviation of the noise that give sums over k: those of every m-th k, times m, differ by ``exp(-2 pi^2 8^2)`` (Poisson's
summation)."""

_OF_RDP: Final = 0.95
"""Share of the epsilon by RDP at which the search begins."""

_NUMERIC: Final = 1e-13
"""More than the rounding errors of a sum, as a share of it."""

_LEAST_TERM: Final = -48.0
"""Logarithm of what is left out of sums, against their largest term."""


def tighter_epsilon(rounds: Mapping[NoisySum, int], delta: float, epsilon_by_rdp: float) -> float:
    """An upper bound of epsilon.

    Args:
        rounds: How many there are of each; at least one.
        delta: In (0, 1).
        epsilon_by_rdp: Another upper bound, by Renyi divergences.

    Returns:
        The smaller of the two.
    """

    def at(index: int) -> float:
        if not 0 <= index < HEIGHTS.size:
            return inf
        if index not in known:
            known[index] = _epsilon_at_height(rounds, delta, index)
        return known[index]

    known: dict[int, float] = {}
    # Where the loss is Gaussian of variance V, the saddle point is epsilon / V - 1 / 2, with epsilon between V / 2 and that by RDP.
    variance = sum(count * (each.norm / each.noise) ** 2 for each, count in rounds.items())
    guess = _OF_RDP * epsilon_by_rdp / variance - 0.5
    index = min(int(np.searchsorted(HEIGHTS, guess)), HEIGHTS.size - 1)
    step = 2
    while step:
        best = min((index, index - step, index + step), key=at)
        index, step = (best, step) if best != index else (index, step // 2)
    return max(0.0, min(at(index), epsilon_by_rdp))


def _epsilon_at_height(rounds: Mapping[NoisySum, int], delta: float, index: int) -> float:
    height = float(HEIGHTS[index])
    logs = np.zeros(_FREQUENCIES.size)
    for each, count in rounds.items():
        logs += count * each.norm**2 * _suprema(each, index)
    peak = logs[0]
    u2 = _FREQUENCIES**2
    logs -= peak + (np.log(height**2 + u2) + np.log((1 + height) ** 2 + u2)) / 2
    falling = np.exp(np.maximum.accumulate(logs[::-1])[::-1])
    # Sums from the left, as what is integrated falls; beyond the last point abs(M(z)) <= M(a), and 1 / u^2.
    integral = float(np.sum(np.diff(_FREQUENCIES) * falling[:-1])) + 1 / float(_FREQUENCIES[-1])
    return float(peak + log(integral / pi) - log(delta)) / height


@lru_cache(maxsize=512)
def _suprema(each: NoisySum, index: int) -> NDArray[np.float64]:
    """``k(a + i u)`` for all frequencies."""
    height = float(HEIGHTS[index])
    places = _places(each.largest)
    trusted = min(2 * each.noise**2 / max(1.0, each.largest), _TURN * each.noise / np.diff(places).max())
    far = int(np.searchsorted(_FREQUENCIES, _WIDTHS * each.noise / each.norm))
    end = max(2, int(np.searchsorted(_FREQUENCIES, trusted)))
    kept = np.unique(
        np.concatenate((np.arange(min(far, end)), np.arange(min(far, end), end, _APART), [end - 1]))
    )
    law = Shifts(each, np.array([1 + height]))
    limit = law.square_of_ratio() * (height * (height + 1) - _FREQUENCIES[kept] ** 2) / 2
    highest = np.full(kept.size, -inf)
    for exponent in (1 + height, -height):
        rows = np.array(
            [limit, *(_log_magnitudes(law, x, exponent, _FREQUENCIES[kept]) / x**2 for x in places[1:])]
        )
        bend = np.zeros_like(rows)
        bend[1:-1] = np.abs(np.diff(rows, 2, axis=0)) / 4
        bend[0], bend[-1] = bend[1], bend[-2]
        highest = np.maximum(highest, (rows + bend).max(axis=0))
    highest = np.minimum(highest, highest[0])
    result = np.full(_FREQUENCIES.size, highest[0])
    falling = np.maximum.accumulate(highest[::-1])[::-1]
    result[:end] = falling[np.searchsorted(kept, np.arange(end), side="right") - 1]
    result.flags.writeable = False
    return result


def _log_magnitudes(
    law: Shifts, x: float, exponent: float, frequencies: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``log(abs(E_P[(P_x / P)^(exponent + i u)]))``."""
    stride = max(1, int(law.noise // _FINE))
    base, ratios = (values[::stride] for values in law.log_ratios(x))
    weights = base + exponent * ratios
    peak = weights.max()
    counts = weights > peak + _LEAST_TERM
    size, phases = np.exp(weights[counts] - peak), ratios[counts]
    sums = np.array([abs(np.dot(np.exp(1j * u * phases), size)) for u in frequencies])
    return np.asarray(peak + np.log(stride * np.maximum(sums, _NUMERIC * size.sum())))


def _places(largest: float) -> NDArray[np.float64]:
    """0, and the x at which the supremum is taken, ascending up to ``largest``."""
    places = np.linspace(0, min(largest, 1.0), _CELLS + 1).tolist()
    for whole in range(1, ceil(largest)):
        cells = ceil(4 / whole)
        places += [min(whole + part / cells, largest) for part in range(1, cells + 1)]
    return np.unique(places)
