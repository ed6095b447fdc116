"""A lower bound on epsilon from one training run (Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run").

Each of ``m`` canaries is put into the training data by a coin of its own. Whoever sees the result guesses for some of
them, the ones with the highest and the lowest scores, whether they were in. Under (epsilon, delta)-differential privacy
nobody can be right too often; so from how often the guesses were right follows an epsilon that the training exceeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95

GUESS_SHARES = (0.05, 0.2, 0.6)
"""Shares of the canaries that are guessed at. Fixed before the scores are seen, and each is tested at a third of the
error: choosing the best afterwards would otherwise claim more than was shown. A strong attack is right on most canaries
and gains by guessing at many, a weak one only at the extremes of its scores."""

_PRECISION = 1e-4
_LARGEST = 50.0
"""Above it e^-epsilon is lost in the rounding of a float64 probability near 1."""


@dataclass(frozen=True, slots=True)
class LowerBound:
    """What one run shows.

    Attributes:
        epsilon: The training is not (epsilon', delta)-private for any epsilon' below, with the stated confidence; 0 shows nothing.
        delta: At which epsilon is stated.
        confidence: Probability that the statement is true, whatever the training does.
        canaries: How many there were.
        guesses: Of the number of guesses that gave the largest bound.
        correct: How many of these were right.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most, if the training is (epsilon, delta)-private.

    Theorem 5.2: with W ~ Binomial(r, q), q = e^epsilon / (1 + e^epsilon)::

        P[right >= v] <= P[W >= v] + 2 m delta max_{1 <= i <= v} P[v > W >= v - i] / i

    Args:
        canaries: ``m``, each in the training data with probability 1/2, independently.
        guesses: ``r``, without abstentions.
        correct: ``v`` of them.
        epsilon: At least 0.
        delta: In [0, 1].

    Raises:
        ValueError: If not 0 <= correct <= guesses <= canaries, or epsilon or delta is out of range.
    """
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"{correct} right of {guesses} guesses at {canaries} canaries: each must not exceed the next"
        )
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}: it must not be negative")
    _check_probability("delta", delta)
    rate = 1 / (1 + math.exp(-epsilon))
    value = float(binom.sf(correct - 1, guesses, rate))
    if delta and correct:
        steps = np.arange(1, correct + 1)
        below = np.cumsum(binom.pmf(correct - steps, guesses, rate))  # P[v > W >= v - i]
        value += 2 * canaries * delta * float((below / steps).max())
    return min(value, 1.0)


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, *, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that so many right guesses refute.

    Args:
        canaries: See :func:`p_value`.
        guesses: See :func:`p_value`.
        correct: See :func:`p_value`.
        delta: At which epsilon is stated.
        confidence: That the bound is to have, below 1.

    Returns:
        At least 0, rounded down to 1e-4; 0 if nothing is refuted.

    Raises:
        ValueError: As :func:`p_value`, or if confidence is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1")
    error = 1 - confidence
    if p_value(canaries, guesses, correct, 0.0, delta) >= error:
        return 0.0
    low, high = 0.0, 1.0  # the p-value rises with epsilon: low is refuted
    while high < _LARGEST and p_value(canaries, guesses, correct, high, delta) < error:
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) < error:
            low = middle
        else:
            high = middle
    return round(math.floor(low / _PRECISION) * _PRECISION, 4)


def one_run_bound(
    scores: np.ndarray,
    included: np.ndarray,
    *,
    delta: float,
    confidence: float = CONFIDENCE,
    shares: Sequence[float] = GUESS_SHARES,
) -> LowerBound:
    """Audit a run by its canaries' scores.

    Half of the guesses say "in", for the highest scores, the other half "out", for the lowest. The bound is the largest
    over ``shares``, each tested at an equal part of the error (Bonferroni).

    Args:
        scores: float ``[m]``; higher for those that were likelier in the training data. It must not depend on ``included``
            but through the result of the training.
        included: bool ``[m]``, the coins.
        delta: At which epsilon is stated.
        confidence: That the bound is to have.
        shares: Of the canaries that are guessed at, in (0, 1]. Choose them before you see the scores.

    Raises:
        ValueError: If the shapes differ, a score is NaN, there are fewer than two canaries, or a parameter is out of range.
    """
    if scores.shape != included.shape or scores.ndim != 1 or len(scores) < 2:  # noqa: PLR2004 - one guess each way
        raise ValueError(
            f"scores {list(scores.shape)} and coins {list(included.shape)} must be two lists of equal length, 2 or more"
        )
    if np.isnan(scores).any():
        raise ValueError(
            "a canary's score is NaN: the training has diverged, and nothing can be told from it"
        )
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares of guesses {tuple(shares)} must lie between 0 and 1")
    order = np.argsort(scores, kind="stable")
    each = 1 - (1 - confidence) / len(shares)
    best: LowerBound | None = None
    for share in shares:
        half = max(1, int(share * len(scores)) // 2)
        correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        epsilon = epsilon_lower_bound(len(scores), 2 * half, correct, delta=delta, confidence=each)
        if best is None or epsilon > best.epsilon:
            best = LowerBound(epsilon, delta, confidence, len(scores), 2 * half, correct)
    assert best is not None
    return best


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must lie between 0 and 1")
