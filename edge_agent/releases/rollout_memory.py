"""What a device must not forget about releases: its pinned keys, and what an older manifest would be a replay of."""

from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta, Struct

from edge_agent.releases.channels import Known
from edge_agent.releases.rollout_events import Remember
from federation.bundle import KeyHex
from federation.files import write_whole
from federation.wire.fields import NonNegative, Sha256
from federation.wire.release import Channel

FILE = "rollout.json"

_log = structlog.get_logger()

Keys = Annotated[tuple[KeyHex, ...], Meta(max_length=2)]


class _Content(Struct, frozen=True, kw_only=True):
    """The file.

    Attributes:
        enrolled: The release keys of the bundle with which it began; another bundle begins anew.
        keys: The release keys that count now, the present one first.
        versions: Newest manifest version seen on each channel.
        newest: The highest of all, and
        issued_at: its time, Unix seconds.
        proven: SHA-256 of models that passed their probation here, the newest last.
    """

    enrolled: Keys
    keys: Keys
    versions: dict[Channel, Annotated[int, Meta(ge=0)]] = {}
    newest: Annotated[int, Meta(ge=0)] = 0
    issued_at: NonNegative = 0.0
    proven: tuple[Sha256, ...] = ()


class RolloutMemory:
    """One file, always written whole. It begins anew where there is none, or it belongs to another enrolment.

    A damaged file is begun anew too, and said: the bundle's two keys still protect from strangers, and whoever can damage
    it can delete it.

    Args:
        path: The file; its folder must exist.
        enrolled: The release keys of the bundle.
    """

    def __init__(self, path: Path, enrolled: tuple[str, ...]) -> None:
        self._path = path
        self._content = _read(path, enrolled)

    def known(self, quarantine: dict[str, str]) -> Known:
        """For the state table.

        Args:
            quarantine: SHA-256 of models that must never run here, and why.
        """
        content = self._content
        versions = dict(content.versions)
        return Known(
            content.keys, versions, content.newest, content.issued_at, content.proven, dict(quarantine)
        )

    def pin(self, keys: tuple[str, ...]) -> None:
        """Keep these keys in place of the former, and forget what was seen of manifests that the former signed.

        Raises:
            ConfigError: If the disk is full or not writable: the former keys still count.
        """
        self._write(msgspec.structs.replace(self._content, keys=keys, versions={}, newest=0, issued_at=0.0))

    def remember(self, command: Remember) -> None:
        """Keep what protects from old manifests.

        Raises:
            ConfigError: If the disk is full or not writable; it is kept until the process ends, and written with the next.
        """
        content = msgspec.structs.replace(
            self._content,
            versions=command.versions,
            newest=command.newest,
            issued_at=command.issued_at,
            proven=command.proven,
        )
        try:
            self._write(content)
        finally:
            self._content = content

    def _write(self, content: _Content) -> None:
        write_whole(self._path, msgspec.json.encode(content), mode=0o600)
        self._content = content


def _read(path: Path, enrolled: tuple[str, ...]) -> _Content:
    fresh = _Content(enrolled=enrolled, keys=enrolled)
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_Content)
    except FileNotFoundError:
        return fresh
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _log.error(
            "rollout_memory_damaged",
            path=str(path),
            reason=str(error)[:300],
            lost="which manifests were seen: an old one that has not expired could be played again, once",
            remedy="none needed, unless release keys were rotated twice: then enrol this device again",
        )
        return fresh
    if content.enrolled != enrolled:
        _log.warning("rollout_memory_superseded", path=str(path), reason="this device was enrolled again")
        return fresh
    return content
