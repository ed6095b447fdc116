"""The parts of a model's delta: pieces of the new file, streams of bytes that they take from, and the arithmetic of both ends.

docs/protocol.md, section 14, describes it for a stranger.
"""

import lzma
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

MAGIC = b"FDL1"

MAX_PIECES = 65_536
MAX_HEADER_BYTES = 8 * 2**20
"""Of the header when it is unpacked: 65,536 pieces of a few bytes, and two bytes for each channel of int8 weights."""

PREFIX = struct.Struct("<4sI")
DICTIONARY_BYTES = 32 * 1024
"""What deflate can look back to: the end of the old file, where the labels and the provenance are."""

GAIN_ONE = 1 << 15
LZMA: Sequence[dict[str, Any]] = (
    {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 20},
)
"""No context and no alignment: neighbouring residuals have nothing to do with each other. The dictionary bounds the memory of
whoever unpacks."""


class Kind(IntEnum):
    """How a piece of the new file is made."""

    LITERAL = 0
    COPY = 1
    BYTES = 2
    HALVES = 3
    WORDS = 4
    SCALED = 5


class Coding(IntEnum):
    """How a stream is packed."""

    STORED = 0
    DEFLATE = 1
    LZMA = 2


class Piece(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A stretch of the new file.

    Attributes:
        kind: How it is made.
        length: Bytes.
        base: Where in the old file its counterpart begins; of as many bytes.
        gains: For ``scaled`` the factors of its rows, little-endian uint16, in units of 1/32768.
    """

    kind: Kind
    length: Annotated[int, Meta(ge=1, le=2**40)]
    base: Annotated[int, Meta(ge=0, le=2**40)] = 0
    gains: Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)] = b""


class Stream(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Bytes that several pieces take from, in their order.

    Attributes:
        coding: How they are packed.
        packed: Bytes that they take in the delta.
    """

    coding: Coding
    packed: Annotated[int, Meta(ge=0, le=2**40)]


STREAMS = 8
"""Literals; residuals of bytes; two planes of halves; four planes of words."""


class Header(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a delta says of itself; the streams follow it.

    Attributes:
        pieces: The new file from its beginning to its end.
        streams: See :data:`PLANES`.
    """

    pieces: Annotated[tuple[Piece, ...], Meta(max_length=MAX_PIECES)]
    streams: Annotated[tuple[Stream, ...], Meta(min_length=STREAMS, max_length=STREAMS)]


PLANES: Mapping[Kind, tuple[int, ...]] = {
    Kind.LITERAL: (0,),
    Kind.COPY: (),
    Kind.BYTES: (1,),
    Kind.SCALED: (1,),
    Kind.HALVES: (2, 3),
    Kind.WORDS: (4, 5, 6, 7),
}
"""The streams that a kind of piece takes its bytes from, least significant byte first."""

WORDS: Mapping[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
"""As what a piece of so many planes is computed with: unsigned, modulo the width."""


def scaled(old: NDArray[np.int8], gains: bytes) -> NDArray[np.int8]:
    """Multiply each row by its gain, in integers, so that all processors agree: ``floor(old * gain / 2^15 + 1/2)``.

    Args:
        old: int8 ``[rows * columns]``.
        gains: A little-endian uint16 for each row.

    Returns:
        int8 of the same shape; what goes beyond is cut off.

    Raises:
        ValueError: If the weights cannot be divided into as many rows.
    """
    factors = np.frombuffer(gains, "<u2").astype(np.int32)
    if not len(factors) or len(old) % len(factors):
        raise ValueError(f"{len(old)} weights cannot be divided into {len(factors)} rows")
    rows = old.reshape(len(factors), -1) * factors[:, None]
    rounded = (rows + GAIN_ONE // 2) >> 15
    weights: NDArray[np.int8] = np.clip(rounded, -128, 127).astype(np.int8).reshape(-1)
    return weights


def zigzag(difference: NDArray[Any]) -> NDArray[Any]:
    """0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ..., modulo the width: small differences have small codes, whatever their sign."""
    sign = difference >> (8 * difference.itemsize - 1)
    code: NDArray[Any] = (difference << 1) ^ np.negative(sign)
    return code


def unzigzag(code: NDArray[Any]) -> NDArray[Any]:
    """The reverse of :func:`zigzag`."""
    difference: NDArray[Any] = (code >> 1) ^ np.negative(code & 1)
    return difference
