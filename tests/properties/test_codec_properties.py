"""What must hold of every frame, honest or not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from federation.errors import PeerError
from federation.wire.codec import MAX_MAGNITUDE, decode, encode, max_encoded_bytes, schema_of
from federation.wire.encodings import ENCODINGS

Arrays = dict[str, NDArray[np.float32]]

LARGEST = float(np.float32(MAX_MAGNITUDE))

tensors = hnp.arrays(
    dtype=np.float32,
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    elements=st.floats(-LARGEST, LARGEST, width=32),
)
models = st.dictionaries(st.text(max_size=20), tensors, max_size=5)
encodings = st.sampled_from([family.example for family in ENCODINGS.values()])
seeds = st.integers(0, 2**32 - 1)


def assert_valid_or_refused(data: bytes, arrays: Arrays, encoding: str) -> None:
    schema = schema_of(arrays)
    try:
        decoded = decode(data, schema, encoding)
    except PeerError:
        return
    assert list(decoded) == sorted(schema)
    for name, array in decoded.items():
        assert array.shape == schema[name]
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


def largest_error(values: NDArray[np.float64], encoding: str) -> float:
    """What the docstring of an encoding promises for the values of one tensor."""
    if encoding == "float32" or not values.any():
        return 0.0
    peak = float(np.abs(values).max())
    rms = peak * float(np.sqrt(np.mean((values / peak) ** 2)))
    grid = (1 + 2.0**-16) * peak / 127
    promised = {
        "float16": peak * 2.0**-11,
        "int8": grid,
        "int4": (1 + 2.0**-6) * peak / 7,
        "sq:16": max((1 + 2.0**-16) * 16 * rms, grid),
    }
    return promised[encoding] + 2.0**-125


@given(models, st.sampled_from(["float32", "float16", "int8", "int4", "sq:16"]), seeds)
def test_error_is_bounded_by_the_tensors_largest_value(arrays: Arrays, encoding: str, seed: int) -> None:
    data = encode(arrays, encoding, np.random.default_rng(seed))
    assert len(data) <= max_encoded_bytes(schema_of(arrays), encoding)
    decoded = decode(memoryview(data), schema_of(arrays), encoding)
    for name, array in arrays.items():
        wide = array.astype(np.float64)
        bound = largest_error(wide, encoding)
        assert np.all(np.abs(decoded[name] - wide) <= bound)


@given(models, encodings, seeds, st.data())
def test_single_bit_flip_is_refused_or_gives_finite_values(
    arrays: Arrays, encoding: str, seed: int, data: st.DataObject
) -> None:
    frame = bytearray(encode(arrays, encoding, np.random.default_rng(seed)))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    assert_valid_or_refused(bytes(frame), arrays, encoding)


@given(models, encodings, st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(arrays: Arrays, encoding: str, tail: bytes) -> None:
    assert_valid_or_refused(tail, arrays, encoding)
    assert_valid_or_refused(b"fdge\x01\0\0\0" + tail, arrays, encoding)


@given(models, encodings, seeds, st.data())
def test_truncated_and_spliced_frames_are_refused(
    arrays: Arrays, encoding: str, seed: int, data: st.DataObject
) -> None:
    frame = encode(arrays, encoding, np.random.default_rng(seed))
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(PeerError):
        decode(frame[:cut], schema_of(arrays), encoding)
    assert_valid_or_refused(frame[:cut] + data.draw(st.binary(max_size=40)), arrays, encoding)
