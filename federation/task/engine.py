"""An exported model, ready to say what is in a picture. onnxruntime and numpy only."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from msgspec import Struct
from PIL import Image

from federation.errors import ConfigError, VerificationError
from federation.task.model_card import ModelCard

_ERRORS_ONLY = 3
"""onnxruntime's severity: its warnings about unused initializers tell a device's owner nothing."""

_IMAGE_AXES = 3


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
    """Runs one exported model on the CPU.

    Attributes:
        card: The model's labels, preprocessing and provenance.
    """

    def __init__(self, path: Path, *, threads: int = 1, top: int = 3) -> None:
        """Load a model.

        Args:
            path: Written by ``model-export onnx``.
            threads: For the model's operators. One is fastest per watt for small models.
            top: How many classes a prediction lists; at most as many as the model has.

        Raises:
            ConfigError: If the file is missing, not ONNX, or has no fedge metadata.
            VerificationError: If its inputs and outputs do not agree with its metadata.
        """
        self._session = _load(path, threads)
        try:
            self.card = ModelCard.parse(self._session.get_modelmeta().custom_metadata_map)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        self._input, self._output = _match(self._session, self.card, path)
        self._top = min(top, len(self.card.labels))

    def predict(self, image: Image.Image | np.ndarray) -> Prediction:
        """Classify one picture.

        Args:
            image: A Pillow image, or uint8 ``[height, width, 3]`` (RGB) or ``[height, width]`` (grey).

        Raises:
            ConfigError: If the array is not such a picture.
            VerificationError: If the model answers with NaN or infinity.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Image.Image | np.ndarray]) -> list[Prediction]:
        """Classify several pictures, of any sizes, in one run of the model.

        Raises:
            ConfigError: As :meth:`predict`.
            VerificationError: As :meth:`predict`.
        """
        if not images:
            return []
        started = time.perf_counter()
        recipe = self.card.preprocessing
        batch = recipe.normalise(np.stack([recipe.pixels(_picture(image)) for image in images]))
        (logits,) = self._session.run([self._output], {self._input: batch})
        probabilities = softmax(logits)
        latency_ms = (time.perf_counter() - started) * 1000 / len(images)
        if not np.isfinite(probabilities).all():
            raise VerificationError(
                "the model answered with NaN or infinity: export it again from another round"
            )
        return [self._prediction(row, latency_ms) for row in probabilities]

    def _prediction(self, probabilities: np.ndarray, latency_ms: float) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")[: self._top]
        top = tuple((self.card.labels[index], float(probabilities[index])) for index in order)
        label, confidence = top[0]
        return Prediction(
            label=label, index=int(order[0]), confidence=confidence, top=top, latency_ms=latency_ms
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities from logits ``[N, classes]``; the largest is subtracted first, so that nothing overflows."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def _load(path: Path, threads: int) -> ort.InferenceSession:
    if not path.is_file():
        raise ConfigError(f"{path} is not a file: name a model that `model-export onnx` wrote")
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait for the next frame burn a quarter of a CPU at ten frames a second.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ConfigError(
            f"{path} is not an ONNX model that onnxruntime {ort.__version__} can run: {error}"
        ) from error


def _match(session: ort.InferenceSession, card: ModelCard, path: Path) -> tuple[str, str]:
    """The names of the input and the output, whose shapes must be those that the metadata promises."""
    recipe = card.preprocessing
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shapes = [list(node.shape[1:]) for node in (*inputs, *outputs)]
    promised = [[recipe.channels, recipe.height, recipe.width], [len(card.labels)]]
    if shapes != promised:
        raise VerificationError(
            f"{path}: the model takes and gives {shapes} per picture, its metadata says {promised}: export it again"
        )
    return inputs[0].name, outputs[0].name


def _picture(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    grey = image.ndim == _IMAGE_AXES - 1
    if image.dtype != np.uint8 or not image.size or not (grey or image.shape[2:] == (3,)):
        raise ConfigError(
            f"an array of {image.dtype} {list(image.shape)} is no picture: pass uint8 [height, width, 3] or [height, width]"
        )
    return Image.fromarray(image)
