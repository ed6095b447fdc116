"""The sum of one attempt's masked updates, and the next version that follows from it once the masks are off."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from aggregator.folding import Down, FoldResult, write_version
from aggregator.masking import Masking
from aggregator.records import StoredUpdate
from aggregator.store import Store, move_durably
from aggregator.strategies import Strategy
from federation.errors import PeerError, Rejection
from federation.task.checkpoint import CheckpointInfo, read_checkpoint
from federation.wire.objects import PartialObject
from privacy.secagg.unmask import MaskedSum, UnmaskPlan

log = structlog.get_logger()

_VARIANCE = "running_var"
_LEAST_VARIANCE = 0.1
"""Of a running variance that is left after a round at least: on the common scale a small one could become negative, and
its square root NaN. Honest ones shrink so fast where a channel dies, and take another round then."""


def keep_masked(partial: PartialObject, target: Path, masking: Masking) -> None:
    """Make a complete masked update durable at ``target``: its hash and its length are all that can be checked.

    Raises:
        PeerError: ``wrong_hash``, or ``wrong_length``; nothing is left of it.
        ConfigError: If the disk is full.
    """
    finished = partial.finish(partial.path.with_suffix(".whole"))
    try:
        size = finished.stat().st_size
        if size != masking.bytes:
            raise PeerError(
                Rejection.WRONG_LENGTH, f"{size} bytes, a masked update of this model has {masking.bytes}"
            )
        move_durably(finished, target)
    finally:
        finished.unlink(missing_ok=True)


class MaskedFold:
    """The sum mod R, taken up as updates are accepted: memory for one vector. Not thread-safe.

    Args:
        store: Holds the updates and the base model, and takes the new one.
        info: Of the new checkpoint.
        masking: Of the attempt.
    """

    def __init__(self, store: Store, info: CheckpointInfo, masking: Masking) -> None:
        self._store, self._info, self._masking = store, info, masking
        self.abandoned = False
        self._begin()

    def _begin(self) -> None:
        self._sum = MaskedSum(self._masking.scale.size, self._masking.scale.modulus_bits)
        self._taken: set[str] = set()
        self._damaged: list[str] = []

    @property
    def round(self) -> int:
        """Whose updates these are."""
        return self._info.round

    def add(self, update: StoredUpdate) -> None:
        """Add an accepted update, once."""
        if self.abandoned or update.agent in self._taken:
            return
        self._taken.add(update.agent)
        try:
            vector = np.frombuffer(update.path.read_bytes(), self._masking.scale.dtype)
            self._sum.add(vector)
        except (ValueError, OSError) as error:  # it was whole when it was accepted: the disk has changed it
            log.error("update_damaged", agent=update.agent, path=str(update.path), reason=str(error))
            self._damaged.append(update.agent)

    def close(
        self, updates: Mapping[str, StoredUpdate], plan: UnmaskPlan, strategy: Strategy, down: Down
    ) -> FoldResult:
        """Take the masks off, and make the mean of exactly these updates the next version.

        Args:
            updates: Accepted updates, by agent.
            plan: Of the same agents.
            strategy: The server step.
            down: How the delta is encoded.

        Returns:
            The next version; it is the model as it was, if an update cannot be read back: without it the masks of the
            others do not cancel.
        """
        began = time.monotonic()
        if self._taken != set(plan.survivors):
            self._begin()
        for agent in plan.survivors:
            if agent in updates:
                self.add(updates[agent])
        lost = sorted({*self._damaged, *(set(plan.survivors) - self._taken)})
        if lost:
            log.error(
                "sum_lost",
                round=self.round,
                agents=lost,
                reason=f"masked updates below {self._store.folder / 'updates'} cannot be read: check the disk",
            )
            return replace(self.skip(down), damaged=tuple(self._damaged))
        scale = self._masking.scale
        mean = scale.mean(self._sum.unmask(plan), self._masking.seed, len(plan.survivors))
        change = strategy.change({name: array.astype(np.float64) for name, array in mean.items()})
        _, base = read_checkpoint(self._store.checkpoint_path(self.round - 1))
        path, version = write_version(self._store, self._info, positive_variances(base, change), down)
        log.info("sum_unmasked", round=self.round, survivors=len(plan.survivors), keystreams=plan.keystreams)
        return FoldResult(path, version, time.monotonic() - began, ())

    def skip(self, down: Down) -> FoldResult:
        """Make the model as it was the next version."""
        began = time.monotonic()
        change = {name: np.zeros(shape) for name, shape in self._masking.scale.schema.items()}
        path, version = write_version(self._store, self._info, change, down)
        return FoldResult(path, version, time.monotonic() - began, ())


def positive_variances(
    base: Mapping[str, NDArray[np.float32]], change: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """Let no running variance of a normalisation layer shrink to less than a tenth in one round.

    Args:
        base: The model before, by name.
        change: Of the model, by name.

    Returns:
        The change, bounded where a tensor is a running variance: ``base + change >= base / 10``.
    """
    least = _LEAST_VARIANCE - 1
    return {
        name: np.maximum(array, least * base[name].astype(np.float64)) if name.endswith(_VARIANCE) else array
        for name, array in change.items()
    }
