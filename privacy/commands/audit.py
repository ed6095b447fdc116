"""`privacy audit`: attack a fresh run or a federation's checkpoint, and write what came of it."""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from federation import __version__
from federation.errors import ConfigError
from federation.files import write_whole
from federation.task.data import open_data, task_from_data
from federation.task.models import CNN
from federation.wire.messages import TrainSpec
from privacy.commands.findings import Findings, Subject, as_json
from privacy.commands.fresh import Fresh, Outcome, attack_fresh, room
from privacy.commands.training import Protection

if TYPE_CHECKING:
    from torch import nn

    from federation.task.images import ImageData

POOL, CANARIES, GRADIENT_CANARIES = 2000, 1000, 1000
"""At most, where the data has enough. With 1,000 canaries a model that remembers all shows an epsilon above 4."""

EPOCHS = 20
"""A run that remembers its samples without protection: a model that has learned nothing leaks nothing."""

PLAIN = TrainSpec(epochs=EPOCHS, batch_size=32, learning_rate=0.02)
PRIVATE = TrainSpec(epochs=EPOCHS, batch_size=500, learning_rate=0.05)
"""Noise wants large batches (Tramer and Boneh 2021)."""


class Request(Struct, frozen=True, kw_only=True):
    """What `privacy audit` was asked.

    Attributes:
        data: Data set; what the devices trained on, where there is a checkpoint.
        model: Name of the model of a fresh run.
        checkpoint: File or state folder; None trains a fresh run.
        round: Of a state folder; None is the newest.
        holdout: Of a checkpoint; empty takes the test split of ``data``.
        epsilon: Of a fresh run: its target, 0 for no protection. Of a checkpoint: what is claimed, 0 for nothing.
        delta: At which it is stated.
        clip_norm: Of a fresh private run.
        epochs: Of the training; 0 takes that of :data:`PLAIN` or :data:`PRIVATE`.
        batch_size: Likewise; 0 also takes a smaller one where there are few samples.
        learning_rate: Likewise.
        pictures: In the pool; 0 takes what suits the data.
        canaries: Mislabelled ones; 0 takes what suits the data.
        gradient_canaries: Of a private run.
        reference: Train a reference model.
        shown: Pictures in the inversion; 0 leaves it out.
        seed: Of coins, labels, choice and initial weights.
    """

    data: str
    model: str = CNN
    checkpoint: Path | None = None
    round: int | None = None
    holdout: str = ""
    epsilon: float = 0.0
    delta: float = 1e-5
    clip_norm: float = 1.0
    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    pictures: int = 0
    canaries: int = 0
    gradient_canaries: int = GRADIENT_CANARIES
    reference: bool = True
    shown: int = 5
    seed: int = 0

    @property
    def training(self) -> TrainSpec:
        """Local training."""
        usual = PRIVATE if self.epsilon and self.checkpoint is None else PLAIN
        return msgspec.structs.replace(
            usual,
            epochs=self.epochs or usual.epochs,
            batch_size=self.batch_size or usual.batch_size,
            learning_rate=self.learning_rate or usual.learning_rate,
        )


