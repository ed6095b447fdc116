"""aggregator.summation: a sum without an order, as exact as it says."""

from fractions import Fraction
from itertools import accumulate
from math import frexp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aggregator import summation
from aggregator.summation import OrderFreeSum
from federation.wire.fields import MAX_COHORT

Term = tuple[NDArray[np.float32], float]

SIZE = 5

exponents = st.integers(-140, 100)
magnitudes = st.builds(np.ldexp, st.floats(0.5, 1.0, width=32), exponents)
values = st.one_of(st.just(0.0), magnitudes, magnitudes.map(np.negative))
weights = st.one_of(st.integers(1, 1000), st.integers(1, 2**40)).map(float)
terms = st.tuples(
    st.lists(values, min_size=SIZE, max_size=SIZE).map(lambda row: np.array(row, np.float32)), weights
)


def total(given_terms: list[Term]) -> NDArray[np.float64]:
    result = OrderFreeSum((SIZE,))
    for array, weight in given_terms:
        result.add(array, weight)
    return result.value()


def exactly(given_terms: list[Term], column: int) -> Fraction:
    """The sum of the products, each rounded once to float64, without any further rounding."""
    return sum((Fraction(float(array[column]) * weight) for array, weight in given_terms), Fraction(0))


def largest(given_terms: list[Term]) -> float:
    return max(float(np.abs(array).max()) * weight for array, weight in given_terms)


@given(data=st.data(), given_terms=st.lists(terms, min_size=1, max_size=12))
def test_no_order_changes_a_bit(data: st.DataObject, given_terms: list[Term]) -> None:
    other = data.draw(st.permutations(given_terms))
    assert total(given_terms).tobytes() == total(other).tobytes()


@given(given_terms=st.lists(terms, min_size=1, max_size=12))
def test_rising_and_falling_magnitudes_give_the_same_bits(given_terms: list[Term]) -> None:
    rising = sorted(given_terms, key=lambda term: largest([term]))
    assert total(rising).tobytes() == total(rising[::-1]).tobytes()


@given(given_terms=st.lists(terms, min_size=1, max_size=12))
def test_what_is_cut_off_each_term_is_2_to_the_40_times_smaller_than_the_largest(
    given_terms: list[Term],
) -> None:
    result = total(given_terms)
    cut = Fraction(largest(given_terms)) / 2**40 * len(given_terms)
    for column in range(SIZE):
        exact = exactly(given_terms, column)
        rounding = Fraction(float(np.spacing(np.abs(result[column])))) / 2
        assert abs(Fraction(float(result[column])) - exact) <= cut + rounding


@given(exponent=exponents, mantissas=st.lists(st.integers(-(2**24), 2**24), min_size=SIZE, max_size=SIZE))
def test_one_term_within_its_grid_is_exact(exponent: int, mantissas: list[int]) -> None:
    # The last place of the lower grid is at least 40 places below the largest magnitude: 24 bits of it fit.
    array = np.array([np.ldexp(float(mantissa), exponent - 24) for mantissa in mantissas], np.float32)
    assert total([(array, 1.0)]).tobytes() == (array.astype(np.float64) + 0.0).tobytes()


@given(
    units=st.lists(
        st.lists(st.integers(-(2**23), 2**23), min_size=SIZE, max_size=SIZE), min_size=1, max_size=20
    )
)
def test_terms_of_like_magnitude_are_summed_without_any_error(units: list[list[int]]) -> None:
    """As integer arithmetic does."""
    given_terms = [(np.array(row, np.float32), 3.0) for row in units]
    expected = [3 * sum(column) for column in zip(*units, strict=True)]
    assert total(given_terms).tolist() == expected


@given(given_terms=st.lists(terms, min_size=1, max_size=6))
def test_a_sum_and_its_opposite_are_nothing(given_terms: list[Term]) -> None:
    opposite = [(-array, weight) for array, weight in given_terms]
    result = total([*given_terms, *opposite])
    assert result.tobytes() == bytes(8 * SIZE), "zero, of one sign"


def test_any_prefix_may_be_read_while_more_is_to_come() -> None:
    draw = np.random.default_rng(2)
    arrays = [draw.integers(-1000, 1000, SIZE).astype(np.float32) for _ in range(5)]
    result = OrderFreeSum((SIZE,))
    for array, expected in zip(arrays, accumulate(arrays), strict=True):
        result.add(array, 1.0)
        np.testing.assert_array_equal(result.value(), expected)


@pytest.mark.parametrize("size", [1, summation._BLOCK - 1, summation._BLOCK, 2 * summation._BLOCK + 7])
def test_blocks_leave_no_seam(size: int) -> None:
    draw = np.random.default_rng(size)
    arrays = [draw.standard_normal(size).astype(np.float32) for _ in range(3)]
    expected = np.zeros(size)
    result = OrderFreeSum((size,))
    for array in arrays:
        expected += array.astype(np.float64) * 5
        result.add(array, 5.0)
    np.testing.assert_allclose(result.value(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(), (0, 2), (3, 1, 2)])
def test_shapes_are_kept_and_terms_are_not_changed(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 1.5, np.float32)
    array.flags.writeable = False
    result = OrderFreeSum(shape)
    np.testing.assert_array_equal(result.value(), np.zeros(shape), strict=True)
    result.add(array, 2.0)
    result.add(array, 2.0)
    np.testing.assert_array_equal(result.value(), np.full(shape, 6.0), strict=True)


def test_as_many_of_the_largest_slices_as_a_cohort_has_are_exact() -> None:
    # One less than 2^39 steps of the upper grid, and of the lower one: what comes nearest to 2^53 steps.
    worst = np.full(SIZE, 2.0**39 - 2.0**15, np.float32)
    result = OrderFreeSum((SIZE,))
    for _ in range(MAX_COHORT):
        result.add(worst, 1.0)
    assert frexp(float(worst[0]))[1] == summation._WIDTH - 1
    assert result.value().tolist() == [MAX_COHORT * (2.0**39 - 2.0**15)] * SIZE
