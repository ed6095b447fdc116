"""Section 10 of docs/protocol.md, written from the document alone: frames in and out, for ``independent_client``.

Slow and plain on purpose: loops where fedge has tables, whole matrices where it has butterflies.
"""

import math
import struct
import zlib
from hashlib import shake_128
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]
Integers = NDArray[np.int64]

LARGER, SKIP = 254, 255


# --- the frame ---------------------------------------------------------------------------------------------------


def write_frame(delta: Tensors, encoding: str) -> bytes:
    """Write tensors as one frame."""
    entries, blobs = [], []
    for name in sorted(delta):
        array = np.ascontiguousarray(delta[name], dtype="<f4")
        scheme, parameters, blob = "zero", list[float](), b""
        if array.any() and name.endswith("running_var"):
            scheme, blob = "float32", array.tobytes()
        elif array.any():
            scheme, parameters, blob = write_tensor(array, encoding)
            if _aligned(array.nbytes) <= _aligned(len(blob)) + 9 * len(parameters):
                scheme, parameters, blob = "float32", [], array.tobytes()
        entries.append([name, list(delta[name].shape), scheme, parameters, len(blob)])
        blobs.append(blob)
    header = msgspec.msgpack.encode([encoding, entries])
    frame = bytearray(b"fdge" + struct.pack("<HHI", 1, 0, len(header)) + header)
    for blob in blobs:
        if blob:
            frame += bytes(_aligned(len(frame)) - len(frame)) + blob
    return bytes(frame)


def read_frame(frame: bytes) -> Tensors:
    """Read a frame that the aggregator has signed for; it is trusted to be well formed."""
    magic, version, zero, length = struct.unpack_from("<4sHHI", frame)
    assert (magic, version, zero) == (b"fdge", 1, 0)
    _, entries = msgspec.msgpack.decode(frame[12 : 12 + length])
    end, tensors = 12 + length, {}
    for name, shape, scheme, parameters, size in entries:
        start = _aligned(end) if size else end
        end = start + size
        values = read_tensor(scheme, parameters, frame[start:end], math.prod(shape))
        tensors[name] = values.astype(np.float32).reshape(shape)
    assert end == len(frame)
    return tensors


def write_tensor(array: NDArray[np.float32], encoding: str) -> tuple[str, list[float], bytes]:
    """One tensor that is not all zero: scheme, parameters, blob."""
    family, _, number = encoding.partition(":")
    flat = array.reshape(-1)
    match family:
        case "float32":
            return "float32", [], array.tobytes()
        case "float16":
            scale = max(2.0 ** (math.frexp(float(np.abs(flat).max()))[1] - 15), 2.0**-126)
            return "float16", [scale], (flat / np.float32(scale)).astype("<f2").tobytes()
        case "sq" if array.ndim > 1:
            blob = _write_sq(flat, float(number))
        case "ternary" if array.ndim > 1:
            blob = _write_ternary(flat, float(number))
        case _:
            blob = b""
    if 0 < len(blob) < flat.size:
        return family, [], blob
    step = float(np.nextafter(np.float32(np.abs(flat).max() / 127), np.float32(np.inf)))
    return "int8", [step], _rounded(flat / step).clip(-127, 127).astype("i1").tobytes()


def read_tensor(scheme: str, parameters: list[float], blob: bytes, count: int) -> NDArray[np.float32]:
    """The values of one tensor, flat."""
    match scheme:
        case "zero":
            return np.zeros(count, np.float32)
        case "float32":
            return np.frombuffer(blob, "<f4")
        case "float16":
            return np.frombuffer(blob, "<f2").astype(np.float32) * np.float32(parameters[0])
        case "int8":
            return _scaled(np.frombuffer(blob, "i1"), np.float32(parameters[0]))
        case "sq":
            codes, planes = read_sparse(blob[4:], count)
            codes[np.flatnonzero(codes)[planes[0]]] *= -1
            return _scaled(codes, np.frombuffer(blob, "<f4", 1))
        case "ternary":
            return _read_ternary(blob, count)
        case _:
            raise AssertionError(f"this client cannot read {scheme}")


# --- sparse codes ------------------------------------------------------------------------------------------------


def write_sparse(codes: Integers) -> bytes:
    """Integers, mostly zero, without their signs."""
    where = np.flatnonzero(codes)
    low = max(int(math.log2(codes.size / max(where.size, 1))) - 2, 0)
    distances = np.diff(where, prepend=-1) - 1
    symbols = bytearray()
    for position, distance in zip(where, distances, strict=True):
        skips, rest = divmod(int(distance) >> low, 254)
        symbols += bytes([SKIP]) * skips + bytes([rest]) + bytes([LARGER]) * (abs(int(codes[position])) - 1)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    stream = deflate.compress(bytes(symbols)) + deflate.flush()
    planes = [np.packbits(distances >> bit & 1).tobytes() for bit in range(low)]
    return bytes([low]) + stream + b"".join(planes)


