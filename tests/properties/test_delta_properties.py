"""What must hold of every model delta, honest or not."""

import contextlib
import hashlib

from hypothesis import given
from hypothesis import strategies as st

from federation.errors import ReleaseError
from federation.task.model_delta import apply_delta, make_delta
from federation.task.onnx_tensors import find_tensors

contents = st.binary(max_size=400)


def tensor(name: bytes, data_type: int, raw: bytes) -> bytes:
    """A TensorProto by hand: dims, data_type, name, raw_data."""
    body = bytes((0x08, 4, 0x10, data_type, 0x42, len(name))) + name + b"\x4a" + number(len(raw)) + raw
    return b"\x2a" + number(len(body)) + body


def number(value: int) -> bytes:
    low = value & 0x7F
    return bytes((low,)) if value < 0x80 else bytes((low | 0x80,)) + number(value >> 7)


@st.composite
def models(draw: st.DrawFn) -> bytes:
    parts = draw(
        st.lists(
            st.tuples(
                st.sampled_from([b"a", b"b", b"c"]),
                st.sampled_from([1, 2, 3, 7, 10, 11]),
                st.sampled_from([0, 1, 4, 8, 16, 128]).flatmap(lambda size: st.binary(min_size=size, max_size=size)),
            ),
            max_size=4,
        )
    )  # fmt: skip
    graph = b"".join(tensor(*part) for part in parts)
    return b"\x08\x0a" + b"\x3a" + number(len(graph)) + graph + draw(contents)


@given(base=models() | contents, new=models() | contents.filter(bool))
def test_what_was_written_is_read_back(base: bytes, new: bytes) -> None:
    digest = hashlib.sha256(new).hexdigest()
    assert apply_delta(base, make_delta(base, new), length=len(new), sha256=digest) == new


@given(base=models(), new=models(), data=st.data())
def test_a_delta_that_was_tampered_with_makes_the_model_or_is_refused(
    base: bytes, new: bytes, data: st.DataObject
) -> None:
    delta = bytearray(make_delta(base, new))
    for _ in range(data.draw(st.integers(1, 4))):
        delta[data.draw(st.integers(0, len(delta) - 1))] = data.draw(st.integers(0, 255))
    refused_or_equal(base, bytes(delta), new)


@given(base=models(), new=models(), delta=contents)
def test_arbitrary_bytes_are_refused(base: bytes, new: bytes, delta: bytes) -> None:
    refused_or_equal(base, delta, new)


def refused_or_equal(base: bytes, delta: bytes, new: bytes) -> None:
    with contextlib.suppress(ReleaseError):
        made = apply_delta(base, delta, length=len(new), sha256=hashlib.sha256(new).hexdigest())
        assert made == new


@given(content=contents | models())
def test_a_walk_over_any_bytes_ends(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        for found in find_tensors(content):
            assert 0 <= found.start <= found.end <= len(content)
