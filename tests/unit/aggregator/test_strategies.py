"""aggregator.strategies: the mean and the step, against the paper's formula in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aggregator.strategies import Accumulator, FedAvg

SCHEMA = {"w": (3, 4), "b": (5,), "scalar": (), "empty": (0, 2)}
Arrays = dict[str, NDArray[np.float32]]


def delta(seed: int, scale: float = 1.0) -> Arrays:
    draw = np.random.default_rng(seed)
    return {
        name: np.asarray(scale * draw.standard_normal(shape), np.float32) for name, shape in SCHEMA.items()
    }


def mean(updates: list[tuple[Arrays, float]]) -> dict[str, NDArray[np.float64]]:
    total = Accumulator(SCHEMA)
    for update, weight in updates:
        total.add(update, weight)
    assert total.count == len(updates)
    return total.mean()


def test_the_mean_is_the_formula_in_float64() -> None:
    updates = [(delta(seed), float(weight)) for seed, weight in enumerate((600, 1, 12345))]
    result = mean(updates)
    for name in SCHEMA:
        expected = sum(w * d[name].astype(np.float64) for d, w in updates) / sum(w for _, w in updates)
        np.testing.assert_array_equal(result[name], expected)
        assert result[name].dtype == np.float64


def test_weights_are_not_rounded_to_float32() -> None:
    weight = float(2**24 + 1)
    update: Arrays = {"w": np.full((1,), 1.0, np.float32)}
    total = Accumulator({"w": (1,)})
    total.add(update, weight)
    total.add({"w": np.zeros(1, np.float32)}, 1.0)
    np.testing.assert_array_equal(total.mean()["w"], [weight / (weight + 1)])


def test_equal_order_gives_equal_bits_and_one_update_is_its_own_mean() -> None:
    updates = [(delta(seed), 1.0 + seed) for seed in range(5)]
    one, other = mean(updates), mean(updates)
    assert [value.tobytes() for value in one.values()] == [value.tobytes() for value in other.values()]
    alone, only = mean([(delta(1), 7.0)]), delta(1)
    for name in SCHEMA:
        np.testing.assert_allclose(alone[name], only[name], rtol=1e-15)


@given(order=st.permutations(range(6)), scales=st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_the_order_matters_to_no_bit(order: list[int], scales: list[float]) -> None:
    updates = [(delta(seed, scale), float(1 + 100 * seed)) for seed, scale in enumerate(scales)]
    one, other = mean(updates), mean([updates[index] for index in order])
    assert [value.tobytes() for value in one.values()] == [value.tobytes() for value in other.values()]


@given(factor=st.integers(1, 10**6))
def test_only_the_ratio_of_weights_counts(factor: int) -> None:
    updates = [(delta(seed), 1.0 + seed) for seed in range(3)]
    one, other = mean(updates), mean([(update, weight * factor) for update, weight in updates])
    largest = max(float(np.abs(array).max(initial=0)) for update, _ in updates for array in update.values())
    for name in SCHEMA:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=3 * largest * 2.0**-40)


def test_updates_are_not_changed() -> None:
    update = delta(1)
    for array in update.values():
        array.flags.writeable = False
    mean([(update, 3.0), (update, 4.0)])


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_fedavg_changes_the_model_by_a_share_of_the_mean(rate: float) -> None:
    average = mean([(delta(1), 1.0), (delta(2), 2.0)])
    expected = {name: rate * array for name, array in average.items()}
    change = FedAvg(rate).change(average)
    assert change.keys() == SCHEMA.keys()
    for name, value in change.items():
        np.testing.assert_array_equal(value, expected[name], strict=True)
        assert value.shape == SCHEMA[name]


def test_fedavg_of_deltas_is_the_average_of_models() -> None:
    base, models = delta(9), [delta(1), delta(2)]
    deltas = [({name: model[name] - base[name] for name in SCHEMA}, 1.0) for model in models]
    change = FedAvg().change(mean(deltas))
    for name in SCHEMA:
        np.testing.assert_allclose(
            base[name] + change[name], (models[0][name] + models[1][name]) / 2, rtol=1e-5, atol=1e-6
        )


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no updates"):
        Accumulator(SCHEMA).mean()
