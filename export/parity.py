"""Does onnxruntime say what torch says? The check that an export must pass before its file exists."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from federation.errors import VerificationError
from federation.task.engine import Engine, session_options, softmax
from federation.task.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

DEFAULT_TOLERANCE = 1e-4
"""Measured over torchvision's models: 1e-8 to 5e-6. A wrong weight or operator shows as 1e-2 and more."""

FUSED_TOLERANCE = 1e-3
"""Of a probability: the same float32 operations in another place of the graph, where they may be merged otherwise."""

_FUSED_IMAGES = 32

_BATCH_SIZES = (1, 2, 5, 16)
"""One, the size that the exporter traced, an odd one, and more than any vector register holds."""

_IMAGE_BATCH = 16
_MAX_IMAGES = 256
_SEED = 20_240_229


class Parity(Struct, frozen=True, kw_only=True):
    """How far apart the two runtimes are.

    Attributes:
        relative_error: Largest absolute difference of a logit, divided by the largest absolute logit, over everything.
        tolerance: What was allowed.
        random_inputs: Random pictures compared.
        images: Real pictures compared.
        top1_changes: Inputs whose most likely class differs although torch does not hold the two for equal.
    """

    relative_error: float
    tolerance: float
    random_inputs: int
    images: int
    top1_changes: int


def check_parity(
    onnx_model: bytes,
    model: "nn.Module",
    recipe: Preprocessing,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    pixels: np.ndarray | None = None,
) -> Parity:
    """Run both models on the same inputs: random pictures in several batch sizes, and real ones where given.

    Args:
        onnx_model: The file's content.
        model: The torch model that it was exported from, on the CPU. Left in evaluation mode.
        recipe: How pictures become inputs.
        tolerance: Largest relative error allowed.
        pixels: Real pictures, uint8 ``[n, channels, height, width]``; the first 256 are used.

    Raises:
        VerificationError: If the logits are further apart, or not finite, or a most likely class changes.
    """
    import onnxruntime as ort
    import torch

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = ort.InferenceSession(onnx_model, options, providers=["CPUExecutionProvider"])
    input_name = session.get_inputs()[0].name
    model.eval()

    largest_difference = largest_logit = 0.0
    compared = {"random": 0, "image": 0}
    ours: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    for kind, batch in _inputs(recipe, pixels):
        with torch.inference_mode():
            expected = model(torch.from_numpy(batch)).numpy()
        (actual,) = session.run(None, {input_name: batch})
        if actual.shape != expected.shape:
            raise VerificationError(
                f"for {len(batch)} inputs the exported model gives logits of {list(actual.shape)}, torch of "
                f"{list(expected.shape)}: this architecture does not export correctly, choose another --opset"
            )
        if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
            raise VerificationError(
                "the model's logits are NaN or infinite: its weights have diverged, export an earlier round"
            )
        largest_difference = max(largest_difference, float(np.abs(actual - expected).max()))
        largest_logit = max(largest_logit, float(np.abs(expected).max()))
        compared[kind] += len(batch)
        theirs.append(expected)
        ours.append(actual)
    tie = tolerance * largest_logit
    changes = top1_changes(np.concatenate(theirs), np.concatenate(ours), tie=tie)
    # All logits zero leaves nothing to divide by; then the difference itself must be within the tolerance.
    parity = Parity(
        relative_error=largest_difference / (largest_logit or 1.0),
        tolerance=tolerance,
        random_inputs=compared["random"],
        images=compared["image"],
        top1_changes=changes,
    )
    if not parity.relative_error <= tolerance or changes:
        raise VerificationError(
            f"onnxruntime and torch disagree: relative error {parity.relative_error:.1e} of logits (tolerance "
            f"{tolerance:.1e}), {changes} changed classes in {sum(compared.values())} inputs. No file was written; "
            "try another --opset, and tell us about the model"
        )
    return parity


def check_fused(
    engine: Engine, core: bytes, pixels: np.ndarray, *, tolerance: float = FUSED_TOLERANCE
) -> None:
    """Compare a fused graph with the model inside it, on pictures that need no resizing.

    Args:
        engine: The fused graph.
        core: The model inside it, as a file's content.
        pixels: uint8 ``[n, channels, height, width]``; the first 32 are used.
        tolerance: Largest difference of the most likely class's probability.

    Raises:
        VerificationError: If they disagree, or the model answers with NaN or infinity.
    """
    import onnxruntime as ort

    session = ort.InferenceSession(core, session_options(1), providers=["CPUExecutionProvider"])
    input_name = session.get_inputs()[0].name
    for picture in pixels[:_FUSED_IMAGES]:
        (logits,) = session.run(None, {input_name: engine.card.preprocessing.normalise(picture[None])})
        expected = softmax(logits)[0]
        prediction = engine.predict(frame_of(picture))
        difference = abs(prediction.confidence - float(expected.max()))
        behind = float(expected.max() - expected[prediction.index])
        if not (difference <= tolerance and behind <= tolerance):
            raise VerificationError(
                f"with preprocessing in its graph the model says {prediction.label!r} with {prediction.confidence:.5f}, "
                f"without {float(expected.max()):.5f}. No file was written; try --preprocess none, and tell us about the model"
            )


def frame_of(pixels: np.ndarray) -> np.ndarray:
    """From ``[channels, height, width]`` to a frame ``[H, W, 3]`` or ``[H, W]``."""
    return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def top1_changes(expected: np.ndarray, actual: np.ndarray, *, tie: float) -> int:
    """Count the rows whose most likely class differs, leaving ties aside.

    Args:
        expected: Logits ``[N, classes]``.
        actual: Logits of the same shape.
        tie: Two classes whose expected logits are no further apart are equally likely.
    """
    rows = np.arange(len(expected))
    chosen = expected[rows, actual.argmax(axis=1)]
    return int((expected.max(axis=1) - chosen > tie).sum())


def _inputs(recipe: Preprocessing, pixels: np.ndarray | None) -> Iterator[tuple[str, np.ndarray]]:
    generator = np.random.default_rng(_SEED)
    for size in _BATCH_SIZES:
        shape = (size, recipe.channels, recipe.height, recipe.width)
        yield "random", recipe.normalise(generator.integers(0, 256, shape, dtype=np.uint8))
    if pixels is not None:
        for start in range(0, min(len(pixels), _MAX_IMAGES), _IMAGE_BATCH):
            yield "image", recipe.normalise(pixels[start : min(start + _IMAGE_BATCH, _MAX_IMAGES)])
