"""Which versions of the global model devices can get at: a full model for newcomers, and the deltas of the last rounds.

Like the key frames of a film: a full model is published once and serves, with the deltas since, until these are too
many or too long. A device that took part in the last round fetches one delta, one that missed some fetches several,
and a newcomer the full model and the deltas since.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aggregator.store import Store
from federation.task.checkpoint import read_checkpoint
from federation.wire.messages import FullModel, ModelDelta, ObjectRef
from federation.wire.objects import ref_of_file
from federation.wire.versions import model_digest

WHOLE = "full"
"""Instead of an encoding of the deltas: every round's model is sent whole, in float32."""

_LONGEST_DETOUR = 0.5
"""A full model is renewed when the deltas since are longer than this share of it: newcomers pay no more than that."""

_KEY_FRAME = "key_frame"
_SEED = "initial_seed"


@dataclass(frozen=True, slots=True)
class Offered:
    """What a plan says of the model that its round starts from.

    Attributes:
        base: Digest of that version.
        full: For newcomers.
        deltas: Oldest first.
        objects: All that must be on the broker, with the files that hold it.
    """

    base: str
    full: FullModel
    deltas: tuple[ModelDelta, ...]
    objects: tuple[tuple[Path, ObjectRef], ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """The delta that leads to the version that a round made, and the file that holds it."""

    file: Path
    delta: ModelDelta


class Versions:
    """The versions of one run.

    Args:
        store: Holds checkpoints and deltas.
        keep: Deltas to offer; a device that missed fewer rounds is led on by them (in the round that it took part in it got
            the version before that round's). 0 sends full models only.
    """

    def __init__(self, store: Store, keep: int) -> None:
        self._store, self._keep = store, keep
        self._refs: dict[tuple[Path, int], ObjectRef] = {}

    def offer(self, number: int, chunk_bytes: int) -> Offered:
        """What to say of the version that round ``number`` made (0 is the initial model).

        Args:
            number: The last closed round.
            chunk_bytes: Into which objects are cut.

        Raises:
            ConfigError: If a checkpoint cannot be read.
        """
        steps = self._steps(number, chunk_bytes)
        key = self._key_frame(number, steps, chunk_bytes)
        path = self._store.checkpoint_path(key)
        seed = self._store.recall(_SEED) if key == 0 else None
        full = FullModel(
            version=self._digest(key),
            object=self._ref(path, chunk_bytes),
            seed=None if seed is None else int(seed),
        )
        deltas = tuple(step.delta for step in steps)
        # A round's cohort mostly needs the last delta: it goes first, the full model last.
        brought = [(step.file, step.delta.object) for step in steps]
        objects = [*reversed(brought), (path, full.object)]
        self._refs = {
            (file, chunk): ref for (file, chunk), ref in self._refs.items() if (file, ref) in objects
        }
        return Offered(self._digest(number), full, deltas, tuple(objects))

    def prune(self, keep_checkpoints: int) -> None:
        """Delete checkpoints and deltas that nobody needs; call it after a round was closed.

        Args:
            keep_checkpoints: Newest ones to keep besides the full model of newcomers; 0 keeps all.
        """
        key = int(self._store.recall(_KEY_FRAME) or 0)
        # One more of either than the next plan names: agents may still be at work on the last one's.
        self._store.prune_checkpoints(keep_checkpoints and max(keep_checkpoints, 2), spare=key)
        self._store.prune_deltas(self._keep + 1)

    def _steps(self, number: int, chunk_bytes: int) -> list[_Step]:
        """The deltas to version ``number``, oldest first; none twice leads to the same version."""
        steps: list[_Step] = []
        leading = {self._digest(number)}
        for later in range(number, max(0, number - self._keep), -1):
            if not self._leads_to(later):
                break
            base = self._digest(later - 1)
            if base == self._digest(later):  # all updates were zero: who has the one has the other
                continue
            if base in leading:  # the run has been here before: nobody there needs to go in a circle
                break
            leading.add(base)
            steps.insert(0, self._step(later, chunk_bytes))
        return steps

    def _leads_to(self, number: int) -> bool:
        """Whether a delta leads to version ``number`` from the one before it."""
        version = self._store.version(number)
        return (
            version is not None
            and version.encoding != WHOLE
            and self._store.version(number - 1) is not None
            and self._store.delta_path(number).exists()
        )

    def _key_frame(self, number: int, steps: Sequence[_Step], chunk_bytes: int) -> int:
        kept = self._store.recall(_KEY_FRAME)
        key = 0 if kept is None else int(kept)
        path = self._store.checkpoint_path(key)
        versions = [*(step.delta.base for step in steps), self._digest(number)]
        if path.exists() and self._digest(key) in versions:
            detour = sum(step.delta.object.length for step in steps[versions.index(self._digest(key)) :])
            if detour <= _LONGEST_DETOUR * self._ref(path, chunk_bytes).length:
                return key
        self._store.remember(_KEY_FRAME, str(number))
        return number

    def _step(self, number: int, chunk_bytes: int) -> _Step:
        version = self._store.version(number)
        assert version is not None
        file = self._store.delta_path(number)
        delta = ModelDelta(
            base=self._digest(number - 1), object=self._ref(file, chunk_bytes), encoding=version.encoding
        )
        return _Step(file, delta)

    def _digest(self, number: int) -> str:
        version = self._store.version(number)
        if version is not None:
            return version.digest
        digest = model_digest(read_checkpoint(self._store.checkpoint_path(number))[1])
        self._store.record_version(number, digest, WHOLE)
        return digest

    def _ref(self, path: Path, chunk_bytes: int) -> ObjectRef:
        key = path, chunk_bytes
        if key not in self._refs:
            self._refs[key] = ref_of_file(path, chunk_bytes)
        return self._refs[key]


def remember_seed(store: Store, seed: int) -> None:
    """Keep from which seed the initial model was built, so that devices may build it themselves."""
    store.remember(_SEED, str(seed))
