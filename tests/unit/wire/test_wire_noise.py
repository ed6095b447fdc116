"""federation.wire.noise: what ``sq`` adds to an update stays within its share of the weights' power."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from federation.wire.codec import decode, encode, schema_of
from federation.wire.noise import noise_bounds

Arrays = Mapping[str, NDArray[np.float32]]

SHARE = 0.06
GRID = 127
"""Integers of ``sq`` and ``int8`` end here: no grid of theirs is finer than the largest magnitude over it."""

TIMES = 4
"""Encodings of each example."""


def bound_of(weights: NDArray[np.float32], change: NDArray[np.float32], share: float = SHARE) -> float:
    return noise_bounds({"w": weights}, {"w": change}, share)["w"]


def drawn(kind: str, size: float, seed: int, count: int = 3000) -> NDArray[np.float32]:
    """A tensor of RMS near ``size``, as updates come: dense, heavy-tailed or mostly zero."""
    random = np.random.default_rng(seed)
    match kind:
        case "normal":
            values = random.standard_normal(count)
        case "laplace":
            values = random.laplace(size=count)
        case "uniform":
            values = random.uniform(-1, 1, count)
        case "sparse":
            values = random.standard_normal(count) * (random.random(count) < 0.05)
        case _:
            values = np.ones(count)
    return (values * size).astype(np.float32).reshape(-1, 30)


# --- the bound ----------------------------------------------------------------------------------------------------


def test_the_bound_is_a_share_of_the_larger_power() -> None:
    weights, change = np.full((4, 5), 3.0, np.float32), np.full((4, 5), -2.0, np.float32)
    assert bound_of(weights, change) == pytest.approx(SHARE * 9)
    assert bound_of(change, weights) == pytest.approx(SHARE * 9)


def test_weights_that_were_zero_are_measured_against_what_they_become() -> None:
    assert bound_of(np.zeros((4, 5), np.float32), np.full((4, 5), 2.0, np.float32)) == pytest.approx(
        SHARE * 4
    )


def test_share_zero_sets_no_bound() -> None:
    change = {"w": drawn("normal", 1.0, 1)}
    assert noise_bounds(change, change, 0.0) == {}
    bounded = encode(change, "sq:16", np.random.default_rng(1), noise_bounds(change, change, 0.0))
    assert bounded == encode(change, "sq:16", np.random.default_rng(1))


def test_each_tensor_has_its_own_bound_and_an_empty_one_has_none() -> None:
    model = {"large": np.full(3, 10.0, np.float32), "small": np.ones(3, np.float32)}
    empty = np.zeros((0, 3), np.float32)
    bounds = noise_bounds({**model, "none": empty}, {**model, "none": empty}, 0.5)
    assert bounds == {"large": pytest.approx(50), "small": pytest.approx(0.5)}


def test_a_model_that_cannot_be_measured_bounds_nothing() -> None:
    huge, change = np.full((4, 5), 1e30, np.float32), drawn("normal", 1.0, 1)
    with np.errstate(all="raise"):
        assert bound_of(huge, change) == np.inf
    assert encode({"w": change}, "sq:16", np.random.default_rng(1), {"w": np.inf}) == encode(
        {"w": change}, "sq:16", np.random.default_rng(1)
    )


# --- what is added ------------------------------------------------------------------------------------------------


def added(change: NDArray[np.float32], noise: float, encoding: str, seed: int, times: int = 1) -> float:
    """The mean squared error of what is decoded, over the tensor and several encodings."""
    random = np.random.default_rng(seed)
    delta = {"w": change}
    total = 0.0
    for _ in range(times):
        frame = encode(delta, encoding, random, {"w": noise})
        decoded = decode(frame, schema_of(delta), encoding)["w"].astype(np.float64)
        total += float(np.square(decoded - change).mean())
    return total / times


@given(
    kind=st.sampled_from(["normal", "laplace", "uniform", "sparse", "constant"]),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 30.0]),
    weight=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 30.0]),
    share=st.floats(0.001, 1.0),
    step=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_added_stays_within_the_bound(
    kind: str, size: float, weight: float, share: float, step: int, seed: int
) -> None:
    change = drawn(kind, size, seed)
    noise = bound_of(drawn("normal", weight, seed + 1), change, share)
    # No finer than the finest grid, whose variance is at most |x| step and step^2 / 4.
    finest = float(np.abs(change).max()) / GRID
    floor = min(float(np.abs(change).mean()) * finest, finest**2 / 4)
    limit = max(noise, floor)
    # An error e is below one step, so Var(e^2) <= step^2 E(e^2): the mean of n squares stays within 6 of its standard
    # deviations, step sqrt(limit / n), in all but some of 10^7 examples.
    coarsest = min(
        step * float(np.sqrt(np.square(change).mean())), max(noise / np.abs(change).mean(), 2 * noise**0.5)
    )
    spread = np.sqrt(limit * max(coarsest, finest) ** 2 / (change.size * TIMES))
    assert added(change, noise, f"sq:{step}", seed, TIMES) <= limit + 6 * spread


def test_the_bound_is_used_up_where_it_binds() -> None:
    change, weights = drawn("normal", 1.0, 1), drawn("normal", 2.0, 2)
    noise = bound_of(weights, change)
    assert 0.5 * noise < added(change, noise, "sq:16", 1, 20) <= 1.05 * noise
    assert added(change, np.inf, "sq:16", 1, 20) > 10 * noise


def test_small_updates_are_as_coarse_as_the_plan_says() -> None:
    change, weights = drawn("normal", 0.01, 1), drawn("normal", 1.0, 2)
    noise = bound_of(weights, change)
    bounded = encode({"w": change}, "sq:16", np.random.default_rng(1), {"w": noise})
    assert bounded == encode({"w": change}, "sq:16", np.random.default_rng(1))


def test_a_tighter_bound_costs_bytes_and_never_more_than_a_byte_a_value() -> None:
    change = {"w": drawn("normal", 1.0, 1, 30_000)}
    lengths = [
        len(encode(change, "sq:16", np.random.default_rng(1), {"w": noise}))
        for noise in (9.0, 1.0, 0.1, 1e-3, 0.0)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2]
    assert lengths[-1] < 30_000 + 100
