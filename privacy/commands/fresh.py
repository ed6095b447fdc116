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
    planted = _plant(fresh, random, coins)
    model = build(fresh.data.task, seed=fresh.seed)
    if fresh.protection is None:
        private, epsilon = None, None
        fit(model, planted.training.batch, len(planted.training), fresh.spec, random)
        attacks = []
    else:
        private, epsilon = private_round(fresh.protection, fresh.spec, fresh.expected)
        attacks = _train_privately(fresh, model, planted.training, private, coins)
    attacks.append(_by_mislabelled(fresh, planted, model))
    attacks += _by_loss(fresh, planted, model, random)
    left_out = planted.pool[~planted.in_pool]
    accuracy = _asked(fresh, model, left_out, fresh.data.labels[left_out]).accuracy
    return Outcome(tuple(attacks), accuracy, private, epsilon, len(planted.training), model)


@dataclass(frozen=True, slots=True)
class _Planted:
    """Who is in the training data, and who is not.

    Attributes:
        pool: Rows of the ordinary pictures.
        in_pool: Their coins.
        canaries: Rows of the mislabelled pictures.
        wrong: Their labels.
        in_canaries: Their coins.
        other: Rows for the reference model.
        training: What the coins put into the training, gradient canaries not included.
    """

    pool: np.ndarray
    in_pool: np.ndarray
    canaries: np.ndarray
    wrong: np.ndarray
    in_canaries: np.ndarray
    other: np.ndarray
    training: Samples


def _plant(fresh: Fresh, random: np.random.Generator, coins: np.random.Generator) -> _Planted:
    labels = fresh.data.labels
    needed = fresh.pictures + fresh.canaries + fresh.pictures // 2
    chosen = random.permutation(len(fresh.data))[:needed]
    pool, canaries, other = np.split(chosen, [fresh.pictures, fresh.pictures + fresh.canaries])
    wrong = mislabelled(labels[canaries], len(fresh.data.task.labels), random)
    in_pool, in_canaries = draw_coins(len(pool), coins), draw_coins(len(canaries), coins)
    training = Samples(
        fresh.data,
        np.concatenate([pool[in_pool], canaries[in_canaries]]),
        np.concatenate([labels[pool[in_pool]], wrong[in_canaries]]),
    )
    return _Planted(pool, in_pool, canaries, wrong, in_canaries, other, training)


def _by_mislabelled(fresh: Fresh, planted: _Planted, model: nn.Module) -> Attack:
    return _attack(
        fresh,
        "mislabelled",
        "Mislabelled pictures",
        "has the finished model and asks it about pictures (black box).",
        f"{len(planted.canaries):,} pictures got a wrong label, and a coin decided for each whether it was trained on. A model can "
        "only answer such a label by remembering it, so a low loss betrays a member.",
        -_asked(fresh, model, planted.canaries, planted.wrong).losses,
        planted.in_canaries,
    )


def _by_loss(fresh: Fresh, planted: _Planted, model: nn.Module, random: np.random.Generator) -> list[Attack]:
    labels = fresh.data.labels
    losses = _asked(fresh, model, planted.pool, labels[planted.pool]).losses
    plain = _attack(
        fresh,
        "loss",
        "Membership by loss",
        "has the finished model and the picture in question.",
        "Ordinary pictures with their right labels, half of them trained on, by a coin each. What was trained on tends to have "
        "the lower loss.",
        -losses,
        planted.in_pool,
    )
    if not fresh.reference:
        return [plain]
    second = build(fresh.data.task, seed=fresh.seed + 1)
    known_to_them = Samples(fresh.data, planted.other, labels[planted.other])
    fit(second, known_to_them.batch, len(known_to_them), fresh.spec, random)
    calibrated = _attack(
        fresh,
        "calibrated",
        "Membership by loss, calibrated",
        "also trained a model of their own on other pictures of the same kind.",
        "As before, but each loss is compared with that of a reference model, so that pictures that are hard for any model do not "
        "look like strangers (Carlini et al. 2022, with one reference).",
        _asked(fresh, second, planted.pool, labels[planted.pool]).losses - losses,
        planted.in_pool,
    )
    return [plain, calibrated]


def _train_privately(
    fresh: Fresh, model: nn.Module, training: Samples, private: PrivateRound, coins: np.random.Generator
) -> list[Attack]:
    """Train by DP-SGD with gradient canaries beside the samples, and attack those."""
    count = fresh.gradient_canaries
    if not count:
        fit_private(model, training.batch, len(training), fresh.spec, private)
        return []
    task = fresh.data.task
    shape = (task.channels, task.height, task.width)
    widened = with_canaries(model, shape, len(task.labels), count, private.clip_norm).train()
    inside = draw_coins(count, coins)
    own = np.arange(count) % len(task.labels)
    planted = np.flatnonzero(inside)
    samples = Samples(
        fresh.data,
        # What the picture of a gradient canary shows does not matter: its answer does not come from it.
        np.concatenate([training.rows, np.zeros(len(planted), np.int64)]),
        np.concatenate([training.labels, own[planted]]),
        np.concatenate([np.full(len(training), NO_CANARY), planted]),
    )
    fit_private(widened, samples.batch, len(samples), fresh.spec, private)
    weights = widened.get_parameter("canaries.weight").detach().cpu().numpy()
    attack = _attack(
        fresh,
        "gradient",
        "Gradient canaries",
        "sees the model after every step and chose the worst samples there can be (white box).",
        f"{count:,} samples were made whose gradients touch weights of their own and nothing else, so that only the noise hides "
        "whether one took part. This tests clipping, noise and sampling themselves.",
        gradient_scores(weights, own),
        inside,
    )
    return [attack]


def _asked(fresh: Fresh, model: nn.Module, rows: np.ndarray, labels: np.ndarray) -> Answers:
    return answers(model, Samples(fresh.data, rows, labels).batch, len(rows))


def _attack(
    fresh: Fresh, key: str, title: str, attacker: str, how: str, scores: np.ndarray, member: np.ndarray
) -> Attack:
    attacks = 2 + fresh.reference + (fresh.protection is not None and fresh.gradient_canaries > 0)
    # Each may err with an equal part of the probability, so that all bounds hold together (Bonferroni).
    bound = one_run_bound(scores, member, delta=fresh.delta, confidence=1 - (1 - CONFIDENCE) / attacks)
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
