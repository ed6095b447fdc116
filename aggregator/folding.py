"""The heavy work of a round, away from the event loop: check an update, average them, evaluate the result."""

import mmap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from aggregator.admission import Limits, check_update
from aggregator.records import StoredUpdate
from aggregator.store import Store, move_durably
from aggregator.strategies import Accumulator, Strategy
from federation.errors import PeerError, VerificationError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.task.model_card import HoldOutMetrics
from federation.wire.codec import Schema, decode, schema_of
from federation.wire.objects import PartialObject

log = structlog.get_logger()


def keep_update(partial: PartialObject, target: Path, schema: Schema, encoding: str, limits: Limits) -> None:
    """Check a complete upload and make it durable at ``target``.

    Raises:
        PeerError: If its hash or its content is refused; nothing is left of it.
        ConfigError: If the disk is full.
    """
    finished = partial.finish(partial.path.with_suffix(".whole"))
    try:
        with finished.open("rb") as file:
            # Not closed by hand: decoded arrays, and the traceback of a refusal, are views into the map.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        check_update(memoryview(data), schema, encoding, limits)
        move_durably(finished, target)
    finally:
        finished.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class FoldResult:
    """A new checkpoint on disk.

    Attributes:
        path: Of the checkpoint.
        seconds: That it took.
        damaged: Agents whose update could not be read back from the disk, and was left out.
    """

    path: Path
    seconds: float
    damaged: tuple[str, ...]


def fold(
    store: Store, info: CheckpointInfo, updates: Mapping[str, StoredUpdate], encoding: str, strategy: Strategy
) -> FoldResult:
    """Average ``updates`` into the model of the round before ``info.round``, and write the new checkpoint.

    The updates are added in the order of the mapping, one in memory at a time, so equal updates give equal bits.

    Args:
        store: Holds the base model and takes the checkpoint.
        info: Of the new checkpoint.
        updates: Accepted updates, by agent, sorted.
        encoding: Of the updates.
        strategy: The server step.

    Raises:
        VerificationError: If not one update could be read back.
    """
    began = time.monotonic()
    _, base = read_checkpoint(store.checkpoint_path(info.round - 1))
    schema = schema_of(base)
    total = Accumulator(schema)
    damaged = []
    for agent, update in updates.items():
        try:
            delta = decode(update.path.read_bytes(), schema, encoding)
        except (PeerError, OSError) as error:  # it was whole when it was accepted: the disk has changed it
            log.error("update_damaged", agent=agent, path=str(update.path), reason=str(error))
            damaged.append(agent)
        else:
            total.add(delta, float(update.samples))
    if not total.count:
        raise VerificationError(
            f"none of the {len(updates)} updates of round {info.round} below {store.folder / 'updates'} can be read: "
            "check the disk"
        )
    path = store.write_checkpoint(info.round, checkpoint_bytes(info, strategy.step(base, total.mean())))
    return FoldResult(path, time.monotonic() - began, tuple(damaged))


class Evaluator:
    """Evaluates checkpoints on the hold-out set. Imports torch when it is made, and keeps model and data.

    Args:
        data_spec: The hold-out set (``federation.task.data``).
        info: Any checkpoint's: its task is the federation's.

    Raises:
        ConfigError: If the data cannot be opened.
    """

    def __init__(self, data_spec: str, info: CheckpointInfo) -> None:
        from federation.task.data import open_data
        from federation.task.models import build

        self._data = open_data(data_spec, info.task, train=False)
        self._model = build(info.task)

    def evaluate(self, checkpoint: Path) -> tuple[HoldOutMetrics, float]:
        """Evaluate one checkpoint.

        Returns:
            The metrics, and the seconds that it took.
        """
        from federation.task.evaluate import evaluate
        from federation.task.models import load_arrays

        began = time.monotonic()
        _, arrays = read_checkpoint(checkpoint)
        load_arrays(self._model, arrays)
        result = evaluate(self._model, self._data)
        metrics = HoldOutMetrics(loss=result.loss, accuracy=result.accuracy, samples=result.samples)
        return metrics, time.monotonic() - began
