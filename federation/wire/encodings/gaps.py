"""Sparse integers as the gaps between them, entropy-coded: what ``sq`` and ``topk`` share.

The positions of the non-zero integers become a stream of byte symbols, in the order of the positions::

    0 .. 253   so many times 2^low zeros (plus the low bits of the gap, sent apart), then a non-zero integer
    254        the non-zero integer before this is larger by one in magnitude
    255        254 times 2^low zeros, and no non-zero integer yet

The stream goes through Deflate (RFC 1951) with Huffman codes only: within a few per cent of the entropy for such symbols,
in the standard library, in C. ``low`` bits of each gap are sent as they are, since they are as good as random when
gaps are long: fewer symbols mean smaller code tables and hardly any 255.

A blob is::

    u8        low
    Deflate   the symbols, raw (without zlib's header)
    tail      what else is sent for each non-zero integer, one bit plane or more; its length follows from their number
"""

import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from federation.errors import PeerError, Rejection

Positions: TypeAlias = NDArray[np.int64]
Symbols: TypeAlias = NDArray[np.uint8]

MAX_LOW_BITS: Final = 15
"""Enough for a mean gap of 2^17."""

_LARGER: Final = 254
_SKIP: Final = 255

_COARSE_BITS: Final = 2
"""Mean gaps stay between 4 and 8 units of 2^low: measured best for 0.4 to 4 % of non-zeros, flat around it."""

_RAW_DEFLATE: Final = -15
_MOST_MEMORY: Final = 9
"""Longest Deflate blocks: a code table for each 32,768 symbols."""

_CHUNK: Final = 1 << 16
"""Symbols decoded at a time."""


class Values(NamedTuple):
    """Some of the non-zero integers of a stream.

    Attributes:
        first: How many came before.
        positions: Where they are, strictly increasing, shape ``(k,)``.
        larger: Positions, of these or earlier ones, to be increased by one in magnitude; repeated for more.
    """

    first: int
    positions: Positions
    larger: Positions


def write_gaps(
    positions: Positions, magnitudes: NDArray[np.integer] | None, count: int
) -> tuple[bytes, bytes]:
    """Code positions, and magnitudes if there are any above one.

    Args:
        positions: Strictly increasing, shape ``(k,)``.
        magnitudes: At least 1, shape ``(k,)``; None if all are one.
        count: Of all integers, zeros included.

    Returns:
        The beginning of the blob, and the low bits as planes: the beginning of its tail.
    """
    low = min(max(int(np.log2(count / max(positions.size, 1))) - _COARSE_BITS, 0), MAX_LOW_BITS)
    gaps = np.diff(positions, prepend=-1)
    gaps -= 1
    planes = b"".join(np.packbits(gaps >> bit & 1 != 0).tobytes() for bit in range(low))
    gaps >>= low
    deflate = zlib.compressobj(
        zlib.Z_BEST_SPEED, zlib.DEFLATED, _RAW_DEFLATE, _MOST_MEMORY, zlib.Z_HUFFMAN_ONLY
    )
    symbols = _symbols(gaps, magnitudes)
    return bytes([low]) + deflate.compress(symbols.data) + deflate.flush(), planes


def _symbols(gaps: Positions, magnitudes: NDArray[np.integer] | None) -> Symbols:
    if magnitudes is None and int(gaps.max(initial=0)) < _LARGER:
        return gaps.astype(np.uint8)
    skips, rest = np.divmod(gaps, _LARGER)
    lengths = skips + (1 if magnitudes is None else magnitudes)
    ends = np.cumsum(lengths)
    symbols = np.full(int(ends[-1]), _LARGER, dtype=np.uint8)
    starts = ends - lengths
    symbols[starts + skips] = rest
    for at in np.flatnonzero(skips):
        symbols[starts[at] : starts[at] + skips[at]] = _SKIP
    return symbols


class GapReader:
    """A foreign stream, inflated and checked.

    Args:
        blob: ``low``, Deflate, tail; from anywhere.
        count: Of all integers: no position is beyond, and no more than six times as many symbols are inflated.

    Attributes:
        size: How many non-zero integers there are.
        tail: What follows the symbols, from the low planes on.

    Raises:
        PeerError: ``malformed`` or ``wrong_length``.
    """

    def __init__(self, blob: memoryview, count: int) -> None:
        if not len(blob) or blob[0] > MAX_LOW_BITS:
            raise PeerError(Rejection.MALFORMED, f"no number of low bits from 0 to {MAX_LOW_BITS}")
        self._count, self._low = count, blob[0]
        inflate = zlib.decompressobj(_RAW_DEFLATE)
        try:
            symbols = inflate.decompress(blob[1:], most_symbols(count) + 1)  # the end must come into sight
        except zlib.error as error:
            raise PeerError(Rejection.MALFORMED, f"the gaps cannot be inflated: {error}") from error
        if not inflate.eof or len(symbols) > most_symbols(count):
            raise PeerError(
                Rejection.WRONG_LENGTH,
                f"the gaps of {count} values do not end within {most_symbols(count)} symbols or the blob",
            )
        self._symbols: Symbols = np.frombuffer(symbols, dtype=np.uint8)
        self.size = int(np.count_nonzero(self._symbols < _LARGER))
        self.tail = memoryview(inflate.unused_data)

    @property
    def low_bytes(self) -> int:
        """How much of the tail the planes of the low bits take."""
        return self._low * plane_bytes(self.size)

    def values(self) -> Iterator[Values]:
        """Walk through the stream.

        Raises:
            PeerError: ``malformed`` if a position is beyond the last value, or a magnitude belongs to none.
        """
        advance = (np.arange(256, dtype=np.int64) << self._low) + 1
        advance[_LARGER] = 0
        advance[_SKIP] = _LARGER << self._low
        end, first = 0, 0
        for at in range(0, self._symbols.size, _CHUNK):
            symbols = self._symbols[at : at + _CHUNK]
            ends = advance[symbols]
            plain = int(symbols.max()) < _LARGER
            here = np.arange(symbols.size) if plain else np.flatnonzero(symbols < _LARGER)
            if self._low:
                ends[here] += self._low_values(first, here.size)
            ends[0] += end
            np.cumsum(ends, out=ends)
            end = int(ends[-1])
            if end > self._count:
                raise PeerError(Rejection.MALFORMED, f"a position beyond the {self._count} values")
            ends -= 1
            larger = ends[:0] if plain else ends[symbols == _LARGER]
            if larger.size and larger[0] < 0:
                raise PeerError(Rejection.MALFORMED, "a magnitude before the first non-zero value")
            positions = ends if plain else ends[here]
            yield Values(first, positions, larger)
            first += positions.size

    def _low_values(self, first: int, size: int) -> Positions:
        # Chunks begin anywhere, planes at whole bytes: unpack from the byte before.
        begin, skip = divmod(first, 8)
        stop = plane_bytes(first + size)
        low = np.zeros(size, dtype=np.int64)
        for bit in range(self._low):
            plane = bit * plane_bytes(self.size)
            packed = np.frombuffer(self.tail[plane + begin : plane + stop], dtype=np.uint8)
            low += np.unpackbits(packed)[skip : skip + size].astype(np.int64) << bit
        return low


def most_symbols(count: int) -> int:
    """More than any encoder writes.

    The magnitudes of ``sq`` sum up to less than 5 a value, its step being at least a quarter of the RMS.
    """
    return 6 * count


def plane_bytes(size: int) -> int:
    """The length of a plane of ``size`` bits."""
    return -(-size // 8)
