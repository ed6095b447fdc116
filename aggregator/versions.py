"""Which versions of the global model devices can get at: a full model for newcomers, and the deltas of the last rounds.

Like the key frames of a film: a full model is published once and serves, with the deltas since, until these are too
many or too long. A device that took part in the last round fetches one delta, one that missed some fetches several,
and a newcomer the full model and the deltas since.
"""

from collections.abc import Iterator
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


class Versions:
    """The versions of one run.

    Args:
        store: Holds checkpoints and deltas.
        keep: Rounds that a device may miss and still be led on by deltas; 0 sends full models only.
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
        oldest = self._oldest(number)
        deltas = tuple(self._delta(later, chunk_bytes) for later in range(oldest + 1, number + 1))
        key = self._key_frame(oldest, number, deltas, chunk_bytes)
        path = self._store.checkpoint_path(key)
        seed = self._store.recall(_SEED) if key == 0 else None
        full = FullModel(
            version=self._digest(key),
            object=self._ref(path, chunk_bytes),
            seed=None if seed is None else int(seed),
        )
        files = [self._store.delta_path(later) for later in range(oldest + 1, number + 1)]
        # A round's cohort mostly needs the last delta: it goes first, the full model last.
        steps = list(zip(files, (delta.object for delta in deltas), strict=True))
        objects = [*reversed(steps), (path, full.object)]
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

    def _oldest(self, number: int) -> int:
        oldest = number
        for earlier in self._led_from(number):
            if number - earlier > self._keep:
                break
            oldest = earlier
        return oldest

    def _led_from(self, number: int) -> Iterator[int]:
        """Versions from which deltas lead to ``number``, newest first."""
        while number > 0:
            version = self._store.version(number)
            if version is None or version.encoding == WHOLE or self._store.version(number - 1) is None:
                return
            if not self._store.delta_path(number).exists():
                return
            number -= 1
            yield number

    def _key_frame(self, oldest: int, number: int, deltas: tuple[ModelDelta, ...], chunk_bytes: int) -> int:
        kept = self._store.recall(_KEY_FRAME)
        key = 0 if kept is None else int(kept)
        path = self._store.checkpoint_path(key)
        if oldest <= key <= number and path.exists():
            detour = sum(delta.object.length for delta in deltas[key - oldest :])
            if detour <= _LONGEST_DETOUR * self._ref(path, chunk_bytes).length:
                return key
        self._store.remember(_KEY_FRAME, str(number))
        return number

    def _delta(self, number: int, chunk_bytes: int) -> ModelDelta:
        """The delta that leads to version ``number``."""
        version = self._store.version(number)
        assert version is not None
        path = self._store.delta_path(number)
        return ModelDelta(
            base=self._digest(number - 1), object=self._ref(path, chunk_bytes), encoding=version.encoding
        )

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
