"""Blobs that lie: each is refused with a reason, and no lie makes the receiver allocate."""

import struct
import tracemalloc
import zlib

import msgspec
import numpy as np
import pytest

from federation.errors import PeerError, Rejection
from federation.wire.codec import VERSION, _Entry, _Header, decode, encode, max_encoded_bytes

COUNT = 1024
SHAPE = (32, 32)
LARGER, SKIP = 254, 255


def deflated(symbols: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(symbols) + deflate.flush()


def gaps(symbols: bytes, tail: bytes = b"", low: int = 0) -> bytes:
    return bytes([low]) + deflated(symbols) + tail


def sq(symbols: bytes, tail: bytes = b"", *, step: float = 1.0, low: int = 0) -> bytes:
    return struct.pack("<f", step) + gaps(symbols, tail, low)


def ternary(symbols: bytes, tail: bytes = b"", *, unit: float = 1.0) -> bytes:
    return b"seed" + struct.pack("<f", unit) + b"\x01" + gaps(symbols, tail)


def frame(spec: str, blob: bytes, shape: tuple[int, ...] = SHAPE, scheme: str = "") -> bytes:
    entry = _Entry("x", shape, scheme or spec.partition(":")[0], (), len(blob))
    header = msgspec.msgpack.encode(_Header(spec, (entry,)))
    data = struct.pack("<4sHHI", b"fdge", VERSION, 0, len(header)) + header
    return data + bytes(-len(data) % 8) + blob if blob else data


def refusal(spec: str, blob: bytes, shape: tuple[int, ...] = SHAPE) -> tuple[Rejection, str]:
    with pytest.raises(PeerError) as caught:
        decode(frame(spec, blob, shape), {"x": shape}, spec)
    return caught.value.code, caught.value.detail


def test_the_liars_tools_can_also_tell_the_truth() -> None:
    # 2 zeros, +1; 0 zeros, -3; 254 zeros, 1 zero, +2
    blob = sq(bytes([2, 0, LARGER, LARGER, SKIP, 1, LARGER]), b"\x40", step=0.5)
    values = decode(frame("sq:16", blob), {"x": SHAPE}, "sq:16")["x"].reshape(-1)
    assert {at: values[at] for at in np.flatnonzero(values)} == {2: 0.5, 3: -1.5, 259: 1.0}
    nothing = decode(frame("sq:16", sq(b"")), {"x": SHAPE}, "sq:16")["x"]
    assert not nothing.any()
    rotated = decode(frame("ternary:0.01", ternary(bytes([5]), b"\x80")), {"x": SHAPE}, "ternary:0.01")["x"]
    assert np.array_equal(np.abs(rotated), np.ones(SHAPE))


def test_low_bits_belong_to_gaps() -> None:
    # low = 3: 8 * 1 + 5 zeros, then 254 * 8 is too far for 1,024 values, then 8 * 2 + 2 zeros
    planes = b"\x80" + b"\x40" + b"\x80"  # bits 0, 1 and 2 of 5 and 2
    blob = sq(bytes([1, 2]), planes + b"\x40", low=3)
    values = decode(frame("sq:16", blob), {"x": SHAPE}, "sq:16")["x"].reshape(-1)
    assert {at: values[at] for at in np.flatnonzero(values)} == {13: 1.0, 32: -1.0}
    code, detail = refusal("sq:16", sq(bytes([SKIP, 1]), planes + b"\0", low=3))
    assert (code, "beyond" in detail) == (Rejection.MALFORMED, True)


@pytest.mark.parametrize(
    ("blob", "code", "detail"),
    [
        (b"", Rejection.WRONG_LENGTH, "no step"),
        (b"\0\0\x80", Rejection.WRONG_LENGTH, "no step"),
        (struct.pack("<f", 1.0), Rejection.MALFORMED, "low bits"),
        (sq(b"", low=16), Rejection.MALFORMED, "low bits"),
        (struct.pack("<f", 1.0) + b"\0", Rejection.WRONG_LENGTH, "do not end"),
        (struct.pack("<f", 1.0) + b"\0\xff\xff\xff", Rejection.MALFORMED, "inflated"),
        (sq(bytes([1]))[:-1], Rejection.WRONG_LENGTH, "do not end"),
        (sq(bytes([1])), Rejection.WRONG_LENGTH, "0 bytes after the gaps of 1"),
        (sq(bytes([1]), b"\0\0"), Rejection.WRONG_LENGTH, "2 bytes after the gaps of 1"),
        (sq(bytes([1]), b"\0", low=1), Rejection.WRONG_LENGTH, "1 bytes after the gaps of 1"),
        (sq(bytes(9), b"\0"), Rejection.WRONG_LENGTH, "after the gaps of 9"),
        (sq(bytes([253, 253, 253, 253, 8]), b"\0"), Rejection.MALFORMED, "beyond the 1024"),
        (sq(bytes([SKIP] * 5)), Rejection.MALFORMED, "beyond the 1024"),
        (sq(bytes(1025), bytes(129)), Rejection.MALFORMED, "beyond the 1024"),
        (sq(bytes([LARGER])), Rejection.MALFORMED, "before the first"),
        (sq(bytes([SKIP, LARGER])), Rejection.MALFORMED, "without an integer"),
        (sq(bytes([3, SKIP, LARGER]), b"\0"), Rejection.MALFORMED, "without an integer"),
        (sq(bytes([0] + [LARGER] * 127), b"\0"), Rejection.MALFORMED, "beyond 127"),
        (sq(bytes([0] + [LARGER] * 4000), b"\0"), Rejection.MALFORMED, "beyond 127"),
        (sq(bytes([0] + [LARGER] * 6144), b"\0"), Rejection.WRONG_LENGTH, "do not end within 6144"),
    ],
)
def test_sparse_codes_that_lie(blob: bytes, code: Rejection, detail: str) -> None:
    found, text = refusal("sq:16", blob)
    assert found is code
    assert detail in text


def test_the_largest_magnitude_is_taken() -> None:
    blob = sq(bytes([0] + [LARGER] * 126), b"\x80")
    assert decode(frame("sq:16", blob), {"x": SHAPE}, "sq:16")["x"][0, 0] == -127


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-40, float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("spec", ["sq:16", "topk:0.01", "ternary:0.01", "rotated1", "rotated2", "int4"])
def test_scales_that_are_no_scale(spec: str, scale: float) -> None:
    single = struct.pack("<f", scale)
    blob = {
        "sq:16": sq(bytes([1]), b"\0", step=scale),
        "topk:0.01": sq(bytes([1]), b"\x7f", step=scale),
        "ternary:0.01": ternary(bytes([1]), b"\0", unit=scale),
        "rotated1": b"seed" + single + b"\x01" + bytes(128),
        "rotated2": b"seed" + single + b"\x01" + bytes(256),
        "int4": single[2:] * 8 + b"\x99" * 512,
    }[spec]
    assert refusal(spec, blob)[0] is Rejection.NON_FINITE


@pytest.mark.parametrize(
    ("spec", "blob", "code"),
    [
        ("topk:0.01", sq(bytes([1]), b"\x80"), Rejection.MALFORMED),  # the code -128
        ("topk:0.01", sq(bytes([1, LARGER]), b"\x01"), Rejection.MALFORMED),
        ("topk:0.01", sq(bytes([1]), b"\x01\x01"), Rejection.WRONG_LENGTH),
        ("topk:0.01", sq(bytes([1])), Rejection.WRONG_LENGTH),
        ("topk:0.01", b"\0", Rejection.WRONG_LENGTH),
        ("ternary:0.01", ternary(bytes([1, LARGER]), b"\0"), Rejection.MALFORMED),
        ("ternary:0.01", ternary(bytes([1]), b"\0\0"), Rejection.WRONG_LENGTH),
        ("ternary:0.01", ternary(b"")[:8], Rejection.WRONG_LENGTH),
        ("ternary:0.01", b"", Rejection.WRONG_LENGTH),
        ("rotated1", b"seed" + struct.pack("<f", 1) + b"\x01" + bytes(127), Rejection.WRONG_LENGTH),
        ("rotated2", b"seed" + struct.pack("<f", 1) + b"\x01" + bytes(255), Rejection.WRONG_LENGTH),
        ("int4", b"\x80\x3f" * 8 + b"\x99" * 511, Rejection.WRONG_LENGTH),
        ("int4", b"\x80\x3f" * 8 + b"\x99" * 511 + b"\x09", Rejection.MALFORMED),  # the code -8
    ],
)
def test_other_blobs_that_lie(spec: str, blob: bytes, code: Rejection) -> None:
    assert refusal(spec, blob)[0] is code


@pytest.mark.parametrize("spec", ["sq:16", "topk:0.01", "ternary:0.01", "rotated1", "int4", "int8"])
def test_a_scheme_of_another_encoding_is_refused(spec: str) -> None:
    other = "float16"
    data = frame(spec, bytes(2 * COUNT), scheme=other)
    with pytest.raises(PeerError, match="sent as 'float16'") as caught:
        decode(data, {"x": SHAPE}, spec)
    assert caught.value.code is Rejection.WRONG_ENCODING


def test_the_parameter_must_be_the_plans() -> None:
    rng = np.random.default_rng(5)
    data = encode({"x": rng.normal(size=SHAPE).astype(np.float32)}, "sq:16", rng)
    with pytest.raises(PeerError, match="encoded as 'sq:16', not 'sq:2'"):
        decode(data, {"x": SHAPE}, "sq:2")


def peak_of_decoding(data: bytes, spec: str, shape: tuple[int, ...]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(PeerError):
            decode(data, {"x": shape}, spec)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("symbol", [0, LARGER, SKIP])
def test_a_frame_that_expands_without_bound_is_cut_off(symbol: int) -> None:
    shape = (1000, 1000)
    bomb = sq(bytes([symbol]) * (1 << 26))  # 64 MiB in 64 KiB
    data = frame("sq:16", bomb, shape)
    assert len(data) < max_encoded_bytes({"x": shape}, "sq:16")
    # float32 values, six symbols each, and what copies them while they grow
    assert peak_of_decoding(data, "sq:16", shape) < 7 * 4 * 1_000_000


def test_the_most_that_a_frame_can_make_of_itself_is_bounded() -> None:
    shape = (1000, 1000)
    many = sq(bytes(1_000_000) + bytes([LARGER]) * 2_900_000, bytes(125_000))
    assert peak_of_decoding(frame("sq:16", many, shape), "sq:16", shape) < 7 * 4 * 1_000_000


@pytest.mark.parametrize("spec", ["sq:16", "topk:0.01", "ternary:0.01", "rotated1", "rotated2", "int4"])
def test_mutated_frames_are_refused_or_decoded(spec: str) -> None:
    rng = np.random.default_rng(3)
    values = {"w": rng.standard_t(4, size=(64, 100)).astype(np.float32), "b": np.ones(9, dtype=np.float32)}
    good = encode(values, spec, rng)
    schema = {"w": (64, 100), "b": (9,)}
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for at in rng.integers(0, len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        try:
            decoded = decode(bytes(data), schema, spec)
        except PeerError:
            refused += 1
        else:
            assert all(np.isfinite(array).all() for array in decoded.values())
    assert refused
