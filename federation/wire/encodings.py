"""How one tensor's values become bytes: the encodings that a plan may name.

All are little-endian. An encoding sees flat, finite float32 values and gives parameters (a few numbers that go into
the header) and a blob. What an encoding loses is stated in its docstring.
"""

from collections.abc import Mapping
from math import frexp, isfinite, ldexp
from types import MappingProxyType
from typing import ClassVar, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from federation.errors import ConfigError, PeerError, Rejection

Values: TypeAlias = NDArray[np.float32]
"""Flat, shape ``(n,)``."""

RAW: Final = "float32"
"""The encoding in which a tensor is sent that another one would not make smaller."""

_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)

_BLOCK = 1 << 16
"""Values encoded at a time: the temporaries of a block stay in a small device's second-level cache."""


class Encoding(Protocol):
    """One way to write a tensor.

    Attributes:
        name: As it stands in plans and in the frame.
        parameters: Numbers per tensor in the header.
    """

    name: ClassVar[str]
    parameters: ClassVar[int]

    def max_bytes(self, count: int) -> int:
        """The longest blob that ``count`` values can give."""
        ...

    def encode(
        self, values: Values, peak: float, rng: np.random.Generator
    ) -> tuple[tuple[float, ...], memoryview]:
        """Encode finite values.

        Args:
            values: Flat float32, not empty.
            peak: Their largest magnitude.
            rng: For stochastic rounding.

        Returns:
            The parameters and a contiguous blob.
        """
        ...

    def decode(self, blob: memoryview, parameters: tuple[float, ...], count: int) -> Values:
        """Decode a foreign blob.

        Args:
            blob: At most ``max_bytes(count)`` bytes, from anywhere.
            parameters: ``parameters`` numbers, from anywhere.
            count: Values to return, at least 1; nothing larger than that many float32 may be allocated.

        Raises:
            PeerError: ``wrong_length``, ``non_finite`` or ``malformed``.
        """
        ...


class Float32:
    """The values themselves. Exact; decoding is a view into the data, without a copy."""

    name: ClassVar[str] = RAW
    parameters: ClassVar[int] = 0

    def max_bytes(self, count: int) -> int:
        """Four bytes a value."""
        return 4 * count

    def encode(
        self,
        values: Values,
        peak: float,  # noqa: ARG002  (part of the interface)
        rng: np.random.Generator,  # noqa: ARG002
    ) -> tuple[tuple[float, ...], memoryview]:
        """Return the values as they are."""
        return (), values.data

    def decode(self, blob: memoryview, parameters: tuple[float, ...], count: int) -> Values:
        """Return a read-only view (where the data is read-only) and refuse NaN and infinity."""
        _check_numbers(parameters, self.parameters)
        _check_length(blob, self.max_bytes(count))
        values = np.frombuffer(blob, dtype="<f4", count=count)
        _check_finite(values)
        return values


class Float16:
    """Half precision after an exact shift of the exponent; one parameter, the scale, a power of two.

    The scale brings the tensor's largest magnitude into [2^14, 2^15), so nothing overflows and small updates do not
    fall into the subnormal range. Rounding is to nearest: the error of a value x is at most 2^-11 |x|, or 2^-39 of
    the largest magnitude, whichever is more.
    """

    name: ClassVar[str] = "float16"
    parameters: ClassVar[int] = 1

    def max_bytes(self, count: int) -> int:
        """Two bytes a value."""
        return 2 * count

    def encode(
        self,
        values: Values,
        peak: float,
        rng: np.random.Generator,  # noqa: ARG002  (rounds to nearest)
    ) -> tuple[tuple[float, ...], memoryview]:
        """Shift and round to nearest."""
        scale = max(ldexp(1.0, frexp(peak)[1] - 15), _SMALLEST_NORMAL)
        shift = np.float32(1.0 / scale)
        halves = np.empty(values.size, dtype="<f2")
        for at in range(0, values.size, _BLOCK):
            np.multiply(values[at : at + _BLOCK], shift, out=halves[at : at + _BLOCK], casting="same_kind")
        return (scale,), halves.data

    def decode(self, blob: memoryview, parameters: tuple[float, ...], count: int) -> Values:
        """Widen and shift back."""
        scale = _scale(parameters)
        _check_length(blob, self.max_bytes(count))
        values = np.frombuffer(blob, dtype="<f2", count=count).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= np.float32(scale)
        _check_finite(values)
        return values


