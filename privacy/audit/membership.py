"""Membership inference (Carlini et al. 2022): how well can an attacker tell who was in the training data?

An attacker scores each sample; members should score higher. The area under the ROC curve (AUC) says how often a member
scores higher than a stranger. The true-positive rate at 1 % false positives says what the mean hides: for how many
members the attacker is nearly sure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FALSE_POSITIVES = 0.01
"""The rate at which true positives are stated: a smaller one cannot be measured with a few hundred samples."""

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and where the truth lies, with 95 % confidence.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Membership:
    """What an attack achieved.

    Attributes:
        auc: Probability that a member scores above a stranger, ties half; 0.5 is guessing.
        tpr: Share of members that are found when 1 % of the strangers are taken for members; 0.01 is guessing.
        members: How many were scored.
        strangers: How many were scored.
        curve: The ROC curve, float64 ``[points, 2]``: false and true positive rate, from (0, 0) to (1, 1).
    """

    auc: Interval
    tpr: Interval
    members: int
    strangers: int
    curve: np.ndarray


def membership(scores: np.ndarray, member: np.ndarray) -> Membership:
    """Measure an attack by its scores.

    Args:
        scores: float ``[n]``, higher for likelier members.
        member: bool ``[n]``.

    Raises:
        ValueError: If the shapes differ, a score is NaN, or there are no members or no strangers.
    """
    if scores.shape != member.shape or scores.ndim != 1:
        raise ValueError(
            f"scores {list(scores.shape)} and members {list(member.shape)} must be two lists of equal length"
        )
    if np.isnan(scores).any():
        raise ValueError("a score is NaN: the training has diverged, and nothing can be told from it")
    inside, outside = int(member.sum()), int((~member).sum())
    if not inside or not outside:
        raise ValueError(f"{inside} members and {outside} strangers: an attack needs both to be measured")
    curve = roc_curve(scores, member)
    return Membership(_auc(curve, inside, outside), _tpr(curve, inside), inside, outside, curve)


def roc_curve(scores: np.ndarray, member: np.ndarray) -> np.ndarray:
    """False and true positive rates of all thresholds, ties taken together.

    Args:
        scores: As :func:`membership`.
        member: As :func:`membership`.

    Returns:
        float64 ``[points, 2]``, from (0, 0) to (1, 1), both rising.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    true = np.cumsum(member[order])[last_of_tie] / member.sum()
    false = np.cumsum(~member[order])[last_of_tie] / (~member).sum()
    return np.concatenate([np.zeros((1, 2)), np.stack([false, true], axis=1)])


def _auc(curve: np.ndarray, inside: int, outside: int) -> Interval:
    """The trapezoids below the curve, with the standard error of Hanley and McNeil 1982.

    ::

    Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A)
    se^2 = (A (1 - A) + (n1 - 1)(Q1 - A^2) + (n2 - 1)(Q2 - A^2)) / (n1 n2)
    """
    from scipy.stats import norm

    false, true = curve.T
    area = float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))
    both_above, both_below = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (inside - 1) * (both_above - area**2)
    variance = (variance + (outside - 1) * (both_below - area**2)) / (inside * outside)
    wide = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(max(variance, 0.0))
    return Interval(area, max(0.0, area - wide), min(1.0, area + wide))


def _tpr(curve: np.ndarray, inside: int) -> Interval:
    """At the most permissive threshold with at most 1 % false positives; Clopper and Pearson's interval.

    The interval is that of the members' share at this threshold; that the threshold itself comes from the strangers'
    sample is not in it.
    """
    from scipy.stats import beta

    rate = float(curve[curve[:, 0] <= FALSE_POSITIVES, 1].max())
    found, error = round(rate * inside), 1 - CONFIDENCE
    low = float(beta.ppf(error / 2, found, inside - found + 1)) if found else 0.0
    high = float(beta.ppf(1 - error / 2, found + 1, inside - found)) if found < inside else 1.0
    return Interval(rate, low, high)