def read_sparse(blob: bytes, count: int) -> tuple[Integers, NDArray[np.bool_]]:
    """Magnitudes at their places, and the planes that the scheme has added."""
    low = blob[0]
    inflate = zlib.decompressobj(-15)
    symbols = inflate.decompress(blob[1:])
    assert inflate.eof
    size = sum(symbol < LARGER for symbol in symbols)
    tail = np.frombuffer(inflate.unused_data, np.uint8)
    if not size:
        return np.zeros(count, np.int64), np.zeros((1, 0), bool)
    planes = np.unpackbits(tail.reshape(-1, -(-size // 8)), axis=1)[:, :size].astype(bool)
    codes = np.zeros(count, np.int64)
    position, seen = -1, 0
    for symbol in symbols:
        if symbol == LARGER:
            codes[position] += 1
        elif symbol == SKIP:
            position += 254 << low
        else:
            position += (symbol << low) + 1 + sum(int(planes[bit, seen]) << bit for bit in range(low))
            codes[position] = 1
            seen += 1
    return codes, planes[low:]


def _write_sq(flat: NDArray[np.float32], number: float) -> bytes:
    peak, rms = float(np.abs(flat).max()), float(np.sqrt((flat.astype(np.float64) ** 2).mean()))
    step = np.nextafter(np.float32(max(number * rms, peak / 127)), np.float32(np.inf))
    codes = _rounded(flat / step).clip(-127, 127)
    signs = np.packbits(codes[codes != 0] < 0).tobytes()
    return struct.pack("<f", step) + write_sparse(codes) + signs


# --- rotation ----------------------------------------------------------------------------------------------------


def layout(count: int) -> tuple[int, int]:
    """Rows and columns of the matrix."""
    for length in (8192, 4096, 2048, 1024, 512, 256):
        blocks = -(-count // length)
        if 16 * (length * blocks - count) <= count:
            return length, blocks
    return 128, -(-count // 128)


def sylvester(length: int) -> Integers:
    """The Hadamard matrix."""
    matrix = np.ones((1, 1), np.int64)
    while len(matrix) < length:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def transform(columns: NDArray[Any]) -> NDArray[Any]:
    """H times some columns, as two smaller Hadamard matrices on either index of the row."""
    length = len(columns)
    outer = sylvester(1 << (length.bit_length() - 1) // 2)
    inner = sylvester(length // len(outer))
    cube = columns.reshape(len(outer), len(inner), -1)
    product: NDArray[Any] = np.einsum("ab,cd,bde->ace", outer, inner, cube, optimize=True)
    return product.reshape(columns.shape)


def diagonal(seed: bytes, length: int) -> Integers:
    """The signs of D, as a column."""
    bits = np.unpackbits(np.frombuffer(shake_128(seed).digest(length // 8), np.uint8))
    return (1 - 2 * bits.astype(np.int64)).reshape(-1, 1)


def _write_ternary(flat: NDArray[np.float32], share: float) -> bytes:
    length, blocks = layout(flat.size)
    seed = np.random.default_rng().bytes(4)
    x: NDArray[np.float64] = np.zeros(length * blocks)
    x[: flat.size] = flat
    x = np.reshape(x, (length, blocks))
    y = transform(diagonal(seed, length) * x)
    limit = NormalDist().inv_cdf(1 - share / 2) * np.sqrt((x**2).sum(axis=0))
    chosen = (np.abs(y) > limit) | ((np.abs(y) == np.abs(y).max(axis=0)) & (y != 0))
    q = (np.sign(y) * chosen).astype(np.int64)
    products = (y * q).sum(axis=0)
    scales = np.divide((x**2).sum(axis=0), products, out=np.zeros(blocks), where=products > 0)
    unit = np.nextafter(np.float32(scales.max() / 255), np.float32(np.inf))
    head = seed + struct.pack("<f", unit) + _rounded(scales / unit).clip(0, 255).astype(np.uint8).tobytes()
    codes = q.reshape(-1)
    return head + write_sparse(codes) + np.packbits(codes[codes != 0] < 0).tobytes()


def _read_ternary(blob: bytes, count: int) -> NDArray[np.float32]:
    length, blocks = layout(count)
    q, planes = read_sparse(blob[8 + blocks :], length * blocks)
    q[np.flatnonzero(q)[planes[0]]] *= -1
    rotated = diagonal(blob[:4], length) * transform(q.reshape(length, blocks))
    scales = np.frombuffer(blob, np.uint8, blocks, 8) * np.frombuffer(blob, "<f4", 1, 4)[0]
    return _scaled(rotated, scales).reshape(-1)[:count]


def _scaled(integers: NDArray[Any], scale: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    return np.multiply(integers.astype(np.float32), scale, dtype=np.float32)


def _rounded(scaled: NDArray[np.floating]) -> Integers:
    noise = np.random.default_rng().random(scaled.shape)
    return np.floor(scaled.astype(np.float64) + noise).astype(np.int64)


def _aligned(length: int) -> int:
    return -(-length // 8) * 8