class Int8:
    """One byte a value on a grid of 255 points; one parameter, the step: the largest magnitude over 127.

    Rounding is stochastic (a value goes to one of its two neighbours on the grid, to the nearer one more often), so
    the expectation of what is decoded is the value, up to 2^-17 of a step: the resolution of the random numbers.
    Bound of the error of each value: strictly less than 1 + 2^-17 steps, with its variance at most a quarter of a
    squared step. Errors of different values, and of different agents, are independent: they average out.
    """

    name: ClassVar[str] = "int8"
    parameters: ClassVar[int] = 1

    _LEVELS: ClassVar[int] = 127
    _FRACTION_BITS: ClassVar[int] = 16  # 127 * 2^16 < 2^24: the fixed-point value is still exact in a float32

    def max_bytes(self, count: int) -> int:
        """One byte a value."""
        return count

    def encode(
        self, values: Values, peak: float, rng: np.random.Generator
    ) -> tuple[tuple[float, ...], memoryview]:
        """Round stochastically: floor(value / step + u) with u uniform in [0, 1), in fixed point."""
        step = max(np.float32(peak / self._LEVELS), np.float32(_SMALLEST_NORMAL))
        if float(step) * self._LEVELS < peak:  # rounded down: the largest value would leave the grid
            step = np.nextafter(step, np.float32(np.inf))
        codes = np.empty(values.size, dtype="i1")
        for at in range(0, values.size, _BLOCK):
            block = values[at : at + _BLOCK] / step
            block *= np.float32(1 << self._FRACTION_BITS)
            fixed = np.rint(block, out=block).astype(np.int32)
            fixed += _uniform_16_bit(fixed.size, rng)
            fixed >>= self._FRACTION_BITS
            codes[at : at + _BLOCK] = fixed
        return (float(step),), codes.data

    def decode(self, blob: memoryview, parameters: tuple[float, ...], count: int) -> Values:
        """Multiply by the step. The code -128, which the encoder never writes, is refused."""
        step = _scale(parameters)
        if step > _LARGEST / self._LEVELS:
            raise PeerError(Rejection.NON_FINITE, f"step {step:g} times {self._LEVELS} overflows float32")
        _check_length(blob, self.max_bytes(count))
        codes = np.frombuffer(blob, dtype="i1", count=count)
        if int(codes.min()) < -self._LEVELS:
            raise PeerError(Rejection.MALFORMED, "the code -128 is not on the grid")
        values: Values = np.multiply(codes, np.float32(step), dtype=np.float32)
        return values


ENCODINGS: Final[Mapping[str, Encoding]] = MappingProxyType(
    {encoding.name: encoding for encoding in (Float32(), Float16(), Int8())}
)
"""Every encoding by its name."""


def encoding_named(name: str) -> Encoding:
    """Look an encoding up.

    Raises:
        ConfigError: If this version of fedge does not know it.
    """
    try:
        return ENCODINGS[name]
    except KeyError:
        raise ConfigError(f"encoding {name!r} is not known here: use one of {', '.join(ENCODINGS)}") from None


def _uniform_16_bit(count: int, rng: np.random.Generator) -> NDArray[np.uint16]:
    words = rng.integers(0, 1 << 64, size=-(-count // 4), dtype=np.uint64)
    return words.view(np.uint16)[:count]


def _check_length(blob: memoryview, expected: int) -> None:
    if len(blob) != expected:
        raise PeerError(Rejection.WRONG_LENGTH, f"a blob of {len(blob)} bytes instead of {expected}")


def _check_numbers(parameters: tuple[float, ...], expected: int) -> None:
    if len(parameters) != expected:
        raise PeerError(Rejection.MALFORMED, f"{len(parameters)} parameters instead of {expected}")


def _scale(parameters: tuple[float, ...]) -> float:
    _check_numbers(parameters, 1)
    scale = parameters[0]
    if not (isfinite(scale) and _SMALLEST_NORMAL <= scale <= _LARGEST):
        raise PeerError(Rejection.NON_FINITE, f"scale {scale:g} is not a positive normal float32")
    return scale


def _check_finite(values: Values) -> None:
    # Extremes instead of isfinite(): no mask to allocate, and NaN propagates through both.
    if not (np.isfinite(values.max()) and np.isfinite(values.min())):
        raise PeerError(Rejection.NON_FINITE, "a value is NaN or infinite")
