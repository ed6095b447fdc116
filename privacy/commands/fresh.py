"""The audit of a fresh run: plant canaries, train as devices do, attack what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from federation.errors import ConfigError
from federation.task.images import ImageData
from federation.task.models import build
from federation.wire.messages import TrainSpec
from privacy.audit.bounds import CONFIDENCE, one_run_bound
from privacy.audit.canaries import (
    NO_CANARY,
    Answers,
    answers,
    draw_coins,
    gradient_scores,
    mislabelled,
    with_canaries,
)
from privacy.audit.membership import membership
from privacy.budget import PrivateRound
from privacy.commands.findings import Attack
from privacy.commands.training import Protection, Samples, fit, fit_private, private_round

if TYPE_CHECKING:
    from torch import nn

_LEAST_POOL = 40
"""Pictures below which no attack can be measured."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """A run that is trained to be attacked.

    Attributes:
        data: Pictures, in the shape of the task; training split.
        spec: Local training.
        protection: None trains without.
        delta: At which bounds are stated; that of the protection, where there is one.
        pictures: In the pool of ordinary pictures, of which coins choose half for the training.
        canaries: Mislabelled ones; coins choose half of them too.
        gradient_canaries: Likewise; only with protection. Without it nothing hides them, and nothing need be shown.
        reference: Train a second model on other pictures, against which losses are calibrated.
        seed: Of coins, labels, initial weights and, without protection, the order of the samples.
    """

    data: ImageData
    spec: TrainSpec
    protection: Protection | None
    delta: float
    pictures: int
    canaries: int
    gradient_canaries: int
    reference: bool
    seed: int

    @property
    def expected(self) -> int:
        """Training samples, on average over the coins."""
        gradient = self.gradient_canaries if self.protection else 0
        return (self.pictures + self.canaries + gradient) // 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        attacks: Each with a bound; together they hold with 95 % confidence.
        accuracy: Of the model on pictures that the coins left out.
        private: How it was trained; None without protection.
        epsilon: That this costs; None without protection.
        trained: Samples in the training.
        model: After training, without the canaries' layer.
    """

    attacks: tuple[Attack, ...]
    accuracy: float
    private: PrivateRound | None
    epsilon: float | None
    trained: int
    model: nn.Module


def room(available: int, *, reference: bool) -> int:
    """How many pictures the pool and the mislabelled canaries may each have.

    Args:
        available: In the training split.
        reference: Whether a reference model needs some for itself, half as many.
    """
    return int(available / (2.5 if reference else 2))


