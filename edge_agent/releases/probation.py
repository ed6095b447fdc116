"""How long a new release has been watched on this device, and how often the process has started with it."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

from edge_agent.releases.parts import remove
from edge_agent.releases.slot_files import DAMAGED, PROBATION_FILE, SLOTS
from federation.errors import ConfigError
from federation.files import write_whole
from federation.wire.fields import Count, NonNegative

CRASHES = 3
"""So many starts in one probation without an orderly stop between them are a crash loop."""

_log = structlog.get_logger()


class Trial(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A probation.

    Attributes:
        since: Unix seconds.
        starts: Process starts since then, less the orderly stops.
    """

    since: NonNegative
    starts: Count = 0


class Probation:
    """The probation of the current model. Its record lies in the model's slot, and goes with it.

    It is written before its model becomes the current one, so that no power cut leaves a new model unwatched. That of the
    model that was current until then stays: if this device goes back to it, it is watched on.

    Args:
        root: The folder of models.
        clock: Unix seconds.

    Attributes:
        trial: Of the current model; None if it was confirmed, or there is none.
    """

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self.trial: Trial | None = None
        self._root, self._clock = root, clock
        self._sha256 = ""

    def prepare(self, sha256: str) -> None:
        """Begin the probation of a model that is to become the current one.

        Raises:
            ConfigError: If the disk is full or not writable.
        """
        self._write(sha256, Trial(since=self._clock()))

    def resume(self, sha256: str | None) -> None:
        """The current model is now this one, or none."""
        self._sha256 = sha256 or ""
        self.trial = None if sha256 is None else read_trial(self._root, sha256)

    def end(self) -> None:
        """The current model is confirmed.

        Raises:
            ConfigError: If the disk is not writable.
        """
        if self.trial is not None:
            self.trial = None
            remove(_path(self._root, self._sha256))

    def count_start(self) -> bool:
        """Count a start of the process; whether there were too many."""
        if self.trial is None:
            return False
        self._count(self.trial.starts + 1)
        return self.trial.starts >= CRASHES

    def count_stop(self) -> None:
        """Take the last start back."""
        if self.trial is not None and self.trial.starts:
            self._count(self.trial.starts - 1)

    def _count(self, starts: int) -> None:
        assert self.trial is not None
        self.trial = msgspec.structs.replace(self.trial, starts=starts)
        try:
            self._write(self._sha256, self.trial)
        except ConfigError as error:  # a full disk must not keep a good model from running
            _log.warning("start_not_counted", error=str(error))

    def _write(self, sha256: str, trial: Trial) -> None:
        write_whole(_path(self._root, sha256), msgspec.json.encode(trial))


def read_trial(root: Path, sha256: str) -> Trial | None:
    """The probation of a model, or None; a damaged record is none."""
    try:
        return msgspec.json.decode(_path(root, sha256).read_bytes(), type=Trial)
    except (FileNotFoundError, *DAMAGED):
        return None


def _path(root: Path, sha256: str) -> Path:
    return root / SLOTS / sha256 / PROBATION_FILE
