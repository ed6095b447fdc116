"""Updates on a shared scale of integers: what goes in, what the sum gives back, and what can never happen."""

from collections.abc import Mapping
from hashlib import sha256
from math import prod, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import hadamard as hadamard_matrix
from scipy.stats import skellam

from federation.errors import ConfigError
from federation.wire.codec import Schema
from federation.wire.encodings.rotation import signs_of
from federation.wire.shared_scale import TAIL, SharedScale

Update = dict[str, NDArray[np.float32]]

SEED = bytes(range(16))
SCHEMA: Schema = {"b": (70,), "a": (300, 20), "empty": (0, 3), "one": ()}


def update_of(schema: Schema, rng: np.random.Generator, norm: float) -> Update:
    """Of heavy tails, with the norm."""
    tensors = {name: rng.standard_t(4, shape) for name, shape in schema.items()}
    length = sqrt(sum(float((np.asarray(tensor) ** 2).sum()) for tensor in tensors.values()))
    return {name: np.asarray(tensor / length * norm, dtype=np.float32) for name, tensor in tensors.items()}


def distance(one: Mapping[str, NDArray[np.float32]], other: Mapping[str, Any]) -> float:
    return sqrt(sum(float(((one[name].astype(np.float64) - other[name]) ** 2).sum()) for name in other))


def norm_of(update: Mapping[str, NDArray[np.float32]]) -> float:
    return sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in update.values()))


def rotated(scale: SharedScale, update: Update) -> NDArray[np.float64]:
    """The coordinates y / g by matrices, in float64: another way to the same."""
    length, blocks = scale.layout
    flat = np.zeros(scale.size)
    joined = np.concatenate([update[name].reshape(-1) for name in sorted(update)])
    flat[: joined.size] = joined * min(1.0, scale.clip_norm / np.linalg.norm(joined.astype(np.float64)))
    matrix = hadamard_matrix(length).astype(np.float64) / sqrt(length)
    columns = matrix @ (signs_of(SEED + b"\x00columns", length)[:, np.newaxis] * flat.reshape(length, blocks))
    runs = columns.reshape(blocks, length) * signs_of(SEED + b"\x01runs", length)
    return np.asarray((runs @ matrix.T).reshape(-1) / scale.step)


@pytest.mark.parametrize(("bits", "noise"), [(8, 0.0), (16, 0.0), (32, 0.0), (8, 1.0), (16, 0.5)])
@pytest.mark.parametrize("norm", [0.3, 50.0])
def test_integers_are_the_neighbours_of_the_rotated_values(bits: int, noise: float, norm: float) -> None:
    scale = SharedScale.of(SCHEMA, clip_norm=1.5, modulus_bits=bits, agents=20, noise_multiplier=noise)
    update = update_of(SCHEMA, np.random.default_rng(3), norm)
    exact = rotated(scale, update)
    integers = scale.integers(update, SEED)
    assert np.linalg.norm(exact) * scale.step == pytest.approx(min(norm, 1.5), rel=1e-6)
    slack = 1 + 2e-5 * np.abs(exact).max()  # float32, and the margin of the clipping
    assert np.abs(integers - exact).max() < slack
    assert not ((integers > 0) & (exact < -1e-4)).any()
    assert not ((integers < 0) & (exact > 1e-4)).any()


def test_rounding_is_unbiased() -> None:
    scale = SharedScale.of(SCHEMA, clip_norm=1.0, modulus_bits=8, agents=30)
    update = update_of(SCHEMA, np.random.default_rng(4), 0.9)
    repeats = 400
    total = np.zeros(scale.size)
    squares = np.zeros(scale.size)
    for _ in range(repeats):
        integers = scale.integers(update, SEED)
        total += integers
        squares += integers.astype(np.float64) ** 2
    exact = rotated(scale, update)
    error = total / repeats - exact
    deviation = sqrt(float((squares / repeats - (total / repeats) ** 2).sum()) / repeats)
    assert abs(float(error.sum())) < 6 * deviation
    assert abs(float((error * np.sign(exact)).sum())) < 6 * deviation
    assert np.linalg.norm(error) == pytest.approx(deviation, rel=0.1)


