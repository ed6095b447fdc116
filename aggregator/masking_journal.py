"""What happened in one attempt at a masked sum, on disk: after a crash the same attempt goes on.

::

    STATE/secagg/000004-000002     round 4, attempt 2: the plan, then one record for each event that counted

    record   length (4 bytes, little-endian), CRC-32 (4 bytes), msgpack

A torn record at the end, and all behind it, never happened: nobody had been answered, so those who sent it repeat it.
"""

import os
import struct
import zlib
from enum import StrEnum
from pathlib import Path

import msgspec

from federation.errors import ConfigError, PeerError
from federation.files import disk_error, sync_folder
from federation.wire.messages import RoundPlan, decode_msgpack, encode_msgpack

FOLDER = "secagg"

_PREFIX = struct.Struct("<II")
_MODE = 0o600
_LONGEST = 1 << 22
"""Of a record, bytes: twice the longest envelope."""


class What(StrEnum):
    """Kinds of events."""

    MESSAGE = "message"
    STORED = "stored"
    GONE = "gone"
    CLOSE = "close"
    TICK = "tick"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One event that changed the state of an attempt.

    Attributes:
        what: Its kind.
        agent: Of whom; empty for the clock's.
        data: The envelope as it came, for a message.
        at: Monotonic seconds of the process that took it.
    """

    what: What
    agent: str = ""
    data: bytes = b""
    at: float = 0.0


class Journal:
    """Appends to the file of one attempt.

    Args:
        path: Of the file; its folder must exist.

    Attributes:
        plan: Of the attempt; None in a new file.
        records: That an earlier process left, in order.

    Raises:
        ConfigError: If the disk is full or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.plan: RoundPlan | None = None
        self.records: list[Record] = []
        self._path, self._unsynced = path, False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, _MODE)
            sync_folder(path.parent)
            self._read()
        except OSError as error:
            raise disk_error(error, path) from error

    def begin(self, plan: RoundPlan) -> None:
        """Write the plan, first of all, durably."""
        self.plan = plan
        self._append(encode_msgpack(plan))
        self.sync()

    def append(self, record: Record) -> None:
        """Write an event; :meth:`sync` before anybody is told what followed from it."""
        self._append(msgspec.msgpack.encode(record))

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises:
            ConfigError: If it cannot be written.
        """
        if self._unsynced:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise disk_error(error, self._path) from error
            self._unsynced = False

    def close(self) -> None:
        """Release the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def discard(self) -> None:
        """Delete it: the attempt is over."""
        self.close()
        self._path.unlink(missing_ok=True)

    def _append(self, body: bytes) -> None:
        data = _PREFIX.pack(len(body), zlib.crc32(body)) + body
        self._unsynced = True
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise disk_error(error, self._path) from error

    def _read(self) -> None:
        self.plan, self.records, end = read_journal(self._path)
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)


def read_journal(path: Path) -> tuple[RoundPlan | None, list[Record], int]:
    """Read a journal and change nothing: another process may be writing it.

    Args:
        path: Of the file.

    Returns:
        The plan, the events, and where the last whole record ends.

    Raises:
        ConfigError: If it is of another version.
    """
    plan: RoundPlan | None = None
    records: list[Record] = []
    whole, at = path.read_bytes(), 0
    while len(whole) - at >= _PREFIX.size:
        length, check = _PREFIX.unpack_from(whole, at)
        body = whole[at + _PREFIX.size : at + _PREFIX.size + length]
        if length > _LONGEST or len(body) < length or zlib.crc32(body) != check:
            break
        try:
            if plan is None:
                plan = decode_msgpack(body, RoundPlan)
            else:
                records.append(decode_msgpack(body, Record))
        except PeerError as error:
            raise ConfigError(
                f"{path} was written by another version of fedge ({error}): delete it, and the round is tried again"
            ) from error
        at += _PREFIX.size + length
    return plan, records, at


def journal_path(state: Path, number: int, attempt: int) -> Path:
    """Where the journal of an attempt lies; its folder is made.

    Raises:
        ConfigError: If it cannot be made.
    """
    try:
        (state / FOLDER).mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise disk_error(error, state / FOLDER) from error
    return state / FOLDER / f"{number:06d}-{attempt:06d}"


def sweep(state: Path, keep: Path | None = None) -> None:
    """Delete the journals of attempts that are over: they hold what opened their sums."""
    for path in (state / FOLDER).glob("*"):
        if path != keep:
            path.unlink()
