"""What an encoding is, and what all of them share: the checks of foreign blobs.

An **encoding** is what a plan names (``sq:16``). It decides, tensor by tensor, in which **scheme** the values are
written. The schemes of one frame may differ, since what suits a matrix does not suit a bias of ten values.
"""

from math import inf, isfinite, sqrt
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from federation.errors import PeerError, Rejection

Array: TypeAlias = NDArray[np.float32]
"""One tensor, C-contiguous, any shape."""

Values: TypeAlias = NDArray[np.float32]
"""Flat, shape ``(n,)``."""

Parameters: TypeAlias = tuple[float, ...]
"""A tensor's numbers in the header of the frame."""

SMALLEST_NORMAL: Final = float(np.finfo(np.float32).tiny)
LARGEST: Final = float(np.finfo(np.float32).max)

SMALLEST_PEAK: Final = 2.0**-100
"""By no less is divided to bring values into [-1, 1]: the reciprocal stays finite, and squares do not vanish."""

BLOCK: Final = 1 << 16
"""Values encoded or decoded at a time: the temporaries of a block stay in a small device's second-level cache."""


class Coded(NamedTuple):
    """One tensor as it is sent.

    Attributes:
        scheme: Name of the scheme.
        parameters: Of the tensor, for the header.
        blob: Contiguous bytes.
    """

    scheme: str
    parameters: Parameters
    blob: memoryview | bytes


class Scheme(Protocol):
    """How the values of one tensor are written.

    Attributes:
        name: As it stands in the frame.
        parameters: Numbers per tensor in the header.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see Attributes
    @property
    def parameters(self) -> int: ...  # noqa: D102

    def max_bytes(self, count: int) -> int:
        """The longest blob that ``count`` values can give."""
        ...

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:
        """Decode a foreign blob.

        Args:
            blob: At most ``max_bytes(out.size)`` bytes, from anywhere.
            parameters: ``self.parameters`` finite numbers, from anywhere.
            out: Where the values go, at least one, contiguous; all are written. Beside it nothing larger than a
                small multiple of it is allocated.

        Raises:
            PeerError: ``wrong_length``, ``non_finite`` or ``malformed``; what is in ``out`` then is undefined.
        """
        ...


class Encoding(Protocol):
    """What a plan names.

    Attributes:
        name: The family: ``sq``.
        spec: The canonical text with its parameter: ``sq:16``.
        stateful: Whether it needs error feedback on the device: what it leaves out must be added to the next update.
        schemes: That its frames may hold, besides ``zero`` and ``float32``.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see Attributes
    @property
    def spec(self) -> str: ...  # noqa: D102
    @property
    def stateful(self) -> bool: ...  # noqa: D102
    @property
    def schemes(self) -> tuple[Scheme, ...]: ...  # noqa: D102

    def encode(
        self,
        array: Array,
        peak: float,
        rng: np.random.Generator,
        noise: float = inf,
    ) -> Coded:
        """Encode finite values.

        Args:
            array: One tensor, C-contiguous, not empty, not all zero.
            peak: Their largest magnitude.
            rng: For stochastic rounding and rotations.
            noise: Largest variance that may be added to a value, as a mean over the tensor. A bound for encodings that
                can choose how coarse they are (``sq``); others have the error that they have.

        Returns:
            Scheme, parameters and blob. The frame sends the values as float32 where this is not shorter.
        """
        ...


def check_length(blob: memoryview, expected: int) -> None:
    """Refuse a blob of another length.

    Raises:
        PeerError: ``wrong_length``.
    """
    if len(blob) != expected:
        raise PeerError(Rejection.WRONG_LENGTH, f"a blob of {len(blob)} bytes instead of {expected}")


def check_scale(scale: float, *, times: float = 1.0) -> np.float32:
    """Refuse what is no scale of float32 values.

    Args:
        scale: A foreign number.
        times: The largest number that it will be multiplied by.

    Returns:
        The scale in single precision.

    Raises:
        PeerError: ``non_finite`` if it is NaN, infinite, zero, negative, denormal, or overflows with ``times``.
    """
    if not (isfinite(scale) and SMALLEST_NORMAL <= scale <= LARGEST / times):
        raise PeerError(Rejection.NON_FINITE, f"scale {scale:g} is not a positive normal float32")
    return np.float32(scale)


def check_finite(values: Values) -> None:
    """Refuse NaN and infinity.

    Raises:
        PeerError: ``non_finite``.
    """
    # Extremes instead of isfinite(): no mask to allocate, and NaN propagates through both.
    if not (np.isfinite(values.max()) and np.isfinite(values.min())):
        raise PeerError(Rejection.NON_FINITE, "a value is NaN or infinite")


def root_mean_square(values: Values, peak: float) -> float:
    """Of all values.

    Args:
        values: Not empty.
        peak: Their largest magnitude.
    """
    whole = max(peak, SMALLEST_PEAK)
    total = 0.0
    for at in range(0, values.size, BLOCK):
        # In units of the peak nothing overflows, and blocks add up in float64.
        block = values[at : at + BLOCK] * np.float32(1 / whole)
        total += float(np.dot(block, block))
    return whole * sqrt(total / values.size)


def uniform_16_bit(count: int, rng: np.random.Generator) -> NDArray[np.uint16]:
    """``count`` independent uniform integers from 0 to 65,535, four from each draw of the generator."""
    words = rng.integers(0, 1 << 64, size=-(-count // 4), dtype=np.uint64)
    return words.view(np.uint16)[:count]