def attack_fresh(fresh: Fresh) -> Outcome:
    """Train one model, or two with a reference, and attack the first.

    Raises:
        ConfigError: If there are too few pictures, or the model cannot be trained so.
    """
    _check(fresh)
    random = np.random.default_rng([fresh.seed, 1])
    coins = np.random.default_rng([fresh.seed, 2])
    labels, task = fresh.data.labels, fresh.data.task
    pool, planted, other = np.split(
        random.permutation(len(fresh.data))[: fresh.pictures + fresh.canaries + fresh.pictures // 2],
        [fresh.pictures, fresh.pictures + fresh.canaries],
    )
    wrong = mislabelled(labels[planted], len(task.labels), random)
    in_pool, in_planted = draw_coins(len(pool), coins), draw_coins(len(planted), coins)
    rows = np.concatenate([pool[in_pool], planted[in_planted]])
    wanted = np.concatenate([labels[pool[in_pool]], wrong[in_planted]])
    model = build(task, seed=fresh.seed)
    gradient: Attack | None = None
    private: PrivateRound | None = None
    epsilon: float | None = None
    count = 2 + fresh.reference + (fresh.protection is not None and fresh.gradient_canaries > 0)
    confidence = 1 - (1 - CONFIDENCE) / count
    delta = fresh.delta
    if fresh.protection is None:
        plain = Samples(fresh.data, rows, wanted)
        fit(model, plain.batch, len(plain), fresh.spec, random)
    else:
        private, epsilon = private_round(fresh.protection, fresh.spec, fresh.expected)
        gradient = _train_privately(fresh, model, rows, wanted, private, coins, confidence)

    def asked(some: np.ndarray, under: np.ndarray, of: nn.Module) -> Answers:
        return answers(of, Samples(fresh.data, some, under).batch, len(some))

    attacks = [] if gradient is None else [gradient]
    lost = asked(planted, wrong, model).losses
    attacks.append(
        _attack(
            "mislabelled",
            "Mislabelled pictures",
            "has the finished model and asks it about pictures (black box).",
            f"{len(planted):,} pictures got a wrong label, and a coin decided for each whether it was trained on. A model can only "
            "answer such a label by remembering it, so a low loss betrays a member.",
            -lost,
            in_planted,
            delta,
            confidence,
        )
    )
    known = asked(pool, labels[pool], model)
    attacks.append(
        _attack(
            "loss",
            "Membership by loss",
            "has the finished model and the picture in question.",
            "Ordinary pictures with their right labels, half of them trained on, by a coin each. What was trained on tends to "
            "have the lower loss.",
            -known.losses,
            in_pool,
            delta,
            confidence,
        )
    )
    if fresh.reference:
        second = build(task, seed=fresh.seed + 1)
        reference = Samples(fresh.data, other, labels[other])
        fit(second, reference.batch, len(reference), fresh.spec, random)
        attacks.append(
            _attack(
                "calibrated",
                "Membership by loss, calibrated",
                "also trained a model of their own on other pictures of the same kind.",
                "As before, but each loss is compared with that of a reference model, so that pictures that are hard for any "
                "model do not look like strangers (Carlini et al. 2022, with one reference).",
                asked(pool, labels[pool], second).losses - known.losses,
                in_pool,
                delta,
                confidence,
            )
        )
    left_out = pool[~in_pool]
    accuracy = asked(left_out, labels[left_out], model).accuracy
    return Outcome(tuple(attacks), accuracy, private, epsilon, len(rows), model)


def _train_privately(
    fresh: Fresh,
    model: nn.Module,
    rows: np.ndarray,
    wanted: np.ndarray,
    private: PrivateRound,
    coins: np.random.Generator,
    confidence: float,
) -> Attack | None:
    """Train by DP-SGD with gradient canaries beside the samples, and attack those."""
    count = fresh.gradient_canaries
    if not count:
        samples = Samples(fresh.data, rows, wanted)
        fit_private(model, samples.batch, len(samples), fresh.spec, private)
        return None
    task = fresh.data.task
    shape = (task.channels, task.height, task.width)
    widened = with_canaries(model, shape, len(task.labels), count, private.clip_norm).train()
    inside = draw_coins(count, coins)
    own = np.arange(count) % len(task.labels)
    planted = np.flatnonzero(inside)
    samples = Samples(
        fresh.data,
        # What the picture of a gradient canary shows does not matter: its answer does not come from it.
        np.concatenate([rows, np.zeros(len(planted), np.int64)]),
        np.concatenate([wanted, own[planted]]),
        np.concatenate([np.full(len(rows), NO_CANARY), planted]),
    )
    fit_private(widened, samples.batch, len(samples), fresh.spec, private)
    weights = widened.get_parameter("canaries.weight").detach().cpu().numpy()
    return _attack(
        "gradient",
        "Gradient canaries",
        "sees the model after every step and chose the worst samples there can be (white box).",
        f"{count:,} samples were made whose gradients touch weights of their own and nothing else, so that only the noise hides "
        "whether one took part. This tests clipping, noise and sampling themselves.",
        gradient_scores(weights, own),
        inside,
        fresh.delta,
        confidence,
    )


def _attack(
    key: str,
    title: str,
    attacker: str,
    how: str,
    scores: np.ndarray,
    member: np.ndarray,
    delta: float,
    confidence: float,
) -> Attack:
    bound = one_run_bound(scores, member, delta=delta, confidence=confidence)
    return Attack(key, title, attacker, how, membership(scores, member), bound, scores, member)


def _check(fresh: Fresh) -> None:
    needed = fresh.pictures + fresh.canaries + (fresh.pictures // 2 if fresh.reference else 0)
    if min(fresh.pictures, fresh.canaries) < _LEAST_POOL:
        raise ConfigError(
            f"{min(fresh.pictures, fresh.canaries)} pictures are too few for an attack to be measured: give {_LEAST_POOL} "
            "or more to --pictures and --canaries"
        )
    if needed > len(fresh.data):
        raise ConfigError(
            f"{needed} pictures are needed and the data has {len(fresh.data)}: lower --pictures or --canaries, or use "
            "--no-reference"
        )
    if fresh.protection and fresh.spec.batch_size > fresh.expected:
        raise ConfigError(
            f"--batch-size {fresh.spec.batch_size} is more than the {fresh.expected} samples that are trained on: use "
            f"{max(1, fresh.expected // 10)} or less"
        )
    if fresh.delta * fresh.expected >= 1:
        raise ConfigError(
            f"--delta {fresh.delta:g} is not below 1 / {fresh.expected} samples: use {0.1 / fresh.expected:.1g}"
        )
