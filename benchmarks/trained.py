"""Trained models for benchmarks of inference: trained once, on real images where there are any, and kept.

``python -m benchmarks.trained MODEL...`` trains and prints where the checkpoints are.
"""

import hashlib
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from benchmarks.runner import say
from federation.files import write_whole
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.data import open_data, task_from_data
from federation.task.evaluate import evaluate
from federation.task.model_card import HoldOutMetrics
from federation.task.models import build, state_arrays

if TYPE_CHECKING:
    from torch import nn

    from federation.task.images import ImageData

SEED = 7

BATCH = 64

WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9
RISING = 0.25
MIRRORED = 0.5
"""Share of the batches of photographs that are seen from the other side."""

ESTIMATED_ON = 16
"""Batches for the statistics of BatchNorm."""

GREY, RGB = 1, 3


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a training, at one image size.

    Attributes:
        side: Pixels.
        images: Of the training set, drawn anew in each epoch; at most all.
        epochs: How often.
        rate: Highest learning rate of SGD with momentum; it rises for a quarter of the stage and falls to zero.
    """

    side: int
    images: int
    epochs: int
    rate: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained.

    Attributes:
        folder: Of the images, below ``FEDGE_DATA``.
        spec: Of the images, with ``{}`` for that folder.
        stages: One after the other. Photo models see small images first, which is eleven times as fast, and then
            those of the size that they are exported for (progressive resizing).
    """

    folder: str
    spec: str
    stages: tuple[Stage, ...]


PHOTO_SIDE = 224

RECIPES = {
    "cnn": Recipe("mnist", "mnist:{}", (Stage(28, 60_000, 3, 0.05),)),
    "mobilenet_v3_small": Recipe(
        "cifar10", "imagefolder:{}", (Stage(64, 10_000, 12, 0.05), Stage(PHOTO_SIDE, 4_000, 2, 0.02))
    ),
    "resnet18": Recipe(
        "cifar10", "imagefolder:{}", (Stage(64, 10_000, 6, 0.05), Stage(PHOTO_SIDE, 1_500, 2, 0.02))
    ),
}

QUICK_SHARE = 16
"""``--quick`` trains on so many times fewer images, unless a model that was trained on all is in the cache."""

QUICK_EPOCHS = 2
"""At most."""

DIGITS_EPOCHS = 10
"""Times as many epochs where scikit-learn's 1,437 digits stand in for the real images."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model.

    Attributes:
        name: Of the architecture.
        checkpoint: File, in the aggregator's format.
        data: Spec of the images.
        suffix: For keys of figures: empty, or ``_digits`` where the real images are missing.
    """

    name: str
    checkpoint: Path
    data: str
    suffix: str


def trained(name: str, *, quick: bool = False) -> Trained:
    """A checkpoint of this model, from the user's cache folder or trained now.

    Args:
        name: One of ``RECIPES``.
        quick: Take one that was trained on less, unless there is a better one.
    """
    recipe = RECIPES[name]
    data, suffix = _data(recipe)
    full = recipe.stages
    if suffix:
        full = tuple(_longer(stage) for stage in full)
    short = tuple(_shorter(stage) for stage in full)
    kept = _kept(name, data, full)
    if quick and not kept.exists():
        kept, full = _kept(name, data, short), short
    if not kept.exists():
        _train(name, data, full, kept)
    return Trained(name, kept, data, suffix)


