"""Checkpoints: one safetensors file holds a round's global model and says what it is. No torch.

The aggregator keeps them as ``STATE/checkpoints/round-000123.safetensors``; round 0 is the initial model. Beside one
may lie ``round-000123.json`` with what the hold-out evaluation measured.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from federation.errors import ConfigError, VerificationError
from federation.task.model_card import HoldOutMetrics
from federation.wire.fields import Name
from federation.wire.messages import TaskSpec

FOLDER = "checkpoints"
"""Inside the aggregator's state folder."""

METADATA_KEY = "fedge"
"""The only key: safetensors does not keep the order of metadata keys, and equal weights must give equal bytes."""

_FILE_NAME = re.compile(r"round-(\d{6,7})\.safetensors")


class CheckpointInfo(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a checkpoint is.

    Attributes:
        federation: Whose model.
        round: The round whose result it is; 0 is the initial model.
        task: Enough to build the model.
    """

    federation: Name
    round: Annotated[int, Meta(ge=0, le=1_000_000)]
    task: TaskSpec


def checkpoint_bytes(info: CheckpointInfo, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Serialise a model. Equal arguments give equal bytes, whatever the order of ``arrays``.

    Args:
        info: What it is.
        arrays: Tensor name to array, cast to float32.
    """
    # safetensors writes the wrong elements of an array that is not C-contiguous.
    tensors = {name: np.asarray(array, dtype=np.float32, order="C") for name, array in arrays.items()}
    return save(tensors, metadata={METADATA_KEY: msgspec.json.encode(info).decode()})


def read_info(path: Path) -> CheckpointInfo:
    """Read what a checkpoint is, without its tensors.

    Raises:
        ConfigError: As :func:`read_checkpoint`.
    """
    with _opened(path) as file:
        return _info(file.metadata(), path)


def read_checkpoint(path: Path) -> tuple[CheckpointInfo, dict[str, np.ndarray]]:
    """Read a checkpoint.

    Returns:
        What it is, and tensor name to float32 array, in the order of the names.

    Raises:
        ConfigError: If the file is missing, truncated, corrupt, or not a fedge checkpoint.
        VerificationError: If a weight is NaN or infinite.
    """
    with _opened(path) as file:
        info = _info(file.metadata(), path)
        arrays = {}
        for name in sorted(file.keys()):
            dtype = file.get_slice(name).get_dtype()
            if dtype != "F32":
                raise ConfigError(
                    f"{path}: tensor {name!r} is {dtype}, a checkpoint holds float32 (F32) only"
                )
            arrays[name] = file.get_tensor(name)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise VerificationError(
                f"{path}: tensor {name!r} has NaN or infinite weights: use the checkpoint of an earlier round"
            )
    return info, arrays


def checkpoint_path(state: Path, number: int) -> Path:
    """Where the aggregator keeps the checkpoint of round ``number``."""
    return state / FOLDER / f"round-{number:06d}.safetensors"


def find_checkpoint(state: Path, number: int | None = None) -> Path:
    """Find a round's checkpoint in an aggregator's state folder.

    Args:
        state: The state folder.
        number: A round; None is the newest.

    Raises:
        ConfigError: If there is no such folder, no checkpoint in it, or none of that round.
    """
    folder = state / FOLDER
    if not folder.is_dir():
        raise ConfigError(f"{state} is not an aggregator's state folder: it has no {FOLDER!r} in it")
    rounds = sorted(
        int(match[1]) for entry in folder.iterdir() if (match := _FILE_NAME.fullmatch(entry.name))
    )
    if not rounds:
        raise ConfigError(f"{folder} holds no checkpoint yet: let the aggregator finish a round first")
    if number is None:
        number = rounds[-1]
    elif number not in rounds:
        raise ConfigError(f"{folder} has no checkpoint of round {number}: it has {_ranges(rounds)}")
    return checkpoint_path(state, number)


def read_metrics(path: Path) -> HoldOutMetrics | None:
    """What the hold-out evaluation said about the checkpoint at ``path``; None where there was none.

    Raises:
        ConfigError: If the metrics file is there and cannot be read.
    """
    beside = path.with_suffix(".json")
    try:
        return msgspec.json.decode(beside.read_bytes(), type=HoldOutMetrics)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{beside} does not hold metrics of a checkpoint ({error}): remove it") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ConfigError(f"{path} is not a file: name a checkpoint, or the aggregator's state folder")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(
            f"{path} is not a whole safetensors file ({error}): copy it again, or use another round's"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def _info(metadata: Mapping[str, str] | None, path: Path) -> CheckpointInfo:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise ConfigError(
            f"{path} is a safetensors file, but not a checkpoint of fedge: it does not say its task"
        )
    try:
        return msgspec.json.decode(text, type=CheckpointInfo)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} was written by another version of fedge, or damaged: {error}") from error


def _ranges(rounds: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``: consecutive rounds differ from their place in the list by a constant."""
    runs: dict[int, list[int]] = {}
    for place, number in enumerate(rounds):
        runs.setdefault(number - place, []).append(number)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs.values())
