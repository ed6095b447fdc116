"""The audit of a federation's checkpoint: who was in the training data?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from federation.errors import ConfigError
from federation.task.checkpoint import CheckpointInfo, find_checkpoint, read_checkpoint
from federation.task.data import open_data
from federation.task.models import build, load_arrays
from federation.wire.messages import TrainSpec
from privacy.audit.canaries import answers
from privacy.audit.membership import membership
from privacy.commands.findings import Attack
from privacy.commands.fresh import Outcome
from privacy.commands.training import Samples, fit

_LEAST = 40
"""Pictures on each side below which no attack can be measured."""


def attack_checkpoint(
    source: Path, number: int | None, spec: str, holdout: str, *, pictures: int, reference: bool, train: TrainSpec, seed: int
) -> tuple[CheckpointInfo, Outcome]:  # fmt: skip
    """Attack a trained model with pictures that were trained on and others that were not.

    Args:
        source: A checkpoint file or the aggregator's state folder.
        number: Round, of a state folder; None is the newest.
        spec: Data that the devices trained on (its training split).
        holdout: Data that no device trained on (its test split); empty takes the test split of ``spec``.
        pictures: On each side, at most.
        reference: Train a model on half of the strangers, and calibrate by it.
        train: How the reference is trained.
        seed: Of the choice of pictures.

    Raises:
        ConfigError: If the checkpoint or the data does not fit, or has too few pictures.
    """
    info, arrays = read_checkpoint(find_checkpoint(source, number) if source.is_dir() else source)
    task, random = info.task, np.random.default_rng([seed, 1])
    model = build(task)
    load_arrays(model, arrays)
    inside = open_data(spec, task, train=True)
    outside = open_data(holdout or spec, task, train=False)
    if min(len(inside), len(outside)) < 2 * _LEAST:
        raise ConfigError(
            f"{len(inside)} members and {len(outside)} strangers are too few for an attack to be measured: {2 * _LEAST} of each"
        )
    order = random.permutation(len(outside))
    other, strangers = np.split(order, [len(order) // 2 if reference else 0])
    strangers = strangers[:pictures]
    members = random.permutation(len(inside))[:pictures]
    asked = [
        Samples(inside, members, inside.labels[members]),
        Samples(outside, strangers, outside.labels[strangers]),
    ]
    known = [answers(model, each.batch, len(each)) for each in asked]
    member = np.repeat([True, False], [len(members), len(strangers)])
    losses = np.concatenate([each.losses for each in known])
    attacks = [
        Attack(
            "loss",
            "Membership by loss",
            "has the finished model and the picture in question.",
            "What was trained on tends to have the lower loss. Members are taken from the training data, strangers from the "
            "hold-out.",
            membership(-losses, member),
            None,
            -losses,
            member,
        )
    ]
    if reference:
        second = build(task, seed=seed + 1)
        known_to_them = Samples(outside, other, outside.labels[other])
        fit(second, known_to_them.batch, len(known_to_them), train, random)
        scores = np.concatenate([answers(second, each.batch, len(each)).losses for each in asked]) - losses
        attacks.append(
            Attack(
                "calibrated",
                "Membership by loss, calibrated",
                "also trained a model of their own on other pictures of the same kind.",
                "As before, but each loss is compared with that of a reference model (Carlini et al. 2022, with one reference).",
                membership(scores, member),
                None,
                scores,
                member,
            )
        )
    return info, Outcome(tuple(attacks), known[1].accuracy, None, None, len(inside), model)
