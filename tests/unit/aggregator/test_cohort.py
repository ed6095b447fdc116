"""aggregator.cohort: who takes part, and how many are enough."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.cohort import invitations, quorum_of, sample_cohort

AGENTS = [f"pi{number}" for number in range(20)]


def test_a_draw_depends_on_the_seed_and_the_round_and_not_on_the_order_of_names() -> None:
    first = sample_cohort(AGENTS, 5, seed=1, round_number=1)
    assert sample_cohort(AGENTS[::-1], 5, seed=1, round_number=1) == first
    assert sample_cohort(set(AGENTS), 5, seed=1, round_number=1) == first
    assert sample_cohort(AGENTS, 5, seed=1, round_number=2) != first
    assert sample_cohort(AGENTS, 5, seed=2, round_number=1) != first


def test_a_draw_is_sorted_and_takes_all_when_too_many_are_wanted() -> None:
    assert sample_cohort(AGENTS, 100, seed=1, round_number=1) == tuple(sorted(AGENTS))
    assert sample_cohort([], 3, seed=1, round_number=1) == ()


def test_every_agent_is_drawn_about_equally_often() -> None:
    draws = [sample_cohort(AGENTS, 5, seed=7, round_number=number) for number in range(400)]
    counts = [sum(agent in draw for draw in draws) for agent in AGENTS]
    assert sum(counts) == 400 * 5
    assert min(counts) > 60, "100 expected, standard deviation below 9"
    assert max(counts) < 140


@given(wanted=st.integers(0, 4096), percent=st.integers(0, 400))
def test_invitations_are_the_exact_ceiling(wanted: int, percent: int) -> None:
    assert invitations(wanted, percent / 100) == ceil(wanted * (1 + Fraction(percent, 100)))


@given(wanted=st.integers(1, 4096), percent=st.integers(0, 100), least=st.integers(1, 5000))
def test_a_quorum_is_the_exact_ceiling_and_can_be_reached(wanted: int, percent: int, least: int) -> None:
    quorum = quorum_of(wanted, percent / 100, least)
    assert quorum == max(1, ceil(Fraction(percent, 100) * wanted), min(least, wanted))
    assert 1 <= quorum <= wanted


@pytest.mark.parametrize(
    ("wanted", "over", "expected"), [(10, 0.1, 11), (10, 0.0, 10), (3, 0.5, 5), (0, 1.0, 0)]
)
def test_invitations_by_example(wanted: int, over: float, expected: int) -> None:
    assert invitations(wanted, over) == expected
