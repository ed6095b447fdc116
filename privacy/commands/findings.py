"""What an audit found, as it is written to JSON and shown in the report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from msgspec import Struct

from privacy.audit.bounds import LowerBound
from privacy.audit.membership import Interval, Membership


class Subject(Struct, frozen=True, kw_only=True):
    """What was attacked.

    Attributes:
        title: In a few words.
        facts: Name to value, for people: data, model, training, protection.
        epsilon: That is claimed; None where nothing is.
        delta: At which it is stated.
        accuracy: Of the model on pictures that it was not trained on, in [0, 1]; None where it was not measured.
    """

    title: str
    facts: dict[str, str]
    epsilon: float | None
    delta: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack and how well it did.

    Attributes:
        key: Short name, for the JSON.
        title: For people.
        attacker: What the attacker sees and knows.
        how: What is done, in plain words.
        membership: Measured.
        bound: Lower bound on epsilon; None where membership was not decided by coins. The bounds of all attacks hold together
            with 95 % confidence.
        scores: float ``[n]``.
        member: bool ``[n]``.
    """

    key: str
    title: str
    attacker: str
    how: str
    membership: Membership
    bound: LowerBound | None
    scores: np.ndarray
    member: np.ndarray

    @property
    def bound_epsilon(self) -> float:
        """The lower bound on epsilon; 0 where none holds or nothing was shown."""
        return 0.0 if self.bound is None else self.bound.epsilon


@dataclass(frozen=True, slots=True)
class Picture:
    """One row of the inversion's table.

    Attributes:
        title: What the attacker saw.
        text: What it shows.
        images: uint8 ``[n, H, W, C]``: originals, or what was recovered.
        similarity: Correlation with the originals; empty for the originals themselves.
    """

    title: str
    text: str
    images: np.ndarray
    similarity: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that an audit found.

    Attributes:
        subject: What was attacked.
        attacks: In the order in which they are shown.
        pictures: Of the gradient inversion; empty if it was left out.
        labels: Of the pictures.
        seconds: That it took.
        version: Of fedge.
        made: When, ISO 8601.
    """

    subject: Subject
    attacks: tuple[Attack, ...]
    pictures: tuple[Picture, ...]
    labels: tuple[str, ...]
    seconds: float
    version: str
    made: str

    @property
    def bound(self) -> LowerBound | None:
        """The largest of the lower bounds that hold; None if there is none."""
        bounds = [attack.bound for attack in self.attacks if attack.bound is not None]
        return max(bounds, key=lambda bound: bound.epsilon, default=None)

    @property
    def exceeded(self) -> bool:
        """Whether more was shown than is claimed: then the protection is broken, or the claim wrong."""
        return (
            self.subject.epsilon is not None
            and self.bound is not None
            and self.bound.epsilon > self.subject.epsilon
        )


def as_json(findings: Findings) -> dict[str, object]:
    """The figures without scores and pictures."""
    bound = findings.bound
    return {
        "subject": findings.subject,
        "epsilon_claimed": findings.subject.epsilon,
        "epsilon_lower_bound": None if bound is None else bound.epsilon,
        "exceeded": findings.exceeded,
        "attacks": {attack.key: _attack(attack) for attack in findings.attacks},
        "inversion": {
            picture.title: list(picture.similarity) for picture in findings.pictures if picture.similarity
        },
        "seconds": round(findings.seconds, 1),
        "version": findings.version,
        "made": findings.made,
    }


def _attack(attack: Attack) -> dict[str, object]:
    found, bound = attack.membership, attack.bound
    shown: dict[str, object] = {
        "auc": _interval(found.auc),
        "tpr_at_1_percent_fpr": _interval(found.tpr),
        "members": found.members,
        "strangers": found.strangers,
    }
    if bound is not None:
        shown["lower_bound"] = {
            "epsilon": bound.epsilon,
            "delta": bound.delta,
            "confidence": bound.confidence,
            "canaries": bound.canaries,
            "guesses": bound.guesses,
            "correct": bound.correct,
        }
    return shown


def _interval(interval: Interval) -> dict[str, float]:
    return {
        "value": round(interval.value, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
    }
