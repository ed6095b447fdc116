"""Where the weights lie in an ONNX file: the few lines of protobuf that it takes, so that nobody needs the onnx package for it.

Field numbers from onnx.proto: ``ModelProto.graph`` 7, ``GraphProto.initializer`` 5, ``TensorProto.dims`` 1,
``data_type`` 2, ``name`` 8, ``raw_data`` 9.
"""

from collections.abc import Iterator
from dataclasses import dataclass

_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 1, 2, 8, 9

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES = 10
"""Seven bits each of at most 64."""
_MORE = 0x80
"""Set in all bytes of a varint but the last."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """An initializer that is stored as raw bytes, little-endian.

    Attributes:
        name: Of the initializer.
        data_type: As ``TensorProto.DataType`` numbers it.
        dims: Shape.
        start: Where its bytes begin in the file.
        end: Behind their last.
    """

    name: bytes
    data_type: int
    dims: tuple[int, ...]
    start: int
    end: int


def find_tensors(model: bytes) -> list[RawTensor]:
    """The raw initializers of the main graph, in the order of the file.

    Args:
        model: An ONNX file.

    Raises:
        ValueError: If it is not well-formed protobuf.
    """
    tensors = []
    for field, wire, start, end in _fields(model, 0, len(model)):
        if (field, wire) == (_GRAPH, _BYTES):
            for inner, inner_wire, begin, stop in _fields(model, start, end):
                if (inner, inner_wire) == (_INITIALIZER, _BYTES):
                    tensor = _tensor(model, begin, stop)
                    if tensor is not None:
                        tensors.append(tensor)
    return tensors


def _tensor(model: bytes, start: int, end: int) -> RawTensor | None:
    name, data_type, dims, raw = b"", 0, list[int](), None
    for field, wire, begin, stop in _fields(model, start, end):
        if field == _DIMS:
            at = begin  # one number, or several packed
            while at < stop:
                value, at = _varint(model, at, stop)
                dims.append(value)
        elif field == _DATA_TYPE:
            data_type, _ = _varint(model, begin, stop)
        elif (field, wire) == (_NAME, _BYTES):
            name = model[begin:stop]
        elif (field, wire) == (_RAW_DATA, _BYTES):
            raw = begin, stop
    return None if raw is None else RawTensor(name, data_type, tuple(dims), *raw)


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Field number, wire type, and the span of the value, of each field of a message."""
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        wire = key & 7
        length = 0
        if wire == _BYTES:
            length, at = _varint(data, at, end)
        elif wire == _VARINT:
            length = _varint(data, at, end)[1] - at
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if length > end - at:
            raise ValueError(f"a field of {length} bytes at byte {at}, where {end - at} are left")
        yield key >> 3, wire, at, at + length
        at += length


def _varint(data: bytes, start: int, end: int) -> tuple[int, int]:
    """A number, and where the next thing begins."""
    value = 0
    for place, byte in enumerate(data[start : min(end, start + _VARINT_BYTES)]):
        value |= (byte % _MORE) << (7 * place)
        if byte < _MORE:
            return value, start + place + 1
    raise ValueError(f"no number at byte {start}")
