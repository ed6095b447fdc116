"""Stochastic rounding to a uniform grid, with a fixed number of bits for each value."""

from math import inf
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
_NIBBLE_OFFSET: Final = 8
_MATRIX: Final = 2
"""Dimensions from which on a tensor is no vector."""

_PARAMETER_BYTES: Final = 9
"""A float in the header."""


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

    def suits(self, array: Array) -> bool:
        """Whether a coarser encoding should leave a tensor to this one.

        Vectors (biases, normalisation) have few values, each of which acts on a whole channel; running variances among
        them must not become negative by coarse rounding.
        """
        return array.ndim < _MATRIX

    def cost(self, array: Array) -> int:
        """Bytes that a tensor takes, blob and parameter."""
        return self.max_bytes(array.size) + _PARAMETER_BYTES

    def encode(
        self,
        array: Array,
        peak: float,
        rng: np.random.Generator,
        noise: float = inf,  # noqa: ARG002 - see the protocol
    ) -> Coded:
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


class Int4:
    """Four bits a value on a grid of 15 points for each block of 128 values, and two bytes a block for its step.

    4.125 bits a value. The step is the block's largest magnitude over 7, rounded up to a bfloat16. Rounding is
    stochastic: unbiased up to 2^-17 of the block's step. Bound of the error of each value: 1 + 2^-17 of these
    steps; its variance is at most a quarter of a squared step.

    The blob: for each block the two high bytes of its step as a float32, little-endian; then the codes plus 8, two in a
    byte, the first in the low half.
    """

    name = spec = "int4"
    parameters = 0
    stateful = False
    levels = 7
    block = 128

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def max_bytes(self, count: int) -> int:
        """Half a byte a value, two bytes a block."""
        return 2 * -(-count // self.block) + -(-count // 2)

    def encode(
        self,
        array: Array,
        peak: float,  # noqa: ARG002
        rng: np.random.Generator,
        noise: float = inf,  # noqa: ARG002 - see the protocol
    ) -> Coded:
        """Find each block's step and round stochastically."""
        values = array.reshape(-1)
        steps = np.empty(-(-values.size // self.block), dtype="<u2")
        nibbles = np.empty(values.size + values.size % 2, dtype=np.uint8)
        nibbles[-1] = _NIBBLE_OFFSET  # of the padding, if there is any
        for at in range(0, values.size, BLOCK):
            some = values[at : at + BLOCK]
            rows = _rows(some, self.block)
            peaks = np.abs(rows).max(axis=1)
            highs = _bfloat16_up(np.maximum(peaks / np.float32(self.levels), np.float32(SMALLEST_NORMAL)))
            steps[at // self.block : at // self.block + highs.size] = highs
            rows /= _from_bfloat16(highs)[:, np.newaxis]
            codes = round_stochastically(rows.reshape(-1), rng)[: some.size]
            nibbles[at : at + some.size] = codes + _NIBBLE_OFFSET
        return Coded(self.name, (), steps.tobytes() + (nibbles[0::2] | nibbles[1::2] << 4).tobytes())

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:  # noqa: ARG002
        """Multiply by each block's step. The code -8, which the encoder never writes, is refused."""
        codes, steps = self.integers(blob, out.size)
        whole = out.size // self.block
        rows = out[: whole * self.block].reshape(whole, self.block)
        np.multiply(codes[: rows.size].reshape(rows.shape), steps[:whole, np.newaxis], out=rows)
        np.multiply(codes[rows.size :], steps[-1], out=out[rows.size :])

    def integers(self, blob: memoryview, count: int) -> tuple[NDArray[np.int8], Values]:
        """Give the integers as they were sent, shape ``(count,)``, and the step of each block of 128.

        Raises:
            PeerError: As :meth:`decode_into`.
        """
        check_length(blob, self.max_bytes(count))
        blocks = -(-count // self.block)
        steps = _from_bfloat16(np.frombuffer(blob, dtype="<u2", count=blocks))
        check_scale(float(steps.min()), times=self.levels)
        check_scale(float(steps.max()), times=self.levels)
        packed = np.frombuffer(blob, dtype=np.uint8, offset=steps.size * 2)
        codes = np.empty(packed.size * 2, dtype=np.int8)
        codes[0::2] = packed & 0xF
        codes[1::2] = packed >> 4
        codes -= _NIBBLE_OFFSET
        if int(codes.min()) < -self.levels:
            raise PeerError(Rejection.MALFORMED, "the code -8 is not on the grid")
        return codes[:count], steps


def _rows(values: Values, length: int) -> Values:
    padded = np.zeros(-(-values.size // length) * length, dtype=np.float32)
    padded[: values.size] = values
    return padded.reshape(-1, length)


def _bfloat16_up(values: Values) -> NDArray[np.uint16]:
    """The high halves of positive float32, rounded up."""
    return (values.view(np.uint32) + np.uint32(0xFFFF) >> 16).astype(np.uint16)


def _from_bfloat16(highs: NDArray[np.uint16]) -> Values:
    return (highs.astype(np.uint32) << 16).view(np.float32)


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
