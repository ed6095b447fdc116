"""Models that failed on this device, and are not taken again. A record is a small file; deleting it forgives the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta, Struct

from edge_agent.releases.parts import remove
from edge_agent.releases.slot_files import DAMAGED, QUARANTINE, entries
from federation.errors import ConfigError, ReleaseFault
from federation.files import write_whole
from federation.wire.fields import NonNegative, Sha256, Text

_MAX_DETAIL = 1000

_log = structlog.get_logger()


class Quarantined(Struct, frozen=True, kw_only=True):
    """A model in quarantine.

    Attributes:
        sha256: Of the model.
        number: Of the release; None if it is not known any more.
        fault: What was wrong.
        detail: For people.
        time: Unix seconds.
    """

    sha256: Sha256
    number: Annotated[int, Meta(ge=1)] | None
    fault: ReleaseFault
    detail: Text
    time: NonNegative


class Quarantine:
    """The records of a folder of models. Those who only look need not own the folder.

    Args:
        root: The folder of models.
        clock: Unix seconds.
    """

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._folder = root / QUARANTINE
        self._clock = clock
        self._unwritten: dict[str, Quarantined] = {}

    def add(self, sha256: str, number: int | None, fault: ReleaseFault, detail: str) -> None:
        """Put a model into quarantine, durably; if the disk is full, until this process ends."""
        record = Quarantined(
            sha256=sha256, number=number, fault=fault, detail=detail[:_MAX_DETAIL], time=self._clock()
        )
        try:
            write_whole(self._path(sha256), msgspec.json.encode(record))
        except ConfigError as error:
            self._unwritten[sha256] = record
            _log.warning("quarantine_not_written", number=number, error=str(error))

    def find(self, sha256: str) -> Quarantined | None:
        """Why a model is in quarantine, or None. A record that cannot be read still keeps its model out."""
        if sha256 in self._unwritten:
            return self._unwritten[sha256]
        path = self._path(sha256)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Quarantined)
        except FileNotFoundError:
            return None
        except (OSError, *DAMAGED) as error:
            detail = f"{path} cannot be read: {error}"[:_MAX_DETAIL]
            return Quarantined(
                sha256=sha256, number=None, fault=ReleaseFault.QUARANTINED, detail=detail, time=0
            )

    def all(self) -> list[Quarantined]:
        """All records, the latest first."""
        found = (self.find(path.stem) for path in entries(self._folder))
        return sorted((one for one in found if one is not None), key=lambda one: one.time, reverse=True)

    def forgive(self, sha256: str) -> None:
        """Delete a record.

        Raises:
            ConfigError: If it cannot be deleted.
        """
        self._unwritten.pop(sha256, None)
        remove(self._path(sha256))

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.json"
