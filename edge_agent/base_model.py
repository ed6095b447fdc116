"""From what was fetched to the base model of a round: read or build the start, apply the deltas, check the digest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from federation.errors import PeerError, VerificationError
from federation.files import write_whole
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.wire.fields import Name
from federation.wire.messages import RoundPlan, TaskSpec
from federation.wire.versions import Built, Route, apply_delta, model_digest

log = structlog.get_logger()

Arrays = Mapping[str, NDArray[np.float32]]

Build = Callable[[TaskSpec, int], Arrays]
"""Makes the initial model of a task from a seed."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that is needed to make a base model, on this device's disk.

    Attributes:
        route: What to do.
        start: File of the version to start from; None where it is to be built.
        frames: Files of the route's deltas, in order.
        target: Where the result is kept for the next round.
    """

    route: Route
    start: Path | None
    frames: tuple[Path, ...]
    target: Path


def make_base(recipe: Recipe, plan: RoundPlan, federation: Name, build: Build) -> Arrays:
    """Make the base model of a round, and keep it.

    Args:
        recipe: How.
        plan: Of the round.
        federation: Goes into the file that is kept.
        build: Used where the recipe starts from a seed.

    Returns:
        Tensors by name, float32; exactly the version that the plan names.

    Raises:
        VerificationError: If it turned out to be another version, or a file is damaged.
        ConfigError: If it cannot be kept.
    """
    model = _start(recipe, plan.task, build)
    for delta, file in zip(recipe.route.deltas, recipe.frames, strict=True):
        try:
            model = apply_delta(model, file.read_bytes(), delta.encoding)
        except (OSError, PeerError) as error:
            raise VerificationError(f"the delta {file.name} cannot be applied: {error}") from error
    digest = model_digest(model)
    if digest != recipe.route.version:
        raise VerificationError(f"this gives version {digest[:12]}, not {recipe.route.version[:12]}")
    if recipe.start != recipe.target:
        info = CheckpointInfo(federation=federation, round=plan.round - 1, task=plan.task)
        # Its digest is checked when it is read, and there is another way to it: training need not wait for the disk.
        write_whole(recipe.target, checkpoint_bytes(info, model), durable=False)
    return model


def _start(recipe: Recipe, task: TaskSpec, build: Build) -> Arrays:
    start = recipe.route.start
    if isinstance(start, Built):
        log.info("initial_model_built", seed=start.seed, version=start.version[:12])
        return build(task, start.seed)
    assert recipe.start is not None
    try:
        model = load_file(recipe.start)
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: a type that NumPy does not have
        raise VerificationError(f"{recipe.start} cannot be read: {error}") from error
    for name, array in model.items():
        if array.dtype != np.float32:
            raise VerificationError(f"{recipe.start}: tensor {name!r} is {array.dtype}, not float32")
    return model
