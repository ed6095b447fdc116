"""``sq``: stochastic rounding to a coarse grid, entropy-coded. The default."""

import struct
from math import inf, sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federation.errors import PeerError, Rejection
from federation.wire.encodings.gaps import GapReader, plane_bytes, write_gaps
from federation.wire.encodings.grid import INT8, round_stochastically
from federation.wire.encodings.protocol import (
    BLOCK,
    SMALLEST_NORMAL,
    Array,
    Coded,
    Parameters,
    Scheme,
    Values,
    check_scale,
    root_mean_square,
)

_LEVELS: Final = 127
_STEP: Final = struct.Struct("<f")

_FINEST: Final = 0.25
"""In units of the RMS: with a finer step, magnitudes are so large that ``int8`` is hardly longer, and faster."""


class SqScheme:
    """Integers from -127 to 127, most of them zero, times a step.

    The blob: the step (float32), the gaps between non-zero integers (:mod:`federation.wire.encodings.gaps`), the plane
    of their signs. Any order of the streams would do; the step is in the blob since it takes nine bytes in the header.
    """

    name = "sq"
    parameters = 0

    def max_bytes(self, count: int) -> int:
        """One byte a value, or else it would be sent as ``int8``."""
        return count

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:  # noqa: ARG002
        """Multiply the integers by the step."""
        codes, step = self.integers(blob, out.size)
        np.multiply(codes, step, out=out)

    def integers(self, blob: memoryview, count: int) -> tuple[NDArray[np.int8], np.float32]:
        """Give the integers as they were sent, shape ``(count,)``, and the step, without forming values.

        Raises:
            PeerError: ``malformed``, ``wrong_length`` or ``non_finite``.
        """
        if len(blob) < _STEP.size:
            raise PeerError(Rejection.WRONG_LENGTH, f"a blob of {len(blob)} bytes has no step")
        step = check_scale(_STEP.unpack_from(blob)[0], times=_LEVELS)
        gaps = GapReader(blob[_STEP.size :], count)
        signs_at = gaps.low_bytes
        if len(gaps.tail) != signs_at + plane_bytes(gaps.size):
            raise PeerError(
                Rejection.WRONG_LENGTH, f"{len(gaps.tail)} bytes after the gaps of {gaps.size} integers"
            )
        signs = np.unpackbits(np.frombuffer(gaps.tail[signs_at:], dtype=np.uint8), count=gaps.size)
        units = np.array([1, -1], dtype=np.int8)[signs]
        codes = np.zeros(count, dtype=np.int8)
        for first, positions, larger in gaps.values():
            codes[positions] = units[first : first + positions.size]
            if larger.size:
                _enlarge(codes, larger)
        return codes, step


def _enlarge(codes: NDArray[np.int8], larger: NDArray[np.int64]) -> None:
    positions, by = np.unique(larger, return_counts=True)
    old = codes[positions].astype(np.int64)
    new = old + by * np.sign(old)
    if not old.all() or int(np.abs(new).max()) > _LEVELS:
        raise PeerError(Rejection.MALFORMED, f"a magnitude without an integer, or one beyond {_LEVELS}")
    codes[positions] = new


class Sq:
    """Stochastic rounding to a grid of step ``c`` times the RMS of the tensor, entropy-coded.

    Unbiased: the expectation of what is decoded is the value, up to 2^-17 of a step (the resolution of the random
    numbers). The error of a value is below 1 + 2^-17 steps, and the variance for a value of a steps is f (1 - f)
    steps^2 with f the fraction of a; for |a| <= 1 and c >> 1 the sum over a tensor is about c E|x| / RMS - 1 times its
    squared norm (9 for c = 16). Errors of agents are independent and average out.

    Bits for each value, for the updates of a small CNN, whose E|x| is 0.63 RMS: 0.3 at c = 16, 1.3 at c = 2; never more
    than 8. Vectors (biases, normalisation: fewer than 2 dimensions) and tensors that gain nothing go as ``int8``.

    The grid is the optimal unbiased sparsification of Wangni et al. 2018 (Gradient sparsification for
    communication-efficient distributed optimization, section 3.1) where all |x| are below the step: the probability to
    be sent is proportional to the magnitude. Beyond that it is QSGD's rounding (Alistarh et al. 2017, section 3.1).

    Where the caller bounds the noise, the step is made as fine as it takes: ``step <= max(noise / E|x|, 2 sqrt(noise))``.
    In the first rounds, when updates are as large as the weights, a grid of 16 RMS would drown these: see
    ``federation.wire.noise``.

    Args:
        step: c, in units of the RMS. Larger is shorter and noisier.
    """

    name = "sq"
    stateful = False

    def __init__(self, step: float) -> None:
        self.spec = f"{self.name}:{step:g}"
        self._step = step

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Itself, and ``int8``."""
        return (SQ, INT8)

    def encode(
        self,
        array: Array,
        peak: float,
        rng: np.random.Generator,
        noise: float = inf,
    ) -> Coded:
        """Round to the grid and code the gaps, unless ``int8`` is not longer."""
        if not INT8.suits(array):
            values = array.reshape(-1)
            wide, quiet = root_mean_square(values, peak), _quiet_step(values, noise)
            # The largest magnitude stays on the grid, also of a tensor that is zero but for a few values.
            step = max(min(self._step * wide, quiet), peak / _LEVELS * (1 + 2.0**-22), SMALLEST_NORMAL)
            blob = _encode(values, np.float32(step), rng) if step >= _FINEST * wide else b""
            if 0 < len(blob) <= SQ.max_bytes(array.size):
                return Coded(SQ.name, (), blob)
        return INT8.encode(array, peak, rng)


def _encode(values: Values, step: np.float32, rng: np.random.Generator) -> bytes:
    found, units = [], []
    for at in range(0, values.size, BLOCK):
        codes = round_stochastically(values[at : at + BLOCK] / step, rng)
        here = np.flatnonzero(codes != 0)
        found.append(here + at)
        units.append(codes[here])
    positions, integers = np.concatenate(found), np.concatenate(units)
    magnitudes = np.abs(integers)
    largest = int(magnitudes.max(initial=0))
    gaps, low = write_gaps(positions, magnitudes if largest > 1 else None, values.size)
    return b"".join((_STEP.pack(step), gaps, low, np.packbits(integers < 0).tobytes()))


def _quiet_step(values: Values, noise: float) -> float:
    """The coarsest step whose variance stays within ``noise`` on average."""
    # With f the fraction of |x| / step, a value gets the variance f (1 - f) step^2, which is at most |x| step and at
    # most step^2 / 4: either of these steps keeps within the bound.
    return inf if noise == inf else max(noise / _mean_magnitude(values), 2.0 * sqrt(noise))


def _mean_magnitude(values: Values) -> float:
    blocks = range(0, values.size, BLOCK)
    total = sum(float(np.abs(values[at : at + BLOCK]).sum(dtype=np.float64)) for at in blocks)
    return total / values.size


SQ: Final = SqScheme()
