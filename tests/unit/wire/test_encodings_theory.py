"""Each encoding against what its docstring promises: unbiasedness, error, bits for each value."""

from collections.abc import Callable
from math import log2

import numpy as np
import pytest
from numpy.typing import NDArray

from federation.errors import ConfigError
from federation.wire.codec import decode, encode, max_encoded_bytes, schema_of
from federation.wire.encodings import ENCODINGS, encoding_named
from federation.wire.encodings.grid import INT8, Int4
from federation.wire.encodings.rotation import hadamard, layout_of, signs_of
from federation.wire.encodings.sq import SQ
from federation.wire.encodings.ternary import ternary_error

Matrix = NDArray[np.float32]

SIX_SIGMA = 6.0
"""A bound on a mean that an unbiased encoding misses once in 10^9 times."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def gaussian(rng: np.random.Generator, shape: tuple[int, ...] = (128, 512)) -> Matrix:
    return rng.normal(0, 1e-3, shape).astype(np.float32)


def update_like(rng: np.random.Generator, shape: tuple[int, ...] = (128, 512)) -> Matrix:
    """Heavy tails, and rows of different size: what training gives."""
    rows = rng.lognormal(0, 0.7, (shape[0], 1))
    return (rng.standard_t(5, shape) * rows * 1e-3).astype(np.float32)


def sparse(rng: np.random.Generator) -> Matrix:
    values = np.zeros((64, 256), dtype=np.float32)
    values[rng.integers(64, size=40), rng.integers(256, size=40)] = rng.normal(size=40)
    return values


def through(values: Matrix, spec: str, rng: np.random.Generator) -> Matrix:
    frame = encode({"x": values}, spec, rng)
    return decode(frame, {"x": values.shape}, spec)["x"]


def squared_error(values: Matrix, decoded: Matrix) -> float:
    """In units of the squared norm."""
    wide = values.astype(np.float64)
    return float(((decoded - wide) ** 2).sum() / (wide**2).sum())


def entropy_bits(codes: NDArray[np.int8]) -> float:
    """Of one symbol, by the frequencies of all."""
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / codes.size
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("make", [gaussian, update_like, sparse])
@pytest.mark.parametrize("spec", ["int8", "int4", "sq:2", "sq:16", "sq:64"])
def test_stochastic_rounding_is_unbiased(
    spec: str, make: Callable[[np.random.Generator], Matrix], rng: np.random.Generator
) -> None:
    values = make(rng)[:, :64]
    repeats = 300
    total = np.zeros(values.shape)
    squares = np.zeros(values.shape)
    for _ in range(repeats):
        decoded = through(values, spec, rng).astype(np.float64)
        total += decoded
        squares += decoded**2
    error = total / repeats - values
    # Summed against the values' own signs and over everything: a bias of either kind would add up.
    variance = (squares / repeats - (total / repeats) ** 2).sum() / repeats
    assert abs((error * np.sign(values)).sum()) <= SIX_SIGMA * np.sqrt(variance) + 1e-12
    assert abs(error.sum()) <= SIX_SIGMA * np.sqrt(variance) + 1e-12


@pytest.mark.parametrize(
    ("spec", "tolerance"), [("rotated1", 0.01), ("rotated2", 0.01), ("ternary:0.01", 0.03)]
)
@pytest.mark.parametrize("make", [gaussian, update_like])
def test_rotations_are_unbiased(
    spec: str, tolerance: float, make: Callable[[np.random.Generator], Matrix], rng: np.random.Generator
) -> None:
    values = make(rng)
    wide = values.astype(np.float64)
    repeats = 40
    total = np.zeros(values.shape)
    noise = 0.0
    along = []
    for _ in range(repeats):
        decoded = through(values, spec, rng)
        total += decoded
        noise += squared_error(values, decoded)
        along.append(float((decoded * wide).sum() / (wide**2).sum()))
    # What is left of the error after averaging is the noise of an average, and the length is right each time.
    left = squared_error(values, (total / repeats).astype(np.float32))
    expected = noise / repeats**2
    assert left == pytest.approx(expected, rel=0.1)
    assert np.mean(along) == pytest.approx(1.0, abs=tolerance)
    # Large and small values alike: the mean estimate has slope one on the values, within each half of them.
    mean = total / repeats
    large = np.abs(wide) > np.median(np.abs(wide))
    slope = float((mean * wide)[large].sum() / (wide**2)[large].sum())
    deviation = np.sqrt(expected * (wide**2).mean() / (wide[large] ** 2).sum())
    assert abs(slope - 1) <= SIX_SIGMA * deviation + tolerance


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("rotated1", 0.5708), ("rotated2", 0.1331), ("ternary:0.04", 3.2656), ("ternary:0.01", 10.957)],
)
@pytest.mark.parametrize("make", [gaussian, update_like])
def test_rotations_have_the_error_of_the_gaussian_limit(
    spec: str, expected: float, make: Callable[..., Matrix], rng: np.random.Generator
) -> None:
    values = make(rng, (512, 1024))
    errors = [squared_error(values, through(values, spec, rng)) for _ in range(3)]
    # Of the largest coordinates a column has about 80, not exactly: their number varies, and tails are not quite Gaussian.
    assert np.mean(errors) == pytest.approx(expected, rel=0.1 if "ternary" in spec else 0.02)


def test_the_promised_error_of_ternary_is_its_formula() -> None:
    assert ternary_error(0.04) == pytest.approx(3.2656, rel=1e-3)
    assert ternary_error(0.01) == pytest.approx(10.957, rel=1e-3)


@pytest.mark.parametrize("spec", ["sq:16", "ternary:0.01"])
@pytest.mark.parametrize("bound", [20.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-4, 1e-9, 0.0])
def test_noise_stays_within_its_bound(spec: str, bound: float, rng: np.random.Generator) -> None:
    values = update_like(rng)
    power = float((values.astype(np.float64) ** 2).mean())
    frame = encode({"x": values}, spec, rng, {"x": bound * power})
    assert len(frame) <= max_encoded_bytes({"x": values.shape}, spec)
    error = squared_error(values, decode(frame, {"x": values.shape}, spec)["x"])
    finest = 0.25 * (np.abs(values).max() / 127) ** 2 / power  # that of int8, which is all there is below
    assert error <= max(1.15 * bound, finest)
    free = encode({"x": values}, spec, rng)
    if bound == 20:
        assert len(frame) == pytest.approx(len(free), rel=0.05), "a bound out of reach changes nothing"


@pytest.mark.parametrize("bound", [0.2, 0.1, 0.03])
def test_ternary_leaves_to_sq_what_it_cannot_make_fine_enough(bound: float, rng: np.random.Generator) -> None:
    values = update_like(rng)
    power = float((values.astype(np.float64) ** 2).mean())
    frame = encode({"x": values}, "ternary:0.05", rng, {"x": bound * power})
    assert len(frame) < 0.6 * values.size, "int8 would take a byte for each value"


@pytest.mark.parametrize("step", [1, 2, 4, 16, 64])
def test_sq_has_the_error_of_stochastic_rounding(step: float, rng: np.random.Generator) -> None:
    values = update_like(rng)
    wide = values.astype(np.float64)
    grid = max(step * np.sqrt((wide**2).mean()), np.abs(wide).max() / 127)
    fraction = np.abs(wide) / grid % 1
    expected = float((fraction * (1 - fraction)).sum() * grid**2 / (wide**2).sum())
    errors = [squared_error(values, through(values, f"sq:{step}", rng)) for _ in range(5)]
    assert np.mean(errors) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("step", [2, 4, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("make", [gaussian, update_like])
def test_sq_is_within_five_percent_of_the_entropy_of_its_symbols(
    step: float, make: Callable[..., Matrix], rng: np.random.Generator
) -> None:
    values = make(rng, (1024, 1024))
    coded = encoding_named(f"sq:{step}").encode(values, float(np.abs(values).max()), rng)
    codes, _ = SQ.integers(memoryview(coded.blob), values.size)
    assert coded.scheme == "sq"
    assert len(coded.blob) * 8 <= 1.05 * entropy_bits(codes) * values.size


@pytest.mark.parametrize("share", [0.005, 0.01, 0.04, 0.2])
def test_ternary_is_within_five_percent_of_the_entropy_of_its_symbols(
    share: float, rng: np.random.Generator
) -> None:
    values = gaussian(rng, (1024, 1024))
    coded = encoding_named(f"ternary:{share:g}").encode(values, float(np.abs(values).max()), rng)
    entropy = -share * log2(share) - (1 - share) * log2(1 - share) + share
    assert coded.scheme == "ternary"
    assert len(coded.blob) * 8 <= 1.05 * entropy * values.size


@pytest.mark.parametrize(
    ("spec", "bits"),
    [("float32", 32), ("float16", 16), ("int8", 8), ("int4", 4.125), ("rotated1", 1), ("rotated2", 2)],
)
def test_fixed_widths_are_as_promised(spec: str, bits: float, rng: np.random.Generator) -> None:
    values = gaussian(rng, (1024, 1024))
    assert len(encode({"x": values}, spec, rng)) * 8 / values.size == pytest.approx(bits, rel=0.005)


def test_topk_sends_the_largest_to_half_a_step(rng: np.random.Generator) -> None:
    values = update_like(rng)
    decoded = through(values, "topk:0.01", rng)
    kept = round(0.01 * values.size)
    threshold = np.sort(np.abs(values), axis=None)[-kept]
    sent = np.abs(values) >= threshold
    assert np.count_nonzero(decoded) == kept
    assert np.array_equal(decoded != 0, sent)
    half_a_step = np.abs(values).max() / 254
    assert np.all(np.abs(decoded - values)[sent] <= half_a_step * (1 + 1e-5))


def test_int4_error_is_below_a_step_of_the_block(rng: np.random.Generator) -> None:
    values = update_like(rng, (100, 77))  # the last block is not whole
    decoded = through(values, "int4", rng).reshape(-1).astype(np.float64)
    flat = values.reshape(-1)
    for at in range(0, flat.size, Int4.block):
        block = slice(at, at + Int4.block)
        step = np.abs(flat[block]).max() / 7 * (1 + 2.0**-7)  # a bfloat16 has eight significant bits
        assert np.abs(decoded[block] - flat[block]).max() <= step * (1 + 2.0**-16)


def test_integers_can_be_had_without_values(rng: np.random.Generator) -> None:
    values = update_like(rng)
    peak = float(np.abs(values).max())
    for spec, step in (("sq:2", 1), ("int8", 1)):
        coded = encoding_named(spec).encode(values, peak, rng)
        out = np.empty(values.size, dtype=np.float32)
        if spec == "int8":
            integers, unit = INT8.integers(memoryview(coded.blob), coded.parameters, values.size)
            INT8.decode_into(memoryview(coded.blob), coded.parameters, out)
        else:
            integers, unit = SQ.integers(memoryview(coded.blob), values.size)
            SQ.decode_into(memoryview(coded.blob), (), out)
        assert integers.dtype == np.int8
        assert np.array_equal(integers * unit * np.float32(step), out)
    coded = encoding_named("int4").encode(values, peak, rng)
    integers, steps = Int4().integers(memoryview(coded.blob), values.size)
    assert np.array_equal(
        (integers.reshape(-1, Int4.block) * steps[:, np.newaxis]).reshape(values.shape),
        through_int4(coded.blob),
    )


def through_int4(blob: bytes | memoryview) -> Matrix:
    out = np.empty(128 * 512, dtype=np.float32)
    Int4().decode_into(memoryview(blob), (), out)
    return out.reshape(128, 512)


@pytest.mark.parametrize("spec", [family.example for family in ENCODINGS.values()])
def test_decoding_is_the_same_each_time_and_encoding_leaves_its_input_alone(
    spec: str, rng: np.random.Generator
) -> None:
    values = update_like(rng)
    before = values.copy()
    frame = encode({"x": values}, spec, rng)
    assert np.array_equal(values, before)
    first, again = (decode(frame, {"x": values.shape}, spec)["x"] for _ in range(2))
    assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("spec", [family.example for family in ENCODINGS.values()])
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-20, 1.0, 1e20, 1e29])
def test_every_magnitude_survives(spec: str, magnitude: float, rng: np.random.Generator) -> None:
    values = {"w": (rng.normal(size=(60, 50)) * magnitude).astype(np.float32)}
    frame = encode(values, spec, rng)
    assert len(frame) <= max_encoded_bytes(schema_of(values), spec)
    decoded = decode(frame, schema_of(values), spec)["w"]
    if magnitude > 1e-37:  # below, a step is the smallest normal number
        assert squared_error(values["w"], decoded) < 40


@pytest.mark.parametrize("spec", [family.example for family in ENCODINGS.values()])
@pytest.mark.parametrize(
    "values",
    [
        np.full((300, 7), 3.0, dtype=np.float32),
        np.eye(50, dtype=np.float32),
        np.array([[1e-3] * 499 + [-9.0]] * 3, dtype=np.float32),
        np.array([[5.0]], dtype=np.float32),
        np.array([[0.0, 0.0, 1e-30, 1e20]] * 100, dtype=np.float32),
    ],
    ids=["constant", "identity", "outliers", "one", "wide"],
)
def test_odd_tensors_pass(spec: str, values: Matrix, rng: np.random.Generator) -> None:
    for _ in range(5):
        frame = encode({"w": values}, spec, rng)
        assert len(frame) <= max_encoded_bytes({"w": values.shape}, spec)
        assert np.isfinite(decode(frame, {"w": values.shape}, spec)["w"]).all()


def test_vectors_go_finely(rng: np.random.Generator) -> None:
    values = rng.normal(size=512).astype(np.float32)
    for spec in ("sq:16", "topk:0.01", "ternary:0.01", "rotated1"):
        assert np.abs(through(values, spec, rng) - values).max() < np.abs(values).max() / 100


def test_the_rotation_is_a_rotation(rng: np.random.Generator) -> None:
    columns = rng.normal(size=(256, 3))
    once = hadamard(columns.copy())
    assert np.allclose(hadamard(once.copy()), 256 * columns)
    sylvester = np.array([[1]])
    while sylvester.shape[0] < 256:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    assert np.allclose(sylvester @ columns, once)
    assert np.array_equal(signs_of(b"seed", 4096)[:256], signs_of(b"seed", 256))
    assert not np.array_equal(signs_of(b"seed", 256), signs_of(b"sEed", 256))


@pytest.mark.parametrize(
    ("count", "length", "blocks"),
    [(1, 128, 1), (840, 128, 7), (10_080, 2048, 5), (51_200, 4096, 13), (122_880, 8192, 15), (8192, 8192, 1)],
)
def test_padding_is_at_most_a_sixteenth_where_columns_are_long(count: int, length: int, blocks: int) -> None:
    assert layout_of(count) == (length, blocks)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sq", "needs a parameter: write sq:STEP, as in 'sq:16'"),
        ("sq:", "needs a parameter"),
        ("sq:16.0", "write 'sq:16'"),
        ("sq:1e1", "write 'sq:10'"),
        ("sq:+16", "write 'sq:16'"),
        ("sq: 16", "write 'sq:16'"),
        ("sq:nan", "STEP is a number from 0.5 to 1024"),
        ("sq:0", "STEP is a number from 0.5 to 1024"),
        ("sq:inf", "STEP is a number from"),
        ("sq:16:2", "STEP is a number from"),
        ("topk:0.9", "SHARE is a number from 0.0005 to 0.5"),
        ("ternary:1", "SHARE is a number from 0.0005 to 0.2"),
        ("terary:0.01", "did you mean 'ternary'"),
    ],
)
def test_parameters_are_taken_in_their_canonical_form_only(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoding_named(spec)


def test_only_topk_needs_state() -> None:
    stateful = {name for name, family in ENCODINGS.items() if encoding_named(family.example).stateful}
    assert stateful == {"topk"}


@pytest.mark.parametrize("spec", [family.example for family in ENCODINGS.values()])
def test_a_running_variance_never_becomes_negative(spec: str, rng: np.random.Generator) -> None:
    before = np.ones(512, dtype=np.float32)
    after = rng.lognormal(0, 1, 512).astype(np.float32)
    after[::3] = 1e-7  # channels that died
    change = {"bn.running_var": after - before, "bn.weight": rng.normal(size=512).astype(np.float32)}
    frame = encode(change, spec, rng)
    assert len(frame) <= max_encoded_bytes(schema_of(change), spec)
    assert (before + decode(frame, schema_of(change), spec)["bn.running_var"]).min() >= 0
