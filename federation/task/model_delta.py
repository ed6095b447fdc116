"""A model as its difference from another one: what devices fetch that hold the release before.

The maker finds the same tensors in both ONNX files and predicts the new one from the old one; what it was wrong by is written
in planes of bytes that a standard compressor makes small. Whoever applies a delta needs to know nothing of ONNX: the delta says
piece by piece what to take from where. docs/protocol.md, section 14, has the format.

- Weights of 4 and 2 bytes are compared as integers, little-endian: a number that moved a little differs in its low bytes only,
  and the difference, zigzag-coded, is smaller than the exclusive or, which a carry fills with ones.
- Weights in int8 have a scale for each output channel, which moves with the channel's largest weight. So each row of the old
  tensor is multiplied by a factor before it is subtracted (least squares, 1/32768 steps).
- A tensor that did not change is copied, with all that lies around it: a release whose head alone was trained costs its head.

Measured on rounds of the seed CNN (benchmarks/rollout.py): of LZMA, deflate and zstd, LZMA was the smallest in every plane that
has a pattern at all.
"""

import hashlib
import lzma
import struct
import zlib
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from federation.errors import ReleaseError, ReleaseFault
from federation.task.delta_format import (
    DICTIONARY_BYTES,
    GAIN_ONE,
    LZMA,
    MAGIC,
    MAX_HEADER_BYTES,
    PLANES,
    PREFIX,
    STREAMS,
    WORDS,
    Coding,
    Header,
    Kind,
    Piece,
    Stream,
    scaled,
    unzigzag,
    zigzag,
)
from federation.task.onnx_tensors import RawTensor, find_tensors

Buffer = bytes | memoryview

_INT8 = 3
_HALVES = {4, 5, 10, 16}
_WORDS = {1, 6, 7, 11, 12, 13}
"""ONNX's data types of two bytes (uint16, int16, float16, bfloat16), and of four and eight (float, int32, int64, double, uint32,
uint64). All others are compared byte by byte."""

# --- applying ---------------------------------------------------------------------------------------------------------


def apply_delta(base: Buffer, delta: Buffer, *, length: int, sha256: str) -> bytes:
    """Make the new file from the old one.

    Memory: the new file, and once more as much as differs. The delta may come from anywhere: nothing is allocated or unpacked
    beyond ``length``.

    Args:
        base: The old file (may be a memory map).
        delta: From :func:`make_delta`.
        length: Of the new file, from a signed release: bounded by the caller.
        sha256: Of the new file, from a signed release.

    Raises:
        ReleaseError: ``malformed`` if the delta is none; ``wrong_hash`` if what it makes is not the new file, because the old
            one is another, or the delta is.
    """
    try:
        made = _apply(memoryview(base), memoryview(delta), length)
    except (
        ValueError,
        OverflowError,
        msgspec.DecodeError,
        lzma.LZMAError,
        zlib.error,
        struct.error,
    ) as error:
        raise ReleaseError(
            ReleaseFault.MALFORMED, f"the model's delta cannot be applied: {str(error)[:200]}"
        ) from error
    found = hashlib.sha256(made).hexdigest()
    if found != sha256:
        raise ReleaseError(
            ReleaseFault.WRONG_HASH,
            f"the delta makes a model with SHA-256 {found[:12]}, the manifest says {sha256[:12]}",
        )
    return bytes(made)


def _apply(base: memoryview, delta: memoryview, length: int) -> bytearray:
    header, packed = _open(delta)
    needed = [0] * STREAMS
    for piece in header.pieces:
        planes = PLANES[piece.kind]
        if piece.kind is not Kind.LITERAL and piece.base + piece.length > len(base):
            raise ValueError(f"a piece ends at byte {piece.base + piece.length} of {len(base)}")
        if planes and piece.length % len(planes):
            raise ValueError(f"{piece.length} bytes are no whole numbers of {len(planes)}")
        for plane in planes:
            needed[plane] += piece.length // len(planes)
    whole = sum(piece.length for piece in header.pieces)
    if whole != length:
        raise ValueError(f"it makes {whole} bytes, the manifest says {length}")
    dictionary = bytes(base[-DICTIONARY_BYTES:])
    streams = [
        memoryview(_unpack(stream.coding, part, size, dictionary))
        for stream, part, size in zip(header.streams, packed, needed, strict=True)
    ]
    made = bytearray(length)
    target, end, taken = memoryview(made), 0, [0] * STREAMS
    for piece in header.pieces:
        planes = PLANES[piece.kind]
        parts = []
        for plane in planes:
            size = piece.length // len(planes)
            parts.append(streams[plane][taken[plane] : taken[plane] + size])
            taken[plane] += size
        _make(piece, base[piece.base : piece.base + piece.length], parts, target[end : end + piece.length])
        end += piece.length
    return made


