"""An exported model, ready to say what is in a picture. onnxruntime and numpy; Pillow where pictures need converting.

The fastest way from a camera to a label is a model that was exported with ``--preprocess fused`` and
``Engine.predict(frame)`` with a uint8 array ``[height, width, 3]``: one run of one graph, nothing in Python for a pixel.
"""

import ctypes
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from msgspec import Struct
from PIL import Image

from federation.errors import ConfigError, NonFiniteError, VerificationError
from federation.task.halving import halve
from federation.task.model_card import ModelCard
from federation.task.preprocessing import PICTURE_MODES

_ERRORS_ONLY = 3
"""onnxruntime's severity: its warnings about unused initializers tell a device's owner nothing."""

_GREY_AXES, _RGB_AXES = 2, 3
_RGB = 3

_WARM_UPS = 3
"""The first run allocates what later ones reuse; the second finds the caches cold no more."""


class Prediction(Struct, frozen=True, kw_only=True):
    """What the model says about one picture.

    Attributes:
        label: The most likely class.
        index: Its index in the model's labels.
        confidence: Its softmax probability, in [0, 1]; not calibrated.
        top: The most likely classes with their probabilities, falling.
        latency_ms: Milliseconds for preprocessing, the model and softmax; in a batch, the batch's divided by its size.
    """

    label: str
    index: int
    confidence: float
    top: tuple[tuple[str, float], ...]
    latency_ms: float


