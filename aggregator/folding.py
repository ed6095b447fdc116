"""The heavy work of a round, away from the event loop: check an update, average them."""

import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from aggregator.admission import Limits, check_update
from aggregator.records import StoredUpdate, StoredVersion
from aggregator.round_noise import RoundNoise
from aggregator.store import Store, move_durably
from aggregator.strategies import Accumulator, EqualWeights, Strategy
from aggregator.versions import WHOLE
from federation.errors import PeerError, VerificationError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.codec import Schema, decode, encode
from federation.wire.noise import noise_bounds
from federation.wire.objects import PartialObject
from federation.wire.versions import apply_delta, model_digest

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
    """A new version of the global model, on disk.

    Attributes:
        path: Of its checkpoint.
        version: What it is, and how the delta that leads there is encoded.
        seconds: That making it took after the last update had been added.
        damaged: Agents whose update could not be read back from the disk, and was left out.
    """

    path: Path
    version: StoredVersion
    seconds: float
    damaged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Down:
    """How the global model's change is encoded for the way down.

    Attributes:
        encoding: Of the delta; ``full`` makes none.
        max_noise: ``federation.wire.noise``.
        seed: From which, with the round, stochastic rounding is seeded, so that a repetition gives the same bits.
    """

    encoding: str
    max_noise: float
    seed: int


class Fold:
    """The average of one round's updates: taken up as they are accepted, closed once. Not thread-safe.

    Equal sets of updates give equal bits, in whatever order they came and however often the work was begun anew.

    Args:
        store: Holds the updates and the base model, and takes the new one.
        info: Of the new checkpoint.
        schema: Of the model.
        encoding: Of the updates.
        noise: Of client-level privacy, if any. It is new at each attempt: then only what has been named keeps its bits
            (``aggregator.round_noise``).
        equal: Whether all updates weigh the same, not by their samples.
    """

    def __init__(
        self,
        store: Store,
        info: CheckpointInfo,
        schema: Schema,
        encoding: str,
        noise: RoundNoise | None = None,
        *,
        equal: bool = False,
    ) -> None:
        self._store, self._info, self._schema, self._encoding = store, info, schema, encoding
        self._noise, self._equal = noise, equal
        self._begin()

    def _begin(self) -> None:
        plain = EqualWeights if self._equal else Accumulator
        self._total = plain(self._schema) if self._noise is None else self._noise.begin(self._schema)
        self._taken: set[str] = set()
        self._damaged: list[str] = []

    @property
    def round(self) -> int:
        """Whose updates these are."""
        return self._info.round

    def add(self, update: StoredUpdate) -> None:
        """Decode an accepted update and add it, once."""
        if update.agent in self._taken:
            return
        self._taken.add(update.agent)
        try:
            delta = decode(update.path.read_bytes(), self._schema, self._encoding)
        except (PeerError, OSError) as error:  # it was whole when it was accepted: the disk has changed it
            log.error("update_damaged", agent=update.agent, path=str(update.path), reason=str(error))
            self._damaged.append(update.agent)
        else:
            self._total.add(delta, float(update.samples))

    def close(self, updates: Mapping[str, StoredUpdate], strategy: Strategy, down: Down) -> FoldResult:
        """Average exactly ``updates`` into the model of the round before, and write the new version.

        Args:
            updates: Accepted updates, by agent.
            strategy: The server step.
            down: How the delta is encoded.

        Raises:
            VerificationError: If there are updates, and not one could be read back.
        """
        began = time.monotonic()
        number = self._info.round
        named = self._named()
        if named is not None:
            return FoldResult(self._store.checkpoint_path(number), named, time.monotonic() - began, ())
        if not self._taken <= updates.keys():  # one was taken back since: begin anew
            self._begin()
        for update in updates.values():
            self.add(update)
        if updates and not self._total.count:
            raise VerificationError(
                f"none of the {len(updates)} updates of round {number} below {self._store.folder / 'updates'} can be"
                " read: check the disk"
            )
        change = strategy.change(self._total.mean())
        keep = None if self._noise is None else self._noise.keep
        path, version = write_version(self._store, self._info, change, down, keep)
        return FoldResult(path, version, time.monotonic() - began, tuple(self._damaged))

    def _named(self) -> StoredVersion | None:
        """The round's noisy model, if a fold that was cut off has named it: it must not get another noise."""
        kept = None if self._noise is None else self._noise.kept()
        path = self._store.checkpoint_path(self._info.round)
        if kept is None or not path.exists() or model_digest(read_checkpoint(path)[1]) != kept.digest:
            return None
        return kept


def write_version(
    store: Store,
    info: CheckpointInfo,
    change: Mapping[str, NDArray[np.float64]],
    down: Down,
    keep: Callable[[StoredVersion], None] | None = None,
) -> tuple[Path, StoredVersion]:
    """Make the next version of the global model, and write it durably.

    With an encoding for the way down, the new version is what devices make of the encoded delta:
    ``base + decode(encode(change))``. Noise of client-level privacy is in ``change`` already: encoding it, with a grid that
    follows from it and from the model before it (``noise_bounds``), is post-processing.

    Args:
        store: Holds the model of the round before.
        info: Of the new checkpoint.
        change: Of the model, by name.
        down: How the delta is encoded.
        keep: Called with what it is before anything is written.

    Returns:
        The checkpoint's file, and what it is.
    """
    number = info.round
    _, base = read_checkpoint(store.checkpoint_path(number - 1))
    frame: bytes | None = None
    if down.encoding == WHOLE:
        model = {name: (value + change[name]).astype(np.float32) for name, value in base.items()}
    else:
        delta = {name: tensor.astype(np.float32) for name, tensor in change.items()}
        rng = np.random.default_rng([down.seed, number])
        frame = encode(delta, down.encoding, rng, noise_bounds(base, delta, down.max_noise))
        model = apply_delta(base, frame, down.encoding)
    version = StoredVersion(model_digest(model), down.encoding)
    if keep is not None:
        keep(version)
    if frame is not None:
        store.write_delta(number, frame)
    return store.write_checkpoint(number, checkpoint_bytes(info, model)), version
