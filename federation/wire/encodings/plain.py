"""Values as they are, in half precision, or not at all."""

from math import frexp, inf, ldexp

import numpy as np

from federation.wire.encodings.protocol import (
    BLOCK,
    SMALLEST_NORMAL,
    Array,
    Coded,
    Parameters,
    Scheme,
    Values,
    check_finite,
    check_length,
    check_scale,
)


class Zero:
    """All values are zero: no parameters, no bytes. What frozen layers cost in every encoding."""

    name = "zero"
    parameters = 0

    def max_bytes(self, count: int) -> int:  # noqa: ARG002 - part of the interface
        """No bytes."""
        return 0

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:  # noqa: ARG002
        """Fill with zeros."""
        check_length(blob, 0)
        out.fill(0)


class Float32:
    """The values themselves, 32 bits each. Exact."""

    name = spec = "float32"
    parameters = 0
    stateful = False
    schemes: tuple[Scheme, ...] = ()

    def max_bytes(self, count: int) -> int:
        """Four bytes a value."""
        return 4 * count

    def encode(
        self,
        array: Array,
        peak: float,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
        noise: float = inf,  # noqa: ARG002 - see the protocol
    ) -> Coded:
        """Give the values as they are."""
        return Coded(self.name, (), array.reshape(-1).data.cast("B"))

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:  # noqa: ARG002
        """Copy, and refuse NaN and infinity."""
        check_length(blob, self.max_bytes(out.size))
        out[:] = np.frombuffer(blob, dtype="<f4")
        check_finite(out)


class Float16:
    """Half precision after an exact shift of the exponent, 16 bits a value; one parameter, the scale, a power of two.

    The scale brings the tensor's largest magnitude into [2^14, 2^15), so nothing overflows and small updates do not
    fall into the subnormal range. Rounding is to nearest, so there is a bias, too small to matter: the error of a
    value x is at most 2^-11 |x|, or 2^-39 of the largest magnitude, whichever is more.
    """

    name = spec = "float16"
    parameters = 1
    stateful = False

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Itself."""
        return (self,)

    def max_bytes(self, count: int) -> int:
        """Two bytes a value."""
        return 2 * count

    def encode(
        self,
        array: Array,
        peak: float,
        rng: np.random.Generator,  # noqa: ARG002
        noise: float = inf,  # noqa: ARG002 - see the protocol
    ) -> Coded:
        """Shift and round to nearest."""
        values = array.reshape(-1)
        scale = max(ldexp(1.0, frexp(peak)[1] - 15), SMALLEST_NORMAL)
        shift = np.float32(1.0 / scale)
        halves = np.empty(values.size, dtype="<f2")
        for at in range(0, values.size, BLOCK):
            np.multiply(values[at : at + BLOCK], shift, out=halves[at : at + BLOCK], casting="same_kind")
        return Coded(self.name, (scale,), halves.data.cast("B"))

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:
        """Widen and shift back."""
        scale = check_scale(parameters[0])
        check_length(blob, self.max_bytes(out.size))
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(np.frombuffer(blob, dtype="<f2"), scale, out=out)
        check_finite(out)