def _shorter(stage: Stage) -> Stage:
    images = max(4 * BATCH, stage.images // QUICK_SHARE)
    return replace(stage, images=images, epochs=min(QUICK_EPOCHS, stage.epochs))


def _longer(stage: Stage) -> Stage:
    return replace(stage, epochs=stage.epochs * (1 if stage.side == PHOTO_SIDE else DIGITS_EPOCHS))


def _data(recipe: Recipe) -> tuple[str, str]:
    """The spec, and what figures on it are called after."""
    named = os.environ.get("FEDGE_DATA", "")
    folder = Path(named).expanduser().resolve() / recipe.folder
    if named and folder.is_dir():
        return recipe.spec.format(folder), ""
    return "digits", "_digits"


def _kept(name: str, data: str, stages: tuple[Stage, ...]) -> Path:
    """Where the checkpoint is, or will be: another recipe is another file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    recipe = hashlib.sha256(repr((data.partition(":")[0], stages, BATCH, SEED)).encode()).hexdigest()[:8]
    return cache / "fedge" / "trained" / f"{name}-{recipe}.safetensors"


def _train(name: str, data: str, stages: tuple[Stage, ...], kept: Path) -> None:
    import torch

    kind, side = data.partition(":")[0], stages[-1].side
    task = task_from_data(data, name, height=side, width=side, channels=RGB if side == PHOTO_SIDE else GREY)
    say(f"training {name} on {kind}, once, for {kept.parent}")
    model = build(task, seed=SEED).to(memory_format=torch.channels_last)
    generator = np.random.default_rng(SEED)
    began = time.monotonic()
    for stage in stages:
        sized = msgspec.structs.replace(task, height=stage.side, width=stage.side)
        loss = _stage(model, open_data(data, sized, train=True), stage, generator)
        say(f"  {stage.side} pixels: loss {loss:.3f} after {time.monotonic() - began:.0f} s")
    _estimate_again(model, open_data(data, task, train=True), generator)
    found = evaluate(model, open_data(data, task, train=False), batch_size=BATCH)
    say(f"  {found.accuracy:.1%} of {found.samples} test images, {time.monotonic() - began:.0f} s in all")
    kept.parent.mkdir(parents=True, exist_ok=True)
    metrics = HoldOutMetrics(loss=found.loss, accuracy=found.accuracy, samples=found.samples)
    write_whole(kept.with_suffix(".json"), msgspec.json.encode(metrics))
    info = CheckpointInfo(federation="benchmark", round=1, task=task)
    write_whole(kept, checkpoint_bytes(info, state_arrays(model)))


def _stage(model: "nn.Module", data: "ImageData", stage: Stage, generator: np.random.Generator) -> float:
    """Train; returns the mean loss of the last epoch."""
    import torch

    count = min(stage.images, len(data))
    steps = stage.epochs * (count // BATCH)
    optimizer = torch.optim.SGD(
        model.parameters(), stage.rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.rate, total_steps=steps, pct_start=RISING, cycle_momentum=False
    )
    model.train()
    loss_sum = 0.0
    for _ in range(stage.epochs):
        loss_sum = 0.0
        rows = generator.permutation(len(data))[: count // BATCH * BATCH]
        for batch in rows.reshape(-1, BATCH):
            images, labels = data.batch(batch)
            if images.shape[1] == RGB and generator.random() < MIRRORED:
                images = images.flip(-1)
            loss = torch.nn.functional.cross_entropy(
                model(images.contiguous(memory_format=torch.channels_last)), labels
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            loss_sum += float(loss.detach())
    return loss_sum / (count // BATCH)


def _estimate_again(model: "nn.Module", data: "ImageData", generator: np.random.Generator) -> None:
    """Estimate BatchNorm's statistics on images of the last size, with the final weights.

    Running averages remember the smaller images: MobileNetV3's move by a hundredth in a step.
    """
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches from here
    model.train()
    rows = generator.permutation(len(data))[: ESTIMATED_ON * BATCH] if norms else np.empty(0, np.int64)
    with torch.no_grad():
        for batch in rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH):
            model(data.batch(batch)[0])
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def main() -> None:
    """Train what is named, or everything."""
    for name in sys.argv[1:] or RECIPES:
        if name not in RECIPES:
            sys.exit(f"error: no recipe for {name!r}: there are {', '.join(RECIPES)}")
        say(f"{name}: {trained(name).checkpoint}")


if __name__ == "__main__":
    main()
