"""Stochastic rounding to a uniform grid, with a fixed number of bits for each value."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from federation.errors import PeerError, Rejection
from federation.wire.encodings.protocol import (
    BLOCK,
    SMALLEST_NORMAL,
    Array,
    Coded,
    Parameters,
    Scheme,
    Values,
    check_length,
    check_scale,
    uniform_16_bit,
)

_FRACTION_BITS: Final = 16


class Int8:
    """One byte a value on a grid of 255 points; one parameter, the step: the largest magnitude over 127.

    Rounding is stochastic (a value goes to one of its two neighbours on the grid, to the nearer one more often), so
    the expectation of what is decoded is the value, up to 2^-17 of a step: the resolution of the random numbers.
    Bound of the error of each value: strictly less than 1 + 2^-17 steps, with its variance at most a quarter of a
    squared step. Errors of different values, and of different agents, are independent: they average out.
    """

    name = spec = "int8"
    parameters = 1
    stateful = False
    levels = 127

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def max_bytes(self, count: int) -> int:
        """One byte a value."""
        return count

    def encode(self, array: Array, peak: float, rng: np.random.Generator) -> Coded:
        """Round stochastically."""
        values = array.reshape(-1)
        step = max(np.float32(peak / self.levels), np.float32(SMALLEST_NORMAL))
        if float(step) * self.levels < peak:  # rounded down: the largest value would leave the grid
            step = np.nextafter(step, np.float32(np.inf))
        codes = np.empty(values.size, dtype=np.int8)
        for at in range(0, values.size, BLOCK):
            codes[at : at + BLOCK] = round_stochastically(values[at : at + BLOCK] / step, rng)
        return Coded(self.name, (float(step),), codes.data.cast("B"))

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:
        """Multiply by the step. The code -128, which the encoder never writes, is refused."""
        codes, step = self.integers(blob, parameters, out.size)
        np.multiply(codes, step, out=out)

    def integers(
        self, blob: memoryview, parameters: Parameters, count: int
    ) -> tuple[NDArray[np.int8], np.float32]:
        """Give the integers as they were sent, shape ``(count,)``, and the step, without forming values.

        Raises:
            PeerError: As :meth:`decode_into`.
        """
        step = check_scale(parameters[0], times=self.levels)
        check_length(blob, self.max_bytes(count))
        codes = np.frombuffer(blob, dtype=np.int8, count=count)
        if int(codes.min()) < -self.levels:
            raise PeerError(Rejection.MALFORMED, "the code -128 is not on the grid")
        return codes, step


INT8: Final = Int8()


def round_stochastically(scaled: Values, rng: np.random.Generator) -> NDArray[np.int32]:
    """Compute floor(x + u) with u uniform in [0, 1), in fixed point.

    Args:
        scaled: Values in units of the step, of magnitude at most 127; overwritten.
        rng: The source of u.
    """
    scaled *= np.float32(1 << _FRACTION_BITS)  # 127 * 2^16 < 2^24: still exact in a float32
    fixed = np.rint(scaled, out=scaled).astype(np.int32)
    fixed += uniform_16_bit(fixed.size, rng)
    fixed >>= _FRACTION_BITS
    return fixed