def _open(delta: memoryview) -> tuple[Header, list[memoryview]]:
    magic, size = PREFIX.unpack_from(delta)
    if magic != MAGIC:
        raise ValueError(f"it begins with {bytes(magic)!r}, a delta with {MAGIC!r}")
    at = PREFIX.size + size
    if at > len(delta):
        raise ValueError(f"its header of {size} bytes does not fit into {len(delta)}")
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(delta[PREFIX.size : at], MAX_HEADER_BYTES)
    if not unpacker.eof:
        raise ValueError(f"its header is cut off, or longer than {MAX_HEADER_BYTES} bytes")
    header = msgspec.msgpack.decode(text, type=Header)
    packed = []
    for stream in header.streams:
        packed.append(delta[at : at + stream.packed])
        at += stream.packed
    if at != len(delta):
        raise ValueError(f"{len(delta)} bytes, its header accounts for {at}")
    return header, packed


def _unpack(coding: Coding, packed: memoryview, size: int, dictionary: bytes) -> Buffer:
    """At most one byte more than ``size`` is ever unpacked."""
    if coding is Coding.STORED:
        unpacked: Buffer = packed
    elif coding is Coding.DEFLATE:
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS, dictionary).decompress(packed, size + 1)
    else:
        unpacked = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA).decompress(packed, size + 1)
    if len(unpacked) != size:
        raise ValueError(f"a stream has not the {size} bytes that its pieces take")
    return unpacked