class Engine:
    """Runs one exported model on the CPU, whether preprocessing is in its graph or not.

    Attributes:
        card: The model's labels, preprocessing, provenance and requirements.
    """

    def __init__(self, path: Path, *, threads: int = 1, top: int = 3) -> None:
        """Load a model.

        Args:
            path: Written by ``model-export onnx``.
            threads: For the model's operators. One is fastest per watt for small models.
            top: How many classes a prediction lists; at most as many as the model answers with.

        Raises:
            ConfigError: If the file is missing, not ONNX, or has no fedge metadata.
            VerificationError: If its inputs and outputs do not agree with its metadata.
        """
        self._session = _load(path, threads)
        try:
            self.card = ModelCard.parse(self._session.get_modelmeta().custom_metadata_map)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        self._input, self._outputs = _match(self._session, self.card, path)
        self._fused = self.card.preprocess == "fused"
        self._channels = self.card.preprocessing.channels
        self._answers = self.card.topk or len(self.card.labels)
        self._top = min(top, self._answers)

    def predict(self, image: Image.Image | np.ndarray) -> Prediction:
        """Classify one picture.

        Args:
            image: A Pillow image, or uint8 ``[height, width, 3]`` (RGB) or ``[height, width]`` (grey). A fused model takes
                an array with as many channels as it has (``card.preprocessing.channels``) without a conversion.

        Raises:
            ConfigError: If the array is not such a picture.
            VerificationError: If the model fails, answers with NaN or infinity, or in another shape than it promised.
        """
        started = time.perf_counter()
        if self._fused:
            (answer,) = self._run_fused(self._frame(image)[None])
        else:
            (answer,) = self._run_plain([image])
        return self._prediction(answer, (time.perf_counter() - started) * 1000)

    def predict_batch(self, images: Sequence[Image.Image | np.ndarray]) -> list[Prediction]:
        """Classify several pictures, of any sizes; in one run of the model, unless it is fused and their sizes differ.

        Raises:
            ConfigError: As :meth:`predict`.
            VerificationError: As :meth:`predict`.
        """
        if not images:
            return []
        started = time.perf_counter()
        if self._fused:
            frames = [self._frame(image) for image in images]
            if len({frame.shape for frame in frames}) == 1:
                answers = self._run_fused(np.stack(frames))
            else:
                answers = [answer for frame in frames for answer in self._run_fused(frame[None])]
        else:
            answers = self._run_plain(images)
        latency_ms = (time.perf_counter() - started) * 1000 / len(images)
        return [self._prediction(answer, latency_ms) for answer in answers]

    def warm_up(self, runs: int = _WARM_UPS) -> None:
        """Run a blank picture of the model's own size a few times, so that the first real one is as fast as the others.

        Args:
            runs: How often; a benchmark takes as many as it times, for this is the graph and nothing else.

        Raises:
            VerificationError: As :meth:`predict`.
        """
        recipe = self.card.preprocessing
        if self._fused:
            frames = np.zeros((1, recipe.height, recipe.width, recipe.channels), np.uint8)
            for _ in range(runs):
                self._run_fused(frames)
        else:
            blank = np.zeros((1, recipe.channels, recipe.height, recipe.width), np.float32)
            for _ in range(runs):
                self._run(blank)

    def _run_fused(self, frames: np.ndarray) -> list[list[tuple[int, float]]]:
        """The most likely classes of uint8 ``[N, H, W, channels]``, as (index, probability), falling."""
        probabilities, indices = self._run(frames)
        if not probabilities.shape == indices.shape == (len(frames), self._answers):
            raise _unshapely([probabilities.shape, indices.shape], [(len(frames), self._answers)] * 2)
        return [
            list(zip(row, shares, strict=True))
            for row, shares in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]

    def _run_plain(self, images: Sequence[Image.Image | np.ndarray]) -> list[list[tuple[int, float]]]:
        recipe = self.card.preprocessing
        batch = recipe.normalise(np.stack([self._pixels(image) for image in images]))
        (logits,) = self._run(batch)
        if logits.shape != (len(images), self._answers):
            raise _unshapely([logits.shape], [(len(images), self._answers)])
        if not np.isfinite(logits).all():
            raise _not_finite()
        answers = []
        for row in softmax(logits):
            order = np.argsort(-row, kind="stable")[: self._top]
            answers.append(list(zip(order.tolist(), row[order].tolist(), strict=True)))
        return answers

    def _run(self, batch: np.ndarray) -> list[np.ndarray]:
        try:
            answers: list[np.ndarray] = self._session.run(self._outputs, {self._input: batch})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise VerificationError(
                f"onnxruntime {ort.__version__} failed to run the model: {error}. Export it again"
            ) from error
        return answers

    def _prediction(self, answer: list[tuple[int, float]], latency_ms: float) -> Prediction:
        labels = self.card.labels
        top = []
        for index, probability in answer[: self._top]:
            if not math.isfinite(probability):
                raise _not_finite()
            if not 0 <= index < len(labels):
                raise VerificationError(
                    f"the model answered with class {index} of {len(labels)}: export it again"
                )
            top.append((labels[index], probability))
        label, confidence = top[0]
        return Prediction(
            label=label, index=answer[0][0], confidence=confidence, top=tuple(top), latency_ms=latency_ms
        )

    def _frame(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """A picture as uint8 ``[H, W, channels]``, in its own size or, if that is a multiple of the model's, a half of it."""
        recipe = self.card.preprocessing
        return halve(self._own_size(image), recipe.height, recipe.width)

    def _own_size(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """A picture as uint8 ``[H, W, channels]``."""
        if isinstance(image, np.ndarray):
            channels = _channels(image)
            if channels == self._channels:
                return image if image.ndim == _RGB_AXES else image[:, :, None]
            if channels < self._channels:
                return np.repeat(image[:, :, None], self._channels, axis=2)
            image = Image.fromarray(image)
        mode = PICTURE_MODES[self._channels]
        array = np.asarray(image if image.mode == mode else image.convert(mode))
        return array if array.ndim == _RGB_AXES else array[:, :, None]

    def _pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """A picture as uint8 ``[channels, height, width]``, in the model's size."""
        recipe = self.card.preprocessing
        if isinstance(image, np.ndarray):
            if _channels(image) == self._channels and image.shape[:2] == (recipe.height, recipe.width):
                return image[None] if image.ndim == _GREY_AXES else image.transpose(2, 0, 1)
            image = Image.fromarray(image)
        return recipe.pixels(image)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities from logits ``[N, classes]``; the largest is subtracted first, so that nothing overflows."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def _load(path: Path, threads: int) -> ort.InferenceSession:
    if not path.is_file():
        raise ConfigError(f"{path} is not a file: name a model that `model-export onnx` wrote")
    try:
        session = ort.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ConfigError(
            f"{path} is not an ONNX model that onnxruntime {ort.__version__} can run: {error}"
        ) from error
    _give_back()
    return session


def _give_back() -> None:
    """Have glibc return what loading has freed: 8 of 71 MB with mobilenet_v3_small, which nothing here would ask for again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # other C libraries have none
        trim(0)


def session_options(threads: int) -> ort.SessionOptions:
    """How every model is run, on devices and where their speed is measured."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait for the next frame burn a quarter of a CPU at ten frames a second.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _match(session: ort.InferenceSession, card: ModelCard, path: Path) -> tuple[str, list[str]]:
    """The names of the input and the outputs, which must be those that the metadata promises."""
    recipe, classes = card.preprocessing, len(card.labels)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = [_describe(node) for node in (*inputs, *outputs)]
    if card.preprocess == "fused":
        if recipe.channels not in PICTURE_MODES:
            raise VerificationError(
                f"{path}: no frame has the {recipe.channels} channels of its metadata: export it again"
            )
        promised = [
            ("tensor(uint8)", [None, None, None, recipe.channels]),
            ("tensor(float)", [None, card.topk]),
            ("tensor(int64)", [None, card.topk]),
        ]
    else:
        promised = [
            ("tensor(float)", [None, recipe.channels, recipe.height, recipe.width]),
            ("tensor(float)", [None, classes]),
        ]
    if len(inputs) != 1 or found != promised:
        raise VerificationError(
            f"{path}: the model takes and gives {_listed(found)}, its metadata says {_listed(promised)}: export it again"
        )
    return inputs[0].name, [node.name for node in outputs]


def _describe(node: Any) -> tuple[str, list[int | None]]:
    """Type and shape of an input or an output; None for what may vary."""
    return node.type, [size if isinstance(size, int) else None for size in node.shape]


def _listed(nodes: Sequence[tuple[str, Sequence[int | None]]]) -> str:
    return ", ".join(
        f"{kind} [{', '.join('any' if size is None else str(size) for size in shape)}]"
        for kind, shape in nodes
    )


def _channels(image: np.ndarray) -> int:
    """3 or 1.

    Raises:
        ConfigError: If the array is no picture.
    """
    grey = image.ndim == _GREY_AXES
    if image.dtype != np.uint8 or not image.size or not (grey or image.shape[2:] == (_RGB,)):
        raise ConfigError(
            f"an array of {image.dtype} {list(image.shape)} is no picture: pass uint8 [height, width, 3] or [height, width]"
        )
    return 1 if grey else _RGB


def _unshapely(found: Sequence[tuple[int, ...]], promised: Sequence[tuple[int, ...]]) -> VerificationError:
    return VerificationError(
        f"the model answered in shapes {found}, its metadata says {promised}: export it again"
    )


def _not_finite() -> NonFiniteError:
    return NonFiniteError("the model answered with NaN or infinity: export it again from another round")
