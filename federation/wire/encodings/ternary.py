"""``ternary``: EDEN below one bit a value."""

from math import inf, sqrt
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federation.errors import PeerError, Rejection
from federation.wire.encodings.gaps import GapReader, plane_bytes, write_gaps
from federation.wire.encodings.grid import INT8
from federation.wire.encodings.protocol import Array, Coded, Scheme, check_length, root_mean_square
from federation.wire.encodings.rotated import RotatedEncoding, RotatedScheme
from federation.wire.encodings.rotation import Layout, Rotated
from federation.wire.encodings.sq import SQ, Sq

_LARGEST_SHARE: Final = 0.5
"""Beyond it the error of ``ternary`` hardly falls: 0.238 times the squared norm here, 0.235 at the least."""

_FINER: Final = Sq(2)
"""For what has to be finer than that: in the first round of a CNN on MNIST a quarter of what ``int8`` would take."""

_SHARE_PRECISION: Final = 1.01


class TernaryScheme(RotatedScheme):
    """The signs of the few largest coordinates: gaps between them, then a plane of their signs.

    What is decoded is the same for all shares; only the encoder knows its threshold.
    """

    name = "ternary"
    largest_code = 1

    def __init__(self, share: float = 1.0) -> None:
        # P(|y| > z) = share for standard normal y.
        self._threshold = NormalDist().inv_cdf(1 - share / 2)

    def max_bytes(self, count: int) -> int:
        """One byte a value, or else it would be sent as ``int8``."""
        return count

    def _quantize(self, rotated: Rotated) -> NDArray[np.int8]:
        magnitudes = np.abs(rotated.coordinates)
        limits = (self._threshold * np.sqrt(rotated.energies)).astype(np.float32)
        # A column without a code could not be scaled to be right on average: it keeps its largest.
        chosen = magnitudes > np.minimum(limits, magnitudes.max(axis=0) * np.float32(1 - 2.0**-20))
        codes: NDArray[np.int8] = np.where(rotated.coordinates < 0, np.int8(-1), np.int8(1)) * chosen
        return codes

    def _write_codes(self, codes: NDArray[np.int8]) -> bytes:
        flat = codes.reshape(-1)
        positions = np.flatnonzero(flat != 0)
        gaps, low = write_gaps(positions, None, flat.size)
        return b"".join((gaps, low, np.packbits(flat[positions] < 0).tobytes()))

    def _read_codes(self, blob: memoryview, layout: Layout) -> NDArray[np.int16]:
        gaps = GapReader(blob, layout.size)
        check_length(gaps.tail, gaps.low_bytes + plane_bytes(gaps.size))
        signs = np.unpackbits(np.frombuffer(gaps.tail[gaps.low_bytes :], dtype=np.uint8), count=gaps.size)
        units = np.array([1, -1], dtype=np.int16)[signs]
        codes = np.zeros(layout.size, dtype=np.int16)
        for first, positions, larger in gaps.values():
            if larger.size:
                raise PeerError(Rejection.MALFORMED, "a magnitude above one among signs")
            codes[positions] = units[first : first + positions.size]
        return codes.reshape(layout)


class Ternary(RotatedEncoding):
    """EDEN below one bit: after the rotation, the signs of only the largest coordinates, entropy-coded.

    Unbiased up to what a Hadamard rotation lacks of a uniform one. With z such that a standard normal value is beyond ±z
    with probability ``share``, and phi its density: expected squared error share / (4 phi(z)^2) - 1 times the squared norm
    (a few per cent more, since the number of signs in a column varies), spread evenly over all values, at H(share) + share bits for each value (H: binary entropy). For 1 % that is 11.0 at
    0.091 bits: about the noise of ``sq:16`` for a third of its bits. Vectors (fewer than 2 dimensions) go as ``int8``.

    Args:
        share: Of the coordinates, that are sent.
    """

    def __init__(self, share: float) -> None:
        super().__init__(TernaryScheme(share), f"ternary:{share:g}")
        self._share = share

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Itself, ``sq`` and ``int8``."""
        return (self._scheme, SQ, INT8)

    def encode(self, array: Array, peak: float, rng: np.random.Generator, noise: float = inf) -> Coded:
        """Rotate and quantize, with a larger share where the noise would be above its bound; ``sq`` where none is enough."""
        if noise == inf or INT8.suits(array):
            return super().encode(array, peak, rng)
        rms = root_mean_square(array.reshape(-1), peak)
        share = self._share_within(noise / rms**2 if rms**2 > 0 else inf)
        if share > _LARGEST_SHARE:
            return _FINER.encode(array, peak, rng, noise)
        return RotatedEncoding(TernaryScheme(share), self.spec).encode(array, peak, rng)

    def _share_within(self, error: float) -> float:
        """The smallest share, at least that of the plan, whose error is within ``error``; above the largest if none is."""
        low, high = self._share, _LARGEST_SHARE
        if ternary_error(low) <= error:
            return low
        if ternary_error(high) > error:
            return inf
        while high / low > _SHARE_PRECISION:
            middle = sqrt(low * high)
            low, high = (low, middle) if ternary_error(middle) <= error else (middle, high)
        return high


def ternary_error(share: float) -> float:
    """Expected squared error of :class:`Ternary` in units of the squared norm: ``share / (4 phi(z)^2) - 1``."""
    normal = NormalDist()
    return share / (4 * normal.pdf(normal.inv_cdf(1 - share / 2)) ** 2) - 1