def _make(piece: Piece, old: memoryview, parts: Sequence[memoryview], target: memoryview) -> None:
    if piece.kind is Kind.LITERAL:
        target[:] = parts[0]
    elif piece.kind is Kind.COPY:
        target[:] = old
    else:
        words = WORDS[len(parts)]
        residual = np.empty((piece.length // len(parts), len(parts)), np.uint8)
        for place, part in enumerate(parts):
            residual[:, place] = np.frombuffer(part, np.uint8)
        before = np.frombuffer(old, words)
        if piece.kind is Kind.SCALED:
            before = scaled(before.view(np.int8), piece.gains).view(np.uint8)
        np.add(before, unzigzag(residual.view(words)[:, 0]), out=np.frombuffer(target, words))


# --- making -----------------------------------------------------------------------------------------------------------


def make_delta(base: bytes, new: bytes) -> bytes:
    """Write ``new`` as its difference from ``base``.

    Both are ONNX files as ``model-export onnx`` writes them; with anything else the delta is right too, and not much smaller
    than what zlib makes of ``new``.
    """
    pieces: list[Piece] = []
    streams = [bytearray() for _ in range(STREAMS)]
    for piece, parts in _merged(_pieces(base, new), base, new):
        pieces.append(piece)
        for plane, part in zip(PLANES[piece.kind], parts, strict=True):
            streams[plane] += part
    dictionary = base[-DICTIONARY_BYTES:]
    packed = [_pack(bytes(stream), dictionary) for stream in streams]
    header = Header(tuple(pieces), tuple(Stream(coding, len(data)) for coding, data in packed))
    text = zlib.compress(msgspec.msgpack.encode(header), zlib.Z_BEST_COMPRESSION)
    return b"".join((PREFIX.pack(MAGIC, len(text)), text, *(data for _, data in packed)))


def _pieces(base: bytes, new: bytes) -> Iterator[Piece]:
    """The new file from its beginning to its end: tensors that are known, and what lies between them."""
    known = {tensor.name: tensor for tensor in _tensors(base)}
    done = after = 0
    for tensor in _tensors(new):
        former = known.get(tensor.name)
        if (
            former is None
            or former.end - former.start != tensor.end - tensor.start
            or former.end == former.start
        ):
            continue
        yield from _between(base, new, (after, former.start), (done, tensor.start))
        yield _of_tensor(base, new, former, tensor)
        done, after = tensor.end, former.end
    yield from _between(base, new, (after, len(base)), (done, len(new)))


def _tensors(model: bytes) -> list[RawTensor]:
    try:
        return find_tensors(model)
    except ValueError:
        return []


def _between(base: bytes, new: bytes, old: tuple[int, int], gap: tuple[int, int]) -> Iterator[Piece]:
    """What begins and what ends as in the old file is copied from there; the middle is written down."""
    start, end = gap
    head = _alike(new[start:end], base[old[0] : old[0] + end - start])
    room = end - start - head
    tail = _alike(new[end - room : end][::-1], base[max(0, old[1] - room) : old[1]][::-1])
    if head:
        yield Piece(Kind.COPY, head, old[0])
    if room - tail:
        yield Piece(Kind.LITERAL, room - tail)
    if tail:
        yield Piece(Kind.COPY, tail, old[1] - tail)


def _alike(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length))
    return int(differs[0]) if len(differs) else length


def _of_tensor(base: bytes, new: bytes, former: RawTensor, tensor: RawTensor) -> Piece:
    length = tensor.end - tensor.start
    old, now = base[former.start : former.end], new[tensor.start : tensor.end]
    if old == now:
        return Piece(Kind.COPY, length, former.start)
    for kind, types in ((Kind.HALVES, _HALVES), (Kind.WORDS, _WORDS)):
        if tensor.data_type in types and length % len(PLANES[kind]) == 0:
            return Piece(kind, length, former.start)
    rows = tensor.dims[0] if len(tensor.dims) > 1 else 0
    if tensor.data_type == _INT8 and rows and length % rows == 0:
        before, after = np.frombuffer(old, np.int8), np.frombuffer(now, np.int8)
        gains = _gains(before.reshape(rows, -1), after.reshape(rows, -1))
        off = np.abs(after - scaled(before, gains).astype(np.int16)).sum()
        if off + len(gains) < np.abs(after - before.astype(np.int16)).sum():
            return Piece(Kind.SCALED, length, former.start, gains)
    return Piece(Kind.BYTES, length, former.start)


def _gains(before: NDArray[np.int8], after: NDArray[np.int8]) -> bytes:
    """For each row the factor that brings the old one nearest to the new one: ``<old, new> / <old, old>``."""
    old = before.astype(np.float64)
    squares = (old * old).sum(axis=1)
    factor = (old * after).sum(axis=1) / np.maximum(squares, 1)
    steps = np.where(squares > 0, np.rint(factor * GAIN_ONE), GAIN_ONE)
    return np.clip(steps, 0, np.iinfo(np.uint16).max).astype("<u2").tobytes()


def _merged(pieces: Iterator[Piece], base: bytes, new: bytes) -> Iterator[tuple[Piece, list[bytes]]]:
    """Pieces with what goes into their streams; copies that touch in both files become one."""
    end, copy = 0, None
    for piece in pieces:
        if copy is not None and (piece.kind is not Kind.COPY or piece.base != copy.base + copy.length):
            yield copy, []
            copy = None
        if piece.kind is Kind.COPY:
            length = piece.length + (0 if copy is None else copy.length)
            copy = Piece(Kind.COPY, length, piece.base if copy is None else copy.base)
        else:
            yield piece, _residual(piece, base, new[end : end + piece.length])
        end += piece.length
    if copy is not None:
        yield copy, []


def _residual(piece: Piece, base: bytes, now: bytes) -> list[bytes]:
    if piece.kind is Kind.LITERAL:
        return [now]
    planes = len(PLANES[piece.kind])
    words = WORDS[planes]
    before = np.frombuffer(base, words, piece.length // planes, piece.base)
    if piece.kind is Kind.SCALED:
        before = scaled(before.view(np.int8), piece.gains).view(np.uint8)
    wrong_by = zigzag(np.frombuffer(now, words) - before)
    return [plane.tobytes() for plane in wrong_by.view(np.uint8).reshape(-1, planes).T]


_HOPELESS = 0.995
"""Of the size: a plane that deflate makes no smaller is noise, and the slow coder would only confirm it."""

_LARGE_BYTES = 4 * 2**20
_PATTERNED = 0.35
"""LZMA takes two seconds a megabyte where it finds no pattern, to gain a hundredth at most: a large plane is spared that, unless
deflate has made it this much smaller."""


def _pack(stream: bytes, dictionary: bytes) -> tuple[Coding, bytes]:
    """The smallest of what the codings make of it."""
    best = Coding.STORED, stream
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        packer = zlib.compressobj(
            zlib.Z_DEFAULT_COMPRESSION,
            zlib.DEFLATED,
            -zlib.MAX_WBITS,
            zlib.DEF_MEM_LEVEL,
            strategy,
            dictionary,
        )
        packed = packer.compress(stream) + packer.flush()
        if len(packed) < len(best[1]):
            best = Coding.DEFLATE, packed
    worth_trying = _PATTERNED if len(stream) > _LARGE_BYTES else _HOPELESS
    if len(best[1]) < worth_trying * len(stream):
        packed = lzma.compress(stream, lzma.FORMAT_RAW, filters=LZMA)
        if len(packed) < len(best[1]):
            best = Coding.LZMA, packed
    return best