def test_the_dice_decide_by_the_fraction() -> None:
    scale = SharedScale.of(SCHEMA, clip_norm=1.0, modulus_bits=16, agents=30)
    update = update_of(SCHEMA, np.random.default_rng(5), 1.0)
    exact = np.abs(rotated(scale, update))
    apart = np.abs(exact - np.rint(exact)) > 1e-2
    never = np.abs(scale.integers(update, SEED, lambda count: b"\xff" * count))
    always = np.abs(scale.integers(update, SEED, bytes))
    assert np.array_equal(never[apart], np.floor(exact)[apart])
    assert np.array_equal(always[apart], np.ceil(exact)[apart])


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("agents", [2, 10, 50, 100, 127, 1000, 4096])
def test_without_noise_no_sum_wraps(bits: int, agents: int) -> None:
    schema: Schema = {"w": (256,)}
    if bits == 8 and agents > 127:
        with pytest.raises(
            ConfigError, match=f"modulus_bits = 8 is too few for a sum of {agents} updates: set 16"
        ):
            SharedScale.of(schema, clip_norm=1.0, modulus_bits=bits, agents=agents)
        return
    scale = SharedScale.of(schema, clip_norm=1.0, modulus_bits=bits, agents=agents)
    # Nothing stops a coordinate at its limit but the limit itself: an update of which the rotation makes one coordinate.
    one = np.zeros(scale.size)
    one[17] = 1e3
    length, blocks = scale.layout
    matrix = hadamard_matrix(length) / sqrt(length)
    back = signs_of(SEED + b"\x01runs", length) * (one.reshape(blocks, length) @ matrix)
    back = signs_of(SEED + b"\x00columns", length)[:, np.newaxis] * (matrix @ back.reshape(length, blocks))
    integers = scale.integers({"w": back.reshape(-1).astype(np.float32)}, SEED)
    peak = int(np.abs(integers).max())
    assert 0.99 * scale.largest <= peak <= scale.largest
    total = np.zeros(scale.size, dtype=scale.dtype)
    for _ in range(agents):
        total += scale.reduced(integers)
    centred = total.view(f"<i{bits // 8}").astype(np.int64)
    assert np.array_equal(centred, agents * integers.astype(np.int64))
    assert scale.wrap_probability == 0


@pytest.mark.parametrize("bits", [16, 32])
def test_the_mean_comes_back(bits: int) -> None:
    agents = 12
    scale = SharedScale.of(SCHEMA, clip_norm=2.0, modulus_bits=bits, agents=agents)
    rng = np.random.default_rng(6)
    updates = [update_of(SCHEMA, rng, 1.9) for _ in range(agents)]
    total = np.zeros(scale.size, dtype=scale.dtype)
    for update in updates:
        total += scale.reduced(scale.integers(update, SEED))
    mean = scale.mean(total, SEED, agents)
    exact = {
        name: np.mean([update[name] for update in updates], axis=0, dtype=np.float64).astype(np.float32)
        for name in SCHEMA
    }
    assert {name: value.shape for name, value in mean.items()} == SCHEMA
    assert all(value.dtype == np.float32 for value in mean.values())
    # Stochastic rounding has a variance of a quarter of a squared step at most, and the errors of devices are independent.
    bound = 0.5 * scale.step * sqrt(scale.size / agents)
    assert 0.5 * bound < distance(mean, exact) < 1.1 * bound + 1e-6


def test_what_is_too_long_is_clipped_in_its_direction() -> None:
    scale = SharedScale.of(SCHEMA, clip_norm=0.5, modulus_bits=32, agents=3)
    update = update_of(SCHEMA, np.random.default_rng(7), 20.0)
    mean = scale.mean(scale.reduced(scale.integers(update, SEED)), SEED, 1)
    assert norm_of(mean) == pytest.approx(0.5, rel=1e-4)
    assert norm_of(mean) <= 0.5 * (1 + 1e-6)
    shorter = {name: np.asarray(value / 40, dtype=np.float32) for name, value in update.items()}
    assert distance(mean, shorter) < 1e-4


def test_decoding_is_exact_and_free_of_order() -> None:
    scale = SharedScale.of(SCHEMA, clip_norm=1.0, modulus_bits=16, agents=9)
    rng = np.random.default_rng(8)
    parts = [rng.integers(1 << 16, size=scale.size).astype(scale.dtype) for _ in range(9)]
    forwards, backwards = (np.zeros(scale.size, dtype=scale.dtype) for _ in range(2))
    for one, other in zip(parts, reversed(parts), strict=True):
        forwards += one
        backwards += other
    there, back = scale.mean(forwards, SEED, 9), scale.mean(backwards, SEED, 9)
    assert all(np.array_equal(there[name], back[name]) for name in SCHEMA)


def test_all_machines_decode_the_same_bits() -> None:
    """A digest that was computed once: whoever changes it changes what devices of different versions agree on."""
    scale = SharedScale.of(SCHEMA, clip_norm=1.0, modulus_bits=16, agents=9, noise_multiplier=1.25)
    total = (np.arange(scale.size, dtype=np.uint32) * 40_503 % 65_536).astype(scale.dtype)
    mean = scale.mean(total, SEED, 7)
    digest = sha256(b"".join(mean[name].astype("<f4").tobytes() for name in sorted(mean))).hexdigest()
    assert (scale.size, digest[:16]) == (6144, "836c8559b19ee405")


