"""The golden set: a few pictures, and what a released model must say about them wherever it runs. No torch.

The exporter asks the very file that it wrote, in onnxruntime; a device asks the copy that it fetched, before it trusts it.
One safetensors file: the pictures as tensors ``frame-00`` and so on, the answers as JSON in its metadata.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from federation.errors import ConfigError, ReleaseError, ReleaseFault
from federation.files import write_whole
from federation.wire.fields import Positive, Share
from federation.wire.release import MAX_GOLDEN_BYTES

if TYPE_CHECKING:
    from federation.task.engine import Prediction

MAX_FRAMES = 64
METADATA_KEY = "fedge"

_GREY_AXES, _RGB_AXES = 2, 3
_RGB = 3

_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 1 << 20
"""64 frames and answers of the longest labels take less than 100 kB."""


class Golden(Struct, frozen=True, kw_only=True, eq=False):
    """Pictures and what the model must say about them.

    Attributes:
        frames: uint8 ``[H, W, 3]`` (RGB) or ``[H, W]`` (grey), of any sizes; 1 to 64.
        labels: The most likely class of each.
        probabilities: Of that class, in [0, 1].
        tolerance: Largest difference of a probability that another processor may make.

    Raises:
        ValueError: If there are too few or too many frames, one is no picture, or answers are missing.
    """

    frames: tuple[np.ndarray, ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    tolerance: float

    def __post_init__(self) -> None:
        if not 1 <= len(self.frames) <= MAX_FRAMES:
            raise ValueError(f"{len(self.frames)} frames, a golden set has 1 to {MAX_FRAMES}")
        if not len(self.frames) == len(self.labels) == len(self.probabilities):
            raise ValueError(
                f"{len(self.frames)} frames, {len(self.labels)} labels and {len(self.probabilities)} probabilities"
            )
        for number, frame in enumerate(self.frames):
            grey = frame.ndim == _GREY_AXES
            if (
                frame.dtype != np.uint8
                or not frame.size
                or not (grey or (frame.ndim == _RGB_AXES and frame.shape[2] == _RGB))
            ):
                raise ValueError(f"frame {number} is {frame.dtype} {list(frame.shape)}: not a picture")


class _Answers(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The metadata of the file."""

    labels: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...],
        Meta(min_length=1, max_length=MAX_FRAMES),
    ]
    probabilities: Annotated[tuple[Share, ...], Meta(min_length=1, max_length=MAX_FRAMES)]
    tolerance: Positive


def write_golden(path: Path, golden: Golden) -> None:
    """Write a golden set, whole or not at all.

    Args:
        path: Replaced if it exists; its folder must exist.
        golden: At most 16 MiB of pictures.

    Raises:
        ConfigError: If it is too large, or the disk is full or not writable.
    """
    answers = _Answers(labels=golden.labels, probabilities=golden.probabilities, tolerance=golden.tolerance)
    # safetensors writes the wrong elements of an array that is not C-contiguous.
    tensors = {_name(number): np.ascontiguousarray(frame) for number, frame in enumerate(golden.frames)}
    content = save(tensors, metadata={METADATA_KEY: msgspec.json.encode(answers).decode()})
    if len(content) > MAX_GOLDEN_BYTES:
        raise ConfigError(
            f"the golden set is {len(content) / 2**20:.1f} MiB, at most {MAX_GOLDEN_BYTES / 2**20:.0f} MiB: "
            "take fewer or smaller pictures"
        )
    write_whole(path, content)


def read_golden(path: Path) -> Golden:
    """Read a golden set from a file that nobody vouches for.

    Raises:
        ReleaseError: ``malformed`` if it cannot be read, is too large, damaged, or something else.
    """
    try:
        _refuse_large(path)
        with safe_open(path, framework="np") as file:
            answers = msgspec.json.decode((file.metadata() or {}).get(METADATA_KEY, ""), type=_Answers)
            names = [_name(number) for number in range(len(answers.labels))]
            if sorted(file.keys()) != names:
                raise ValueError(f"answers to {len(names)} frames, but {len(file.keys())} tensors")
            return Golden(
                frames=tuple(file.get_tensor(name) for name in names),
                labels=answers.labels,
                probabilities=answers.probabilities,
                tolerance=answers.tolerance,
            )
    except OSError as error:
        raise _malformed(path, error.strerror or str(error)) from error
    except (SafetensorError, ValueError, TypeError, KeyError, msgspec.DecodeError) as error:
        # TypeError and KeyError: element types that numpy, or this safetensors, does not know.
        raise _malformed(path, str(error)) from error


def check_answers(golden: Golden, predictions: Sequence[Prediction]) -> None:
    """Compare what a model says with what it must say.

    A class must have its probability within the tolerance. It must be the most likely one too, but for a tie: where another
    is ahead by no more than the tolerance, the two are the same answer.

    Args:
        golden: The answers.
        predictions: One for each frame, in order, from an engine whose ``top`` is at least 1.

    Raises:
        ReleaseError: ``wrong_answer`` at the first frame that is answered otherwise.
    """
    if len(predictions) != len(golden.frames):
        raise ReleaseError(
            ReleaseFault.WRONG_ANSWER, f"{len(predictions)} answers to {len(golden.frames)} golden frames"
        )
    expected = zip(golden.labels, golden.probabilities, predictions, strict=True)
    for number, (label, probability, prediction) in enumerate(expected):
        said = dict(prediction.top).get(label, 0.0)
        ahead = prediction.confidence - said
        # Written so that NaN fails.
        if not (abs(said - probability) <= golden.tolerance and ahead <= golden.tolerance):
            raise ReleaseError(
                ReleaseFault.WRONG_ANSWER,
                f"golden frame {number}: {prediction.label!r} with {prediction.confidence:.4f}, must be {label!r} with "
                f"{probability:.4f} (tolerance {golden.tolerance:g})",
            )


def _name(number: int) -> str:
    return f"frame-{number:02d}"


def _refuse_large(path: Path) -> None:
    """Look at the lengths before anything is allocated for them."""
    size = path.stat().st_size
    if size > MAX_GOLDEN_BYTES:
        raise ValueError(f"{size} bytes, at most {MAX_GOLDEN_BYTES}")
    with path.open("rb") as file:
        prefix = file.read(_HEADER_LENGTH.size)
    if len(prefix) == _HEADER_LENGTH.size and _HEADER_LENGTH.unpack(prefix)[0] > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {_HEADER_LENGTH.unpack(prefix)[0]} bytes, at most {_MAX_HEADER_BYTES}")


def _malformed(path: Path, why: str) -> ReleaseError:
    return ReleaseError(ReleaseFault.MALFORMED, f"{path} is no golden set: {why}")
