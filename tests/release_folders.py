"""Exported release folders with linear models, as ``model-export onnx`` writes them, made without torch; and pictures for them."""

from pathlib import Path

import msgspec
import numpy as np
from linear_model import card, linear_core, save
from onnx import numpy_helper
from PIL import Image

from aggregator.releases.records import ReleaseState, StoredRelease
from aggregator.releases.rollout_events import Announce, Mark
from aggregator.releases.store import ReleaseStore
from federation.release import GOLDEN_FILE
from federation.task.engine import Engine
from federation.task.golden import Golden, write_golden
from federation.task.model_card import ModelCard
from federation.wire.release import Channel, ModelFormat, Requirements

FEDERATION = "garden"
REQUIREMENTS = Requirements(opset=20, ir_version=10, min_runtime="1.18", card_format="1")
GREYS = {"dark": 20, "bright": 230, "other": 128}
PICTURES = 5
SIDE = 16
"""So that a model has more weights than words."""


def exported(
    folder: Path,
    *,
    scale: float = 1.0,
    number: int = 3,
    federation: str = FEDERATION,
    labels: tuple[str, ...] = tuple(GREYS),
    weights: ModelFormat = ModelFormat.FP32,
    requirements: Requirements | None = REQUIREMENTS,
    answers_of: Path | None = None,
    seed: int | None = None,
) -> Path:
    """A release folder.

    Args:
        folder: Made.
        scale: Of the weights; a negative one takes dark for bright, NaN makes the model answer with NaN.
        number: Round.
        federation: Whose.
        labels: Three class names.
        weights: What the card says of them.
        requirements: What the card says.
        answers_of: Another folder, whose golden set is taken.
        seed: Adds a little noise to the weights, so that models differ in all of them.
    """
    folder.mkdir(parents=True)
    described = _card(number, federation, labels, weights, requirements)
    core = linear_core(scale=scale, side=SIDE)
    if seed is not None:
        (weight,) = core.graph.initializer
        values = numpy_helper.to_array(weight)
        noise = np.random.default_rng(seed).normal(0, 1e-3, values.shape).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(values + noise, weight.name))
    model = save(core, described.properties(), folder)
    frames = tuple(np.full((6, 5), grey, np.uint8) for grey in (20, 230))
    if answers_of is not None:
        (folder / GOLDEN_FILE).write_bytes((answers_of / GOLDEN_FILE).read_bytes())
        return folder
    if scale != scale:  # noqa: PLR0124 - NaN
        said = [("dark", 1.0)] * len(frames)
    else:
        engine = Engine(model)
        said = [(found.label, found.confidence) for found in map(engine.predict, frames)]
    golden = Golden(
        frames=frames,
        labels=tuple(label for label, _ in said),
        probabilities=tuple(probability for _, probability in said),
        tolerance=0.01,
    )
    write_golden(folder / GOLDEN_FILE, golden)
    return folder


def _card(
    number: int,
    federation: str,
    labels: tuple[str, ...],
    weights: ModelFormat,
    requirements: Requirements | None,
) -> ModelCard:
    plain = card()
    recipe = msgspec.structs.replace(plain.preprocessing, height=SIDE, width=SIDE)
    provenance = msgspec.structs.replace(
        plain.provenance, round=number, federation=federation, weights=weights
    )
    return card(labels=labels, provenance=provenance, requirements=requirements, preprocessing=recipe)


def pictures(folder: Path) -> str:
    """A folder with dark and bright pictures in folders of their names, as a data spec."""
    for name in ("dark", "bright", "other"):
        (folder / name).mkdir(parents=True)
    for name in ("dark", "bright"):
        for each in range(PICTURES):
            Image.new("L", (9, 7), GREYS[name] + each).save(folder / name / f"{each}.png")
    Image.new("L", (9, 7), GREYS["dark"]).save(folder / "other" / "wrong.png")
    return f"imagefolder:{folder}"


def make_stable(store: ReleaseStore, stored: StoredRelease) -> None:
    """What a server does when a release reaches all devices."""
    store.carry_out(
        [Announce(Channel.STABLE, stored.number, 1.0, 1), Mark(stored.number, ReleaseState.STABLE, "")]
    )
