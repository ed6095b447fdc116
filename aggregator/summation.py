"""Sums that do not depend on the order of their terms, so that updates may be added as they arrive."""

from math import frexp

import numpy as np
from numpy.typing import NDArray

from federation.wire.fields import MAX_COHORT

_WIDTH = 40
"""Bits between two grids. A sum of 2^12 slices (``MAX_COHORT``) of at most 2^39 grid steps stays below 2^53: exact."""

_BLOCK = 1 << 15
"""Values added at a time: the temporaries of a block stay in a small processor's second-level cache."""

assert MAX_COHORT * 2 ** (_WIDTH - 1) < 2**53


class OrderFreeSum:
    """A sum of float64 arrays whose bits are the same in whatever order the terms come.

    Every term t is cut at fixed places of the binary point, into slices that are multiples of the grid steps
    ``q_j = 2^(40 j)`` (``R`` rounds to the nearest multiple, ties to even)::

        h = R(t, q_j)      l = R(t - h, q_{j-1})

    and the slices are summed grid by grid. Sums of multiples of one step are exact in float64 as long as they stay
    below ``2^53`` steps, and exact addition is associative. Only the two grids at the top are kept: ``j`` is the least
    with ``|t| < q_j / 2 * 2^40 `` for all terms so far. When a larger term raises it, the lower grid is dropped, just as it
    would have been had the larger term come first: a term below ``q_j / 2`` has nothing on grid ``j``. What is cut off
    a term is at most ``q_{j-1} / 2``: at least 2^40 times less than the largest magnitude of all terms.

    Source: Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013, and Ahrens, Demmel and Nguyen,
    "Algorithms for Efficient Reproducible Floating Point Summation", ACM TOMS 46(3), 2020: two bins (K = 2, W = 40).

    Args:
        shape: Of every term.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._top: int | None = None
        self._high = np.zeros(0)
        self._low = np.zeros(0)

    def add(self, values: NDArray[np.float32] | NDArray[np.float64], weight: float) -> None:
        """Add ``weight * values``, each product rounded once to float64; at most ``MAX_COHORT`` times.

        Args:
            values: Finite, of the shape; float32 or float64.
            weight: Finite.
        """
        flat = values.reshape(-1)
        if not flat.size:
            return
        peak = max(float(flat.max()), -float(flat.min())) * abs(weight)
        if not peak:
            return
        # The top grid is the least with peak < 2^exponent <= 2^39 of its steps.
        exponent = frexp(peak)[1]
        self._raise(-((_WIDTH - 1 - exponent) // _WIDTH))
        assert self._top is not None
        # Adding and subtracting 1.5 * 2^52 steps rounds to the nearest step (the spacing of float64 up there is one).
        high_shift, low_shift = (1.5 * 2.0 ** (52 + _WIDTH * grid) for grid in (self._top, self._top - 1))
        for at in range(0, flat.size, _BLOCK):
            block = slice(at, at + _BLOCK)
            term = np.multiply(flat[block], weight, dtype=np.float64)
            part = term + high_shift
            part -= high_shift
            self._high[block] += part
            term -= part
            term += low_shift
            term -= low_shift
            self._low[block] += term

    def value(self) -> NDArray[np.float64]:
        """The sum, rounded once to float64."""
        if self._top is None:
            return np.zeros(self._shape)
        total: NDArray[np.float64] = (self._high + self._low).reshape(self._shape)
        return total

    def _raise(self, top: int) -> None:
        if self._top is None:
            size = int(np.prod(self._shape, dtype=np.int64))
            self._high, self._low, self._top = np.zeros(size), np.zeros(size), top
        elif top > self._top:
            self._low, dropped = self._high, self._low
            if top > self._top + 1:
                self._low[:] = 0
            dropped[:] = 0
            self._high, self._top = dropped, top