@pytest.mark.parametrize("kind", ["spike", "constant", "one column", "ramp"])
def test_no_update_concentrates_in_few_coordinates(kind: str) -> None:
    schema: Schema = {"w": (186_110,)}
    scale = SharedScale.of(schema, clip_norm=1.0, modulus_bits=32, agents=2)
    values = np.zeros(186_110, dtype=np.float32)
    match kind:
        case "spike":
            values[1234] = 1
        case "constant":
            values[:] = 1
        case "one column":
            values[5 :: scale.layout.blocks] = np.random.default_rng(9).normal(
                size=values[5 :: scale.layout.blocks].size
            )
        case _:
            values[:] = np.linspace(-1, 1, values.size)
    integers = scale.integers({"w": values / np.linalg.norm(values)}, SEED)
    deviation = scale.largest / TAIL
    assert np.sqrt((integers.astype(np.float64) ** 2).mean()) == pytest.approx(deviation, rel=1e-3)
    assert np.abs(integers).max() < 5.7 * deviation


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("agents", [10, 100, 1000])
def test_the_probability_to_wrap_is_bounded(bits: int, agents: int) -> None:
    scale = SharedScale.of(
        {"w": (400_000,)}, clip_norm=3.0, modulus_bits=bits, agents=agents, noise_multiplier=2.0
    )
    variance = (2.0 * 3.0 / scale.step) ** 2
    exact = 2 * skellam.sf(2 ** (bits - 1) - 1, variance / 2, variance / 2)
    assert exact <= scale.wrap_probability < 1e-5


def test_with_noise_the_scale_is_no_finer_than_pays() -> None:
    coarse, fine, finest = (
        SharedScale.of({"w": (100_000,)}, clip_norm=1.0, modulus_bits=bits, agents=50, noise_multiplier=1.0)
        for bits in (8, 16, 32)
    )
    assert coarse.step > 2 * fine.step
    assert fine.step == finest.step == pytest.approx(1 / (16 * sqrt(50)))


def test_a_vector_of_zeros_stays_zero() -> None:
    scale = SharedScale.of(SCHEMA, clip_norm=1.0, modulus_bits=8, agents=3, noise_multiplier=1.0)
    assert not scale.integers(
        {name: np.zeros(shape, dtype=np.float32) for name, shape in SCHEMA.items()}, SEED
    ).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_training_that_diverged_is_refused(bad: float) -> None:
    scale = SharedScale.of(SCHEMA, clip_norm=1.0, modulus_bits=16, agents=3)
    update = update_of(SCHEMA, np.random.default_rng(10), 1.0)
    update["a"][3, 3] = bad
    with pytest.raises(ConfigError, match="NaN or infinite"):
        scale.integers(update, SEED)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 12), max_size=3), min_size=1, max_size=4),
    bits=st.sampled_from([16, 32]),
    agents=st.integers(1, 200),
    left=st.integers(1, 200),
    noise=st.sampled_from([0.0, 0.5, 20.0]),
    norm=st.floats(1e-6, 1e6),
    clip=st.floats(1e-6, 1e6),
    number=st.integers(0, 2**32 - 1),
)
def test_any_model_comes_back_within_a_step(
    shapes: list[list[int]],
    bits: int,
    agents: int,
    left: int,
    noise: float,
    norm: float,
    clip: float,
    number: int,
) -> None:
    schema = {f"t{index}": tuple(shape) for index, shape in enumerate(shapes)}
    rng = np.random.default_rng(number)
    left = min(left, agents)
    scale = SharedScale.of(schema, clip_norm=clip, modulus_bits=bits, agents=agents, noise_multiplier=noise)
    flat = {name: rng.normal(size=shape) for name, shape in schema.items()}
    length = sqrt(sum(float((value**2).sum()) for value in flat.values())) or 1.0
    update = {name: np.asarray(value / length * norm, dtype=np.float32) for name, value in flat.items()}
    total = np.zeros(scale.size, dtype=scale.dtype)
    for _ in range(left):
        total += scale.reduced(scale.integers(update, SEED))
    mean = scale.mean(total, SEED, left)
    assert {name: value.shape for name, value in mean.items()} == schema
    share = min(1.0, clip / norm)
    exact = {name: (value * share).astype(np.float32) for name, value in update.items()}
    # A rounding errs by less than a step in each coordinate.
    assert distance(mean, exact) <= 1.01 * scale.step * sqrt(scale.size) + 1e-4 * norm * share
    assert sum(prod(shape) for shape in schema.values()) <= scale.size
