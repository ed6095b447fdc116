"""Tensors to bytes and back: the frame around the encodings of ``federation.wire.encodings``.

A frame is::

    4 bytes   magic "fdge"
    2 bytes   version, little-endian
    2 bytes   zero
    4 bytes   length of the header, little-endian
    header    msgpack: the encoding and, per tensor, name, shape, scheme, parameters, length of its blob
    blobs     one per tensor in the header's order, each starting at a multiple of 8, gaps zero, nothing after the last

The receiver knows the schema (names, shapes and order of the tensors) from the model and trusts nothing else: every
length is compared with what the schema allows before anything is allocated.
"""

import struct
from collections.abc import Mapping
from math import inf, prod
from types import MappingProxyType
from typing import Annotated, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from federation.errors import ConfigError, PeerError, Rejection
from federation.wire.encodings import RAW, ZERO, Encoding, Scheme, encoding_named
from federation.wire.encodings.protocol import Coded, Values
from federation.wire.messages import decode_msgpack

Schema: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shape of each tensor by its name, in order."""

VERSION: Final = 1

_MAGIC: Final = b"fdge"
_PREFIX: Final = struct.Struct("<4sHHI")
_ALIGNMENT: Final = 8
_PARAMETER_BYTES: Final = 9
"""A float in msgpack."""

MAX_MAGNITUDE: Final = 2.0**100
"""Larger values are no update but a training that diverged; below it no encoding can overflow by its rounding."""

_MAX_ARRAY_GROWTH: Final = 4
"""How much longer the prefix of a long msgpack array is than that of an empty one."""

_HEADER_SLACK_BYTES: Final = 4096
"""By how much a foreign header may exceed ours and still be parsed, so that the refusal can name what is wrong."""

_VARIANCE: Final = "running_var"
"""How PyTorch's normalisation layers call the running variance of each channel. A channel that dies takes it from 1 to
almost 0; with a rounding error it may become negative, and its square root NaN. So variances are sent as they are."""

_NAMES_SHOWN: Final = 3


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One tensor in the header."""

    name: Annotated[str, Meta(max_length=512)]
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**40)], ...], Meta(max_length=32)]
    scheme: Annotated[str, Meta(max_length=64)]
    parameters: Annotated[tuple[float, ...], Meta(max_length=16)]
    length: Annotated[int, Meta(ge=0, le=2**48)]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What stands before the blobs."""

    encoding: Annotated[str, Meta(max_length=64)]
    tensors: Annotated[tuple[_Entry, ...], Meta(max_length=65536)]


def schema_of(arrays: Mapping[str, NDArray[np.float32]]) -> Schema:
    """The schema that ``arrays`` have."""
    return {name: array.shape for name, array in arrays.items()}


def encode(
    delta: Mapping[str, NDArray[np.float32]],
    spec: str,
    rng: np.random.Generator,
    noise: Mapping[str, float] = MappingProxyType({}),
) -> bytes:
    """Write tensors as one frame, in the order of their names.

    A tensor that the encoding would not make smaller is sent as it is, and so are running variances, which must not
    become negative by rounding; one that is all zero takes no bytes.

    Args:
        delta: Tensors of any shape (0-d and empty ones too), float32.
        spec: The encoding, such as ``sq:16``.
        rng: For stochastic rounding. Seed it from the operating system where privacy depends on it.
        noise: By tensor, the largest variance that an encoding that can be finer may add to a value, as a mean over the
            tensor (``federation.wire.noise``); tensors that are not named have no bound.

    Returns:
        The frame, at most ``max_encoded_bytes(schema_of(delta), spec)`` bytes.

    Raises:
        ConfigError: If the encoding is unknown, a tensor is not float32, or a value is NaN, infinite or beyond
            ``MAX_MAGNITUDE``: local training diverged, which the device's operator must hear about.
    """
    chosen = encoding_named(spec)
    entries, blobs = [], []
    for name in sorted(delta):
        coded = _encode_tensor(name, delta[name], chosen, rng, noise.get(name, inf))
        entries.append(_Entry(name, delta[name].shape, coded.scheme, coded.parameters, len(coded.blob)))
        blobs.append(coded.blob)
    header = msgspec.msgpack.encode(_Header(spec, tuple(entries)))
    parts: list[bytes | memoryview] = [_PREFIX.pack(_MAGIC, VERSION, 0, len(header)), header]
    end = _PREFIX.size + len(header)
    for blob in blobs:
        if len(blob):
            parts += [bytes(_aligned(end) - end), blob]
            end = _aligned(end) + len(blob)
    return b"".join(parts)


def decode(data: bytes | memoryview, schema: Schema, spec: str) -> dict[str, NDArray[np.float32]]:
    """Read a foreign frame into new arrays.

    Args:
        data: The frame, from anywhere.
        schema: The tensors that it must hold. Trusted: so much is allocated, once the frame's lengths are checked.
        spec: The encoding that it must be in.

    Returns:
        The tensors in the order of their names.

    Raises:
        PeerError: ``malformed``, ``wrong_length``, ``wrong_encoding``, ``missing_tensor``, ``extra_tensor``,
            ``wrong_shape`` or ``non_finite``; nothing else, whatever the bytes.
    """
    blobs = _open(data, schema, spec)
    out = {entry.name: np.empty(entry.shape, dtype=np.float32) for entry, _, _ in blobs}
    _fill(blobs, out)
    return out


def decode_into(data: bytes | memoryview, out: Mapping[str, NDArray[np.float32]], spec: str) -> None:
    """Read a foreign frame into the caller's buffers.

    Args:
        data: The frame, from anywhere.
        out: The tensors that it must hold, float32, C-contiguous, writable. Their contents are undefined after a
            refusal.
        spec: The encoding that it must be in.

    Raises:
        PeerError: As :func:`decode`.
        ValueError: If a buffer is not float32, contiguous and writable.
    """
    for name, buffer in out.items():
        if buffer.dtype != np.float32 or not (buffer.flags.c_contiguous and buffer.flags.writeable):
            raise ValueError(f"buffer {name!r} must be float32, C-contiguous and writable")
    _fill(_open(data, schema_of(out), spec), out)


def max_encoded_bytes(schema: Schema, spec: str) -> int:
    """Upper bound of a frame's length, to refuse a lying length before a byte is received.

    Raises:
        ConfigError: If the encoding is unknown.
    """
    chosen = encoding_named(spec)
    total = _PREFIX.size + _ALIGNMENT - 1 + len(msgspec.msgpack.encode(_Header(chosen.spec, ())))
    total += _MAX_ARRAY_GROWTH
    for name, shape in schema.items():
        total += max(
            len(msgspec.msgpack.encode(entry)) + _aligned(entry.length)
            for entry in _longest_entries(name, shape, chosen)
        )
    return total


def _encode_tensor(
    name: str, array: NDArray[np.float32], encoding: Encoding, rng: np.random.Generator, noise: float
) -> Coded:
    if array.dtype != np.float32:
        raise ConfigError(f"tensor {name!r} is {array.dtype}, only float32 is sent: exclude or convert it")
    values = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar a vector
    peak = max(float(values.max()), -float(values.min())) if values.size else 0.0
    if not peak <= MAX_MAGNITUDE:  # also true for NaN
        raise ConfigError(
            f"tensor {name!r} holds NaN, infinity or a value beyond {MAX_MAGNITUDE:.0e}: training diverged, lower"
            " learning_rate or check the data"
        )
    if not peak:
        return Coded(ZERO.name, (), b"")
    raw = RAW.encode(values, peak, rng)
    if name.endswith(_VARIANCE):
        return raw
    coded = encoding.encode(values, peak, rng, noise)
    return raw if _cost(raw) <= _cost(coded) else coded


def _cost(coded: Coded) -> int:
    return _aligned(len(coded.blob)) + _PARAMETER_BYTES * len(coded.parameters)


_Blob: TypeAlias = tuple[_Entry, Scheme, memoryview]


def _open(data: bytes | memoryview, schema: Schema, spec: str) -> list[_Blob]:
    """Check all but the contents of the blobs, and find these."""
    try:
        encoding = encoding_named(spec)
    except ConfigError as error:
        raise PeerError(Rejection.WRONG_ENCODING, str(error)) from error
    view = memoryview(data).cast("B")
    header, end = _read_header(view, schema, encoding)
    schemes = _schemes(encoding)
    blobs: list[_Blob] = []
    for entry in header.tensors:
        start = _aligned(end) if entry.length else end
        if start + entry.length > len(view):
            raise PeerError(
                Rejection.WRONG_LENGTH, f"tensor {entry.name!r} ends beyond the {len(view)} bytes"
            )
        if any(view[end:start]):
            raise PeerError(Rejection.MALFORMED, f"the gap before tensor {entry.name!r} is not zero")
        end = start + entry.length
        blobs.append((entry, schemes[entry.scheme], view[start:end]))
    if end != len(view):
        raise PeerError(Rejection.WRONG_LENGTH, f"{len(view) - end} bytes after the last tensor")
    return blobs


def _fill(blobs: list[_Blob], out: Mapping[str, NDArray[np.float32]]) -> None:
    for entry, scheme, blob in blobs:
        values: Values = out[entry.name].reshape(-1)
        if not values.size:
            continue
        try:
            scheme.decode_into(blob, entry.parameters, values)
        except PeerError as error:
            raise PeerError(error.code, f"tensor {entry.name!r}: {error.detail}") from error


def _read_header(view: memoryview, schema: Schema, encoding: Encoding) -> tuple[_Header, int]:
    """Parse and check all that stands before the blobs; return it and where it ends."""
    if len(view) < _PREFIX.size:
        raise PeerError(Rejection.WRONG_LENGTH, f"a frame of {len(view)} bytes, {_PREFIX.size} are the least")
    magic, version, zero, length = _PREFIX.unpack_from(view)
    if (magic, version, zero) != (_MAGIC, VERSION, 0):
        raise PeerError(Rejection.MALFORMED, f"not a frame of version {VERSION}")
    end = _PREFIX.size + length
    if end > len(view) or length > _max_header_bytes(schema, encoding) + _HEADER_SLACK_BYTES:
        raise PeerError(Rejection.WRONG_LENGTH, f"a header of {length} bytes in a frame of {len(view)}")
    header = decode_msgpack(bytes(view[_PREFIX.size : end]), _Header)
    if header.encoding != encoding.spec:
        raise PeerError(Rejection.WRONG_ENCODING, f"encoded as {header.encoding!r}, not {encoding.spec!r}")
    _check_tensors(header, schema, _schemes(encoding))
    return header, end


def _check_tensors(header: _Header, schema: Schema, schemes: Mapping[str, Scheme]) -> None:
    names = [entry.name for entry in header.tensors]
    if missing := sorted(set(schema) - set(names)):
        raise PeerError(Rejection.MISSING_TENSOR, _listed(missing))
    if extra := [name for name in names if name not in schema]:
        raise PeerError(Rejection.EXTRA_TENSOR, _listed(extra))
    if names != sorted(schema):
        raise PeerError(Rejection.MALFORMED, "the tensors are repeated or not in the order of their names")
    for entry in header.tensors:
        if entry.shape != tuple(schema[entry.name]):
            raise PeerError(
                Rejection.WRONG_SHAPE,
                f"tensor {entry.name!r} is {entry.shape} instead of {tuple(schema[entry.name])}",
            )
        scheme = schemes.get(entry.scheme)
        if scheme is None:
            raise PeerError(Rejection.WRONG_ENCODING, f"tensor {entry.name!r} is sent as {entry.scheme!r}")
        if len(entry.parameters) != scheme.parameters:
            raise PeerError(
                Rejection.MALFORMED,
                f"tensor {entry.name!r} has {len(entry.parameters)} parameters instead of {scheme.parameters}",
            )
        limit = scheme.max_bytes(prod(entry.shape))
        if entry.length > limit:
            raise PeerError(
                Rejection.WRONG_LENGTH, f"tensor {entry.name!r} has {entry.length} bytes, at most {limit}"
            )


def _schemes(encoding: Encoding) -> dict[str, Scheme]:
    """What a frame may hold, by name."""
    schemes: tuple[Scheme, ...] = (ZERO, RAW, *encoding.schemes)
    return {scheme.name: scheme for scheme in schemes}


def _longest_entries(name: str, shape: tuple[int, ...], encoding: Encoding) -> list[_Entry]:
    """The entries of a tensor that our encoder may write, each at its longest."""
    count = prod(shape)
    entries = [
        _Entry(name, shape, scheme.name, (1.0,) * scheme.parameters, scheme.max_bytes(count))
        for scheme in (RAW, *encoding.schemes)
    ]
    raw, *coded = entries
    if name.endswith(_VARIANCE):
        return [raw]
    if coded and count and all(_room(entry) < _room(raw) for entry in coded):
        return coded  # then the raw form is never the shorter one
    return entries


def _room(entry: _Entry) -> int:
    return _aligned(entry.length) + _PARAMETER_BYTES * len(entry.parameters)


def _max_header_bytes(schema: Schema, encoding: Encoding) -> int:
    entries = tuple(
        max(_longest_entries(name, shape, encoding), key=lambda entry: len(msgspec.msgpack.encode(entry)))
        for name, shape in schema.items()
    )
    return len(msgspec.msgpack.encode(_Header(encoding.spec, entries)))


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name[:80]) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
