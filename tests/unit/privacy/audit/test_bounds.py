import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audit.bounds import GUESS_SHARES, epsilon_lower_bound, one_run_bound, p_value


def coins(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < 0.5


def test_the_example_of_the_paper() -> None:
    """Appendix D: 75 of 100 guesses right at 1,000 canaries, delta 1e-4, 95 %: epsilon 0.673."""
    assert epsilon_lower_bound(1000, 100, 75, delta=1e-4) == pytest.approx(0.673, abs=5e-4)


def test_the_p_value_by_hand() -> None:
    """Two guesses, both right, e^epsilon = 3, so q = 3/4: P[W >= 2] = 9/16, P[W = 1] = 6/16, P[W <= 1] = 7/16.

    The largest of (6/16) / 1 and (7/16) / 2 is 6/16, times 2 m delta = 0.2.
    """
    assert p_value(10, 2, 2, math.log(3), 0.0) == pytest.approx(9 / 16)
    assert p_value(10, 2, 2, math.log(3), 0.01) == pytest.approx(9 / 16 + 0.2 * 6 / 16)


@given(canaries=st.integers(2, 2000), confidence=st.floats(0.5, 0.999))
def test_a_perfect_guesser_shows_what_chance_would_still_allow(canaries: int, confidence: float) -> None:
    """Without delta the bound is where q^m = 1 - confidence."""
    rate = (1 - confidence) ** (1 / canaries)
    known = max(0.0, math.log(rate / (1 - rate)))
    found = epsilon_lower_bound(canaries, canaries, canaries, delta=0.0, confidence=confidence)
    assert found == pytest.approx(known, abs=2e-4)
    assert found <= known + 1e-9


@settings(max_examples=50)
@given(
    guesses=st.integers(1, 300), share=st.floats(0, 1), epsilon=st.floats(0, 8), delta=st.sampled_from([0.0, 1e-5, 1e-2])
)  # fmt: skip
def test_the_p_value_is_monotone(guesses: int, share: float, epsilon: float, delta: float) -> None:
    correct = int(share * guesses)
    value = p_value(300, guesses, correct, epsilon, 0.0)
    assert 0 <= value <= 1
    assert p_value(300, guesses, correct, epsilon + 0.1, 0.0) >= value - 1e-12
    assert p_value(300, guesses, correct, epsilon, delta) >= value
    if correct < guesses:
        assert p_value(300, guesses, correct + 1, epsilon, 0.0) <= value


@settings(max_examples=50)
@given(
    guesses=st.integers(1, 300), share=st.floats(0.5, 1), delta=st.sampled_from([0.0, 1e-5, 1e-3]), confidence=st.floats(0.6, 0.99)
)  # fmt: skip
def test_the_bound_is_monotone(guesses: int, share: float, delta: float, confidence: float) -> None:
    correct = int(share * guesses)
    bound = epsilon_lower_bound(300, guesses, correct, delta=delta, confidence=confidence)
    assert epsilon_lower_bound(300, guesses, correct, delta=10 * delta, confidence=confidence) <= bound
    assert epsilon_lower_bound(300, guesses, correct, delta=delta, confidence=confidence + 0.005) <= bound
    assert epsilon_lower_bound(600, guesses, correct, delta=delta, confidence=confidence) <= bound
    if correct < guesses and not delta:
        assert epsilon_lower_bound(300, guesses, correct + 1, delta=delta, confidence=confidence) >= bound


def test_a_coin_shows_nothing() -> None:
    assert epsilon_lower_bound(1000, 1000, 500, delta=0.0) == 0
    shown = []
    for seed in range(200):
        scores = np.random.default_rng([9, seed]).normal(size=500)
        shown.append(one_run_bound(scores, coins(500, seed), delta=0.0))
    wrong = sum(bound.epsilon > 0 for bound in shown)
    assert wrong <= 20, "5 % of 200 are to be expected: 20 would come once in 1,200 times"


def test_a_leak_of_known_size_is_found_and_not_exceeded() -> None:
    """Randomized response tells each coin truly with probability e^epsilon / (1 + e^epsilon): it is exactly epsilon-private."""
    epsilon, found = 2.0, []
    for seed in range(40):
        random = np.random.default_rng([7, seed])
        included = coins(2000, seed)
        told = included ^ (random.random(2000) > 1 / (1 + math.exp(-epsilon)))
        found.append(one_run_bound(told.astype(float), included, delta=0.0).epsilon)
    assert np.median(found) > 1.6
    assert sum(bound > epsilon for bound in found) <= 6, "5 % of 40 are to be expected"


def test_both_ends_are_guessed_at() -> None:
    included = coins(1000, 3)
    bound = one_run_bound(included.astype(float), included, delta=1e-5)
    assert (bound.guesses, bound.correct) == (600, 600)
    assert bound.epsilon > 4.5
    assert one_run_bound(-included.astype(float), included, delta=1e-5).epsilon == 0


def test_the_choice_among_numbers_of_guesses_is_paid_for() -> None:
    included = coins(400, 5)
    scores = included.astype(float)
    paid = one_run_bound(scores, included, delta=0.0)
    alone = one_run_bound(scores, included, delta=0.0, shares=(max(GUESS_SHARES),))
    assert paid.epsilon < alone.epsilon


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="must not exceed the next"):
        p_value(10, 5, 6, 1.0, 0.0)
    with pytest.raises(ValueError, match="epsilon is -1"):
        p_value(10, 5, 5, -1.0, 0.0)
    with pytest.raises(ValueError, match=r"delta is 1\.5"):
        p_value(10, 5, 5, 1.0, 1.5)
    with pytest.raises(ValueError, match="confidence is 1"):
        epsilon_lower_bound(10, 5, 5, delta=0.0, confidence=1.0)
    with pytest.raises(ValueError, match="NaN"):
        one_run_bound(np.array([0.1, np.nan]), np.array([True, False]), delta=0.0)
    with pytest.raises(ValueError, match="equal length"):
        one_run_bound(np.zeros(3), np.zeros(2, bool), delta=0.0)
    with pytest.raises(ValueError, match="shares"):
        one_run_bound(np.zeros(3), np.zeros(3, bool), delta=0.0, shares=(0.0,))
