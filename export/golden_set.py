"""Which pictures a release is tried with on a device, and what it must say about them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from federation.task.engine import Engine, Prediction
from federation.task.golden import Golden
from federation.wire.release import ModelFormat

MOST_FRAMES = 16
FEWEST_FRAMES = 8
BUDGET_BYTES = 512 * 2**10
"""Of all frames but the first eight: a golden set travels to every device with every release."""

TOLERANCES = {ModelFormat.FP32: 0.01, ModelFormat.FP16: 0.01, ModelFormat.INT8: 0.1}
"""Differences of a probability between processors. float32 sums in another order: 1e-5 was seen. Integer sums are exact, but an
x86 processor without VNNI lets pairs of products saturate: single logits move by a few steps of the scale."""

_SEED = 20_240_229
_COARSE = 4
"""Pixels of the side of the noise that synthetic pictures are grown from: large soft blobs, as photographs have."""

_SYNTHETIC_SIDE = 128
_LARGER = 1.25


def make_golden(engine: Engine, candidates: Sequence[np.ndarray], written: ModelFormat) -> Golden:
    """Choose frames, and ask the model about them.

    The classes take turns, each with what the model is surest of first: a processor that rounds otherwise then says the same,
    and one that computes something else does not.

    Args:
        engine: The released file itself.
        candidates: uint8 ``[H, W, 3]`` or ``[H, W]``.
        written: Format of the file.

    Raises:
        VerificationError: If the model fails, or answers with NaN or infinity.
    """
    answers = [engine.predict(frame) for frame in candidates]
    chosen: list[int] = []
    taken_bytes = 0
    for number in _in_turn(answers):
        taken_bytes += candidates[number].nbytes
        if len(chosen) == MOST_FRAMES or (len(chosen) >= FEWEST_FRAMES and taken_bytes > BUDGET_BYTES):
            break
        chosen.append(number)
    return Golden(
        frames=tuple(candidates[number] for number in chosen),
        labels=tuple(answers[number].label for number in chosen),
        probabilities=tuple(min(1.0, answers[number].confidence) for number in chosen),
        tolerance=TOLERANCES[written],
    )


def synthetic_frames(channels: int, height: int, width: int, *, count: int) -> tuple[np.ndarray, ...]:
    """Pictures of soft blobs, always alike: for want of real ones.

    Args:
        channels: 1 or 3.
        height: Pixels of the model's input. Frames have its shape, but are at most 128 pixels high and wide; every other
            one is a quarter larger.
        width: As height.
        count: How many.

    Returns:
        uint8 ``[H, W]`` or ``[H, W, 3]``.
    """
    generator = np.random.default_rng(_SEED)
    frames = []
    for number in range(count):
        scale = min(1.0, _SYNTHETIC_SIDE / max(height, width)) * (_LARGER if number % 2 else 1.0)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        shape = (_COARSE, _COARSE) if channels == 1 else (_COARSE, _COARSE, channels)
        coarse = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        frames.append(np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)))
    return tuple(frames)


def _in_turn(answers: Sequence[Prediction]) -> list[int]:
    """The surest of every class, then the second surest of every class, and so on."""
    by_class: dict[int, list[int]] = {}
    for number in sorted(range(len(answers)), key=lambda number: -answers[number].confidence):
        by_class.setdefault(answers[number].index, []).append(number)
    turns = [
        (turn, place, number)
        for place, numbers in enumerate(by_class.values())
        for turn, number in enumerate(numbers)
    ]
    return [number for _, _, number in sorted(turns)]
