"""Integer noise whose sum over devices is again of the same kind: Skellam's distribution, the difference of two Poissons.

With variance v::

    P(k) = exp(-v) I_k(v)         I_k: modified Bessel function of the first kind

and a sum of independent ones is Skellam with the sum of the variances. So the sum of what the devices add has a known law
however many they are, which discrete Gaussian noise lacks (Agarwal, Kairouz and Liu 2021, The Skellam Mechanism for
Differentially Private Federated Learning, section 3).
"""

import os
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext
from math import asinh, hypot, isfinite
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

Entropy = Callable[[int], bytes]
"""So many random bytes, from a source that nobody can predict."""

MAX_VARIANCE: Final = 2.0**20
"""Of noise that is drawn: its table takes a second then."""

_BITS: Final = 128
_GUIDE_BITS: Final = 16
_REST_BYTES: Final = (_BITS - _GUIDE_BITS) // 8
_DIGITS: Final = 60
"""Decimal digits: 2^-128 needs 39."""

_TAIL_NATS: Final = (_BITS + 2) * 0.6932
"""Minus the logarithm of 2^-130, what is left beyond the table on one side."""

_KEY_BYTES: Final = 32
_NONCE: Final = bytes(16)
"""Zero: a key is used for one stream."""

_MIXED: Final = np.iinfo(np.int32).min


class Skellam:
    """Draws integers of mean 0, unpredictable, from the exact law up to 2^-115 in total variation.

    Inversion: a uniform u of 128 bits becomes the k with F(k - 1) <= u < F(k), F the cumulative distribution in
    units of 2^-128. Its first 16 bits mostly tell k already; only where F crosses one of those 65,536 cells are the other 112
    drawn and compared. About 10 ns a value. Which values take longer depends on the noise alone, and only on the 16 bits.

    Args:
        variance: Above 0, at most ``MAX_VARIANCE``.

    Raises:
        ValueError: If it is not.
    """

    def __init__(self, variance: float) -> None:
        if not 0 < variance <= MAX_VARIANCE:
            raise ValueError(f"the variance {variance:g} is not above 0 and at most {MAX_VARIANCE:g}")
        self.variance = variance
        self.reach = _reach(variance, _TAIL_NATS)
        self._edges = _cumulative(variance, self.reach)
        rest = _BITS - _GUIDE_BITS
        cells = np.arange(1 << _GUIDE_BITS)
        # A cell c holds u from c 2^112 on: as many edges lie at or below its start, and at or below its end.
        below_start = np.searchsorted([-(-edge >> rest) for edge in self._edges], cells, side="right")
        below_end = np.searchsorted([edge >> rest for edge in self._edges], cells, side="right")
        guide = np.where(below_start == below_end, below_start - self.reach, _MIXED)
        self._guide = guide.astype(np.int32)

    def sample(self, count: int, entropy: Entropy | None = None) -> NDArray[np.int32]:
        """Independent integers, shape ``(count,)``, of magnitude at most ``reach``: 14 deviations where they are many.

        Args:
            count: How many.
            entropy: By default a new :func:`keystream`.
        """
        entropy = entropy or keystream()
        first = np.frombuffer(entropy(2 * count), dtype="<u2")
        values: NDArray[np.int32] = self._guide[first]
        mixed = np.flatnonzero(values == _MIXED)
        rest = entropy(_REST_BYTES * mixed.size)
        for number, at in enumerate(mixed):
            low = int.from_bytes(rest[_REST_BYTES * number : _REST_BYTES * (number + 1)], "big")
            uniform = int(first[at]) << (_BITS - _GUIDE_BITS) | low
            values[at] = bisect_right(self._edges, uniform) - self.reach
        return values


def keystream() -> Entropy:
    """ChaCha20 under a new key of the operating system's: as unpredictable as its own generator, and several times faster."""
    stream = Cipher(ChaCha20(os.urandom(_KEY_BYTES), _NONCE), mode=None).encryptor()
    return lambda count: stream.update(bytes(count))


def log_pmf(variance: float, reach: int) -> NDArray[np.float64]:
    """Logarithms of P(0), ..., P(reach); P(-k) = P(k).

    By the continued fraction of ``I_k / I_{k-1} = 1 / (2 k / v + I_{k+1} / I_k)``, from far beyond ``reach`` downwards: no
    Bessel function overflows or vanishes.

    Args:
        variance: Above 0.
        reach: At least 0.
    """
    if not (variance > 0 and isfinite(variance)):
        raise ValueError(f"the variance {variance:g} is not above 0 and finite")
    beyond = max(reach, _reach(variance, _TAIL_NATS)) + 64
    ratios = np.empty(beyond)
    ratio = 0.0
    for k in range(2 * beyond, 0, -1):
        ratio = 1 / (2 * k / variance + ratio)
        if k <= beyond:
            ratios[k - 1] = ratio
    logs = np.concatenate(([0.0], np.cumsum(np.log(ratios))))
    total = 2 * np.exp(logs).sum() - 1
    return np.asarray(logs[: reach + 1] - np.log(total), dtype=np.float64)


def _reach(variance: float, nats: float) -> int:
    """The least k, up to a few, with P(Z >= k) <= exp(-nats), by Chernoff's bound.

    ``log E exp(h Z) = v (cosh h - 1)``, so ``log P(Z >= k) <= v (cosh h - 1) - h k``, best at ``h = asinh(k / v)``.
    """
    low, high = 0, 1

    def enough(k: int) -> bool:
        return k * asinh(k / variance) - (hypot(k, variance) - variance) >= nats

    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _cumulative(variance: float, reach: int) -> list[int]:
    """``floor(2^128 F(k))`` for k from -reach to reach - 1, in increasing order.

    Miller's backward recurrence ``I_{k-1} = I_{k+1} + (2 k / v) I_k``, normalised by the sum, in decimal arithmetic of 60 digits.
    """
    with localcontext() as context:
        context.prec = _DIGITS
        exact = Decimal(variance)
        start = 2 * reach + 64
        values = [Decimal(0)] * (start + 2)
        values[start] = Decimal(1)
        for k in range(start, 0, -1):
            values[k - 1] = values[k + 1] + (2 * k / exact) * values[k]
        total = values[0] + 2 * sum(values[1:])
        scale = Decimal(1 << _BITS) / total
        running = sum(values[reach + 1 :])
        edges = []
        for k in range(-reach, reach):
            running += values[abs(k)]
            edges.append(int(running * scale))
        return edges
