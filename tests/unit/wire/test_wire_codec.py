import struct

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from federation.errors import ConfigError, PeerError, Rejection
from federation.wire.codec import (
    MAX_MAGNITUDE,
    VERSION,
    Schema,
    _Entry,
    _Header,
    decode,
    decode_into,
    encode,
    max_encoded_bytes,
    schema_of,
)
from federation.wire.encodings import ENCODINGS, encoding_named

Arrays = dict[str, NDArray[np.float32]]
PREFIX = 12

SPECS = tuple(family.example for family in ENCODINGS.values())
"""One encoding of each family."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def arrays(rng: np.random.Generator) -> Arrays:
    return {
        "conv.weight": rng.normal(0, 1e-3, (8, 3, 5, 5)).astype(np.float32),
        "conv.bias": rng.normal(0, 1e-2, 8).astype(np.float32),
        "scalar": np.array(-0.25, dtype=np.float32),
        "empty": np.zeros((0, 7), dtype=np.float32),
        "still": np.zeros(33, dtype=np.float32),
        "fc.weight": rng.normal(0, 1, (10, 77)).astype(np.float32),
    }


def frame(encoding: str, entries: list[_Entry], blobs: list[bytes]) -> bytes:
    """Build a frame as a liar may: nothing is checked."""
    header = msgspec.msgpack.encode(_Header(encoding, tuple(entries)))
    data = struct.pack("<4sHHI", b"fdge", VERSION, 0, len(header)) + header
    for blob in blobs:
        data += bytes(-len(data) % 8) + blob
    return data


def refusal(data: bytes, schema: Schema, encoding: str) -> Rejection:
    with pytest.raises(PeerError) as caught:
        decode(data, schema, encoding)
    return caught.value.code


@pytest.mark.parametrize("encoding", SPECS)
def test_shapes_and_dtype_survive_in_the_order_of_names(
    encoding: str, arrays: Arrays, rng: np.random.Generator
) -> None:
    data = encode(arrays, encoding, rng)
    decoded = decode(data, schema_of(arrays), encoding)
    assert list(decoded) == sorted(arrays)
    assert {name: array.shape for name, array in decoded.items()} == schema_of(arrays)
    assert {array.dtype for array in decoded.values()} == {np.dtype(np.float32)}
    assert np.array_equal(decoded["still"], arrays["still"])
    assert decoded["scalar"] == arrays["scalar"], "a tensor that gains nothing is sent as it is"


def test_float32_is_exact(arrays: Arrays, rng: np.random.Generator) -> None:
    decoded = decode(encode(arrays, "float32", rng), schema_of(arrays), "float32")
    for name, array in arrays.items():
        assert np.array_equal(decoded[name], array)


@pytest.mark.parametrize("encoding", SPECS)
def test_decoding_writes_into_the_callers_buffers(
    encoding: str, arrays: Arrays, rng: np.random.Generator
) -> None:
    data = encode(arrays, encoding, rng)
    buffers = {name: np.full(array.shape, np.nan, dtype=np.float32) for name, array in arrays.items()}
    decode_into(data, buffers, encoding)
    for name, expected in decode(data, schema_of(arrays), encoding).items():
        assert np.array_equal(buffers[name], expected)


@pytest.mark.parametrize(
    "buffer",
    [np.zeros(64), np.zeros(128, np.float32)[::2], np.frombuffer(bytes(256), np.float32)],
    ids=["float64", "strided", "read-only"],
)
def test_buffers_that_cannot_be_written_in_place_are_the_callers_mistake(
    buffer: NDArray[np.float32], rng: np.random.Generator
) -> None:
    data = encode({"x": np.ones(64, dtype=np.float32)}, "int8", rng)
    with pytest.raises(ValueError, match="'x' must be"):
        decode_into(data, {"x": buffer}, "int8")


@pytest.mark.parametrize("encoding", SPECS)
def test_frozen_tensors_cost_no_bytes(encoding: str, rng: np.random.Generator) -> None:
    frozen = {"x": np.zeros(100_000, dtype=np.float32)}
    data = encode(frozen, encoding, rng)
    assert len(data) < 64
    assert np.array_equal(decode(data, schema_of(frozen), encoding)["x"], frozen["x"])
    lying = frame(encoding, [_Entry("x", (64,), "zero", (), 8)], [bytes(8)])
    assert refusal(lying, {"x": (64,)}, encoding) is Rejection.WRONG_LENGTH


@pytest.mark.parametrize("spec", SPECS)
def test_a_family_announces_itself_and_its_canonical_form(spec: str) -> None:
    encoding = encoding_named(spec)
    assert encoding.spec == spec
    assert ENCODINGS[encoding.name].example == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int8:4", "takes no parameter"),
        ("int8:", "takes no parameter"),
        ("", "Use one of"),
        (":8", "Use one of"),
        ("flaot16", "did you mean 'float16'"),
        ("x" * 10_000, "Use one of"),
    ],
)
def test_names_that_are_no_encoding_say_what_is(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        encoding_named(spec)
    assert len(str(caught.value)) < 400


def test_float16_error_is_relative_also_for_huge_and_tiny_tensors(rng: np.random.Generator) -> None:
    for magnitude in (1e-37, 1e-12, 1e-4, 1.0, 65504.0, 1e6, 1e29):
        values = (rng.uniform(-1, 1, 5000) * magnitude).astype(np.float32)
        decoded = decode(encode({"x": values}, "float16", rng), {"x": (5000,)}, "float16")["x"]
        bound = np.maximum(np.abs(values) * 2.0**-11, np.abs(values).max() * 2.0**-39) + 2.0**-149
        assert np.all(np.abs(decoded.astype(np.float64) - values) <= bound), magnitude


def test_int8_error_is_below_one_step(rng: np.random.Generator) -> None:
    for magnitude in (1e-40, 1e-6, 1.0, 1e25):
        values = (rng.normal(0, 1, 200_000) * magnitude).astype(np.float32)
        decoded = decode(encode({"x": values}, "int8", rng), {"x": values.shape}, "int8")["x"]
        step = max(float(np.abs(values).max()) / 127, float(np.finfo(np.float32).tiny)) * (1 + 1e-6)
        assert np.all(np.abs(decoded.astype(np.float64) - values) < step * (1 + 2.0**-17)), magnitude


def test_int8_is_unbiased(rng: np.random.Generator) -> None:
    # 100,000 repeats of each of four fractions of a step; 127 fixes the step at exactly 1.
    fractions = np.array([0.1, 0.5, -0.75, 126.9], dtype=np.float32)
    repeats = 100_000
    values = np.concatenate([np.repeat(fractions, repeats), np.array([127.0], dtype=np.float32)])
    decoded = decode(encode({"x": values}, "int8", rng), {"x": values.shape}, "int8")["x"]
    means = decoded[:-1].reshape(4, repeats).mean(axis=1, dtype=np.float64)
    six_sigma = 6 * 0.5 / np.sqrt(repeats)
    assert np.all(np.abs(means - fractions) < six_sigma)
    assert decoded[-1] == 127.0
    assert set(np.unique(decoded[:repeats])) == {0.0, 1.0}


def test_int8_depends_on_the_generator_only(arrays: Arrays) -> None:
    first, again, other = (encode(arrays, "int8", np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("encoding", SPECS)
def test_bound_holds(encoding: str, arrays: Arrays, rng: np.random.Generator) -> None:
    bound = max_encoded_bytes(schema_of(arrays), encoding)
    length = len(encode(arrays, encoding, rng))
    assert length <= bound
    if encoding in ("float32", "float16", "int8"):  # of the others the length depends on the values
        frozen = arrays["still"].nbytes
        assert bound <= length + frozen + 16 * len(arrays)
    many = {f"layer{i}.bias": np.ones(1 + i % 7, dtype=np.float32) for i in range(300)}
    assert len(encode(many, encoding, rng)) <= max_encoded_bytes(schema_of(many), encoding)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2 * MAX_MAGNITUDE])
@pytest.mark.parametrize("encoding", SPECS)
def test_diverged_training_is_the_operators_business(
    encoding: str, bad: float, rng: np.random.Generator
) -> None:
    values = np.zeros(100, dtype=np.float32)
    values[41] = bad
    with pytest.raises(ConfigError, match=r"'fc'.*diverged"):
        encode({"fc": values}, encoding, rng)


def test_encode_refuses_other_dtypes_and_unknown_encodings(rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match="float64"):
        encode({"x": np.zeros(3)}, "float32", rng)  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"did you mean 'int8'.*Use one of float32, float16, int8"):
        encode({}, "int9", rng)
    with pytest.raises(ConfigError):
        max_encoded_bytes({}, "int9")
    assert refusal(b"", {}, "int9") is Rejection.WRONG_ENCODING


def test_non_contiguous_tensors_are_sent_in_row_order(rng: np.random.Generator) -> None:
    array = rng.normal(size=(6, 4)).astype(np.float32).T
    assert np.array_equal(decode(encode({"x": array}, "float32", rng), {"x": (4, 6)}, "float32")["x"], array)


def test_wrong_tensors_each_have_their_code(arrays: Arrays, rng: np.random.Generator) -> None:
    data = encode(arrays, "int8", rng)
    schema = dict(schema_of(arrays))
    assert refusal(data, schema, "float32") is Rejection.WRONG_ENCODING
    assert refusal(data, schema | {"more": ()}, "int8") is Rejection.MISSING_TENSOR
    fewer = {name: shape for name, shape in schema.items() if name != "conv.bias"} | {"pad": (500,)}
    assert refusal(data, {**fewer, "conv.bias_": (8,)}, "int8") is Rejection.MISSING_TENSOR
    assert refusal(data, schema | {"fc.weight": (77, 10)}, "int8") is Rejection.WRONG_SHAPE
    unsorted = frame(
        "float32",
        [_Entry("y", (), "float32", (), 4), _Entry("x", (), "float32", (), 4)],
        [bytes(4), bytes(4)],
    )
    assert refusal(unsorted, {"x": (), "y": ()}, "float32") is Rejection.MALFORMED
    extra = frame(
        "float32", [_Entry("x", (), "float32", (), 4), _Entry("y", (), "float32", (), 0)], [bytes(4)]
    )
    assert refusal(extra, {"x": ()}, "float32") is Rejection.EXTRA_TENSOR


def test_encoding_must_be_the_plans(rng: np.random.Generator) -> None:
    values = {"x": np.ones(64, dtype=np.float32)}
    assert refusal(encode(values, "int8", rng), {"x": (64,)}, "float16") is Rejection.WRONG_ENCODING
    smuggled = frame("float16", [_Entry("x", (64,), "int8", (1.0,), 64)], [bytes(64)])
    assert refusal(smuggled, {"x": (64,)}, "float16") is Rejection.WRONG_ENCODING


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(value: float) -> None:
    blob = np.array([0, value, 1, 2], dtype="<f4").tobytes()
    assert refusal(
        frame("float32", [_Entry("x", (4,), "float32", (), 16)], [blob]), {"x": (4,)}, "float32"
    ) is (Rejection.NON_FINITE)
    halves = np.array([0, value] * 16, dtype="<f2").tobytes()
    entries = [_Entry("x", (32,), "float16", (1.0,), 64)]
    assert refusal(frame("float16", entries, [halves]), {"x": (32,)}, "float16") is Rejection.NON_FINITE


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, 1e-40, 5e-324, 1e39, float("inf"), float("-inf"), float("nan"), 1e38]
)
@pytest.mark.parametrize("encoding", ["int8", "float16"])
def test_scales_that_are_no_scale_are_refused(encoding: str, scale: float) -> None:
    codes = np.full(64, 127, dtype="i1") if encoding == "int8" else np.full(64, 8.0, dtype="<f2")
    entries = [_Entry("x", (64,), encoding, (scale,), codes.nbytes)]
    assert (
        refusal(frame(encoding, entries, [codes.tobytes()]), {"x": (64,)}, encoding) is Rejection.NON_FINITE
    )


@pytest.mark.parametrize("parameters", [(), (1.0, 1.0)])
def test_wrong_number_of_parameters_is_refused(parameters: tuple[float, ...]) -> None:
    data = frame("int8", [_Entry("x", (64,), "int8", parameters, 64)], [bytes(64)])
    assert refusal(data, {"x": (64,)}, "int8") is Rejection.MALFORMED


def test_code_off_the_grid_is_refused() -> None:
    data = frame("int8", [_Entry("x", (64,), "int8", (1.0,), 64)], [b"\x80" * 64])
    assert refusal(data, {"x": (64,)}, "int8") is Rejection.MALFORMED


def test_lengths_that_lie_are_refused(rng: np.random.Generator) -> None:
    values = {"x": np.ones(64, dtype=np.float32), "y": np.ones(32, dtype=np.float32)}
    schema = schema_of(values)
    data = encode(values, "int8", rng)
    codes = {refusal(data[:cut], schema, "int8") for cut in range(len(data))}
    assert codes == {Rejection.WRONG_LENGTH}
    assert refusal(data + b"\0", schema, "int8") is Rejection.WRONG_LENGTH
    huge_header = data[:8] + (2**32 - 1).to_bytes(4, "little") + data[PREFIX:]
    assert refusal(huge_header, schema, "int8") is Rejection.WRONG_LENGTH
    for length in (0, 63, 65, 2**40):
        lying = frame("int8", [_Entry("x", (64,), "int8", (1.0,), length)], [bytes(64)])
        assert refusal(lying, {"x": (64,)}, "int8") is Rejection.WRONG_LENGTH


def test_a_huge_schema_is_not_allocated_before_the_lengths_are_checked() -> None:
    schema = {"x": (2**20, 2**19)}  # two TiB of float32
    lying = frame("int8", [_Entry("x", (2**20, 2**19), "int8", (1.0,), 2**39)], [bytes(64)])
    assert refusal(lying, schema, "int8") is Rejection.WRONG_LENGTH


def test_version_magic_gap_and_unknown_fields_are_refused(rng: np.random.Generator) -> None:
    values = {"name": np.ones(64, dtype=np.float32)}
    data = encode(values, "float16", rng)
    schema = schema_of(values)
    for at, byte in ((0, b"g"), (4, b"\x02"), (6, b"\x01")):
        assert refusal(data[:at] + byte + data[at + 1 :], schema, "float16") is Rejection.MALFORMED
    start = len(data) - 128
    header_end = PREFIX + int.from_bytes(data[8:12], "little")
    assert start > header_end, "the case needs a gap"
    assert (
        refusal(data[:header_end] + b"\x01" + data[header_end + 1 :], schema, "float16")
        is Rejection.MALFORMED
    )
    fields = [["x", [64], "int8", [1.0], 64, "more"]]
    header = msgspec.msgpack.encode(["int8", fields])
    strange = struct.pack("<4sHHI", b"fdge", VERSION, 0, len(header)) + header
    assert refusal(strange, {"x": (64,)}, "int8") is Rejection.MALFORMED


def test_every_int8_code_is_reached_only_within_the_grid(rng: np.random.Generator) -> None:
    values = np.linspace(-3.3, 3.3, 100_001, dtype=np.float32)
    coded = encoding_named("int8").encode(values, float(np.abs(values).max()), rng)
    codes = np.frombuffer(coded.blob, dtype="i1")
    assert int(codes.min()) >= -127
    assert set(np.unique(codes)) == set(range(-127, 128))