def audit(request: Request) -> Findings:
    """Train where nothing is trained yet, attack, and gather what was found.

    Raises:
        ConfigError: If the data, the model or the checkpoint does not fit.
    """
    began = time.monotonic()
    if not 0 < request.delta < 1:
        raise ConfigError(f"--delta {request.delta:g} must lie between 0 and 1; 1e-5 is usual")
    if request.checkpoint is None:
        subject, outcome, data, attacked = _fresh(request)
    else:
        subject, outcome, data, attacked = _checkpoint(request)
    pictures, labels = _pictures(request, attacked, data)
    return Findings(
        subject=subject,
        attacks=outcome.attacks,
        pictures=pictures,
        labels=labels,
        seconds=time.monotonic() - began,
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def write(findings: Findings, page: Path, figures: Path | None) -> None:
    """Write the report, and the figures where they are wanted.

    Args:
        findings: Of :func:`audit`.
        page: HTML file.
        figures: JSON file, or None.
    """
    from privacy.commands.report import html

    write_whole(page, html(findings).encode())
    if figures is not None:
        write_whole(figures, msgspec.json.format(msgspec.json.encode(as_json(findings)), indent=2) + b"\n")


def _fresh(request: Request) -> tuple[Subject, Outcome, ImageData, nn.Module]:
    from federation.task.models import build

    task = msgspec.structs.replace(
        task_from_data(request.data, request.model), dp_ready=bool(request.epsilon)
    )
    data = open_data(request.data, task, train=True)
    most = room(len(data), reference=request.reference)
    canaries = request.canaries or min(CANARIES, most // 2)
    protection = None
    if request.epsilon:
        protection = Protection(epsilon=request.epsilon, delta=request.delta, clip_norm=request.clip_norm)
    fresh = Fresh(
        data=data,
        spec=request.training,
        protection=protection,
        delta=request.delta,
        pictures=request.pictures or min(POOL, most),
        canaries=canaries,
        gradient_canaries=request.gradient_canaries,
        reference=request.reference,
        seed=request.seed,
    )
    if not request.batch_size:
        # Of few samples the usual batch would be most; a quarter is what it is of the usual number.
        batch = min(fresh.spec.batch_size, max(1, fresh.expected // 4))
        fresh = dataclasses.replace(fresh, spec=msgspec.structs.replace(fresh.spec, batch_size=batch))
    outcome = attack_fresh(fresh)
    spec = fresh.spec
    facts = {
        "Data": f"{request.data} ({len(data):,} pictures, of which {outcome.trained:,} samples were trained on, canaries included)",
        "Model": f"{request.model}, freshly trained for this audit",
        "Training": f"{spec.epochs} epochs, batches of {spec.batch_size}, learning rate {spec.learning_rate:g}, momentum "
        f"{spec.momentum:g}",
        "Protection": "none",
    }
    if outcome.private is not None:
        facts["Protection"] = (
            f"DP-SGD: noise multiplier {outcome.private.noise_multiplier:g}, clip norm {outcome.private.clip_norm:g}, sampling rate "
            f"{outcome.private.sample_rate:g}, {outcome.private.steps:,} steps; epsilon {outcome.epsilon:.3f} at delta "
            f"{request.delta:g} for adding or removing one sample"
        )
    facts["Seed"] = (
        f"{request.seed} (of coins, labels and first weights; noise and private batches have none)"
    )
    subject = Subject(
        title=f"{request.model} on {request.data.partition(':')[0]}, "
        + (f"epsilon {request.epsilon:g}" if request.epsilon else "without protection"),
        facts=facts,
        epsilon=outcome.epsilon,
        delta=request.delta,
        accuracy=outcome.accuracy,
    )
    # Devices send gradients of the model as it begins, too: that is when they tell most.
    return subject, outcome, data, build(task, seed=request.seed)


def _checkpoint(request: Request) -> tuple[Subject, Outcome, ImageData, nn.Module]:
    from privacy.commands.checkpoint import attack_checkpoint

    assert request.checkpoint is not None
    info, outcome = attack_checkpoint(
        request.checkpoint,
        request.round,
        request.data,
        request.holdout,
        pictures=request.pictures or POOL,
        reference=request.reference,
        train=request.training,
        seed=request.seed,
    )
    claimed = request.epsilon or None
    subject = Subject(
        title=f"{info.federation}, round {info.round}",
        facts={
            "Checkpoint": f"{request.checkpoint}: {info.task.model}, round {info.round} of federation {info.federation}",
            "Members": f"{request.data} ({outcome.trained:,} pictures, training split)",
            "Strangers": f"{request.holdout or request.data} (test split)",
            "Claimed": "nothing"
            if claimed is None
            else f"epsilon {claimed:g} at delta {request.delta:g}, as told to this command",
        },
        epsilon=claimed,
        delta=request.delta,
        accuracy=outcome.accuracy,
    )
    return subject, outcome, open_data(request.data, info.task, train=True), outcome.model


def _pictures(request: Request, model: nn.Module, data: ImageData) -> tuple[tuple, tuple[str, ...]]:  # type: ignore[type-arg]
    from privacy.commands.pictures import labels_of, recover

    if not request.shown:
        return (), ()
    return recover(model, data, request.shown, request.seed), labels_of(data, request.shown, request.seed)
