"""What a device has spent of its privacy budget in a federation: on disk before the first step that it pays for.

::

    FOLDER/entries  one line per reservation, chained (privacy.ledger_format); appended and fsynced
    FOLDER/head     how far the chain reaches; replaced and fsynced after each line
    FOLDER/lock     held by the process that spends

A reservation is *line, fsync, head, fsync, first step*. Whatever the power does in between, the ledger is never below what
was used: a line that the head does not count yet was paid for nothing. If it is whole it counts all the same; if it is torn
it is cut off. Nothing is ever refunded: a process that was killed in the middle of a round pays for that round again.
"""

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import structlog

from privacy.accounting import Spend
from privacy.durable import append, replace
from privacy.errors import LedgerError, LedgerRefusal
from privacy.ledger_format import (
    DP_SGD,
    MAX_LINE_BYTES,
    VERSION,
    Chain,
    Entry,
    Opening,
    decode,
    identity_of,
    seal_head,
    unseal_head,
)

MAX_LEDGER_BYTES = 64 * 1024 * 1024
"""More than 100,000 rounds. It is read whole."""

CLOCK_TOLERANCE_S = 86_400.0
"""How far an entry may lie in the future: devices without a clock of their own start with an old time."""

_READ_ATTEMPTS = 100
"""Of a reader, while the agent beside it goes on writing: one is enough unless the head was replaced just then."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose ledger it is.

    Attributes:
        federation: Name.
        device: Name.
        key: From :func:`privacy.ledger_format.ledger_key`.
    """

    federation: str
    device: str
    key: bytes


class Ledger:
    """An open ledger; one per folder at a time. Use :meth:`open`."""

    def __init__(self, folder: Path, owner: Owner, lock: int, lines: "_Lines") -> None:
        self._folder, self._owner, self._lock = folder, owner, lock
        self._chain, self._entries = lines.chain, list(lines.entries)
        self._file = os.open(folder / "entries", os.O_WRONLY | os.O_APPEND)

    @classmethod
    def open(cls, folder: Path, owner: Owner, *, clock: Callable[[], float] = time.time) -> "Ledger":
        """Lock a ledger, check every line of it, and repair what a power cut left; or begin one.

        Args:
            folder: Created if it is not there.
            owner: Whose it must be.
            clock: Unix seconds.

        Raises:
            LedgerError: If it is damaged, shortened, somebody else's, from the future, or in use.
            OSError: If the disk fails.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LedgerError(LedgerRefusal.IN_USE.text(folder)) from error
            for leftover in folder.glob(".*"):  # power loss in the middle of a write
                leftover.unlink()
            lines = _read(folder, owner, clock())
            if lines is None:
                lines = _begin(folder, owner, clock())
            _repair(folder, owner, lines)
            return cls(folder, owner, lock, lines)
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Let another process have it."""
        if self._file >= 0:
            os.close(self._file)
            os.close(self._lock)
            self._file = -1

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All that was paid, oldest first."""
        return tuple(self._entries)

    @property
    def head(self) -> str:
        """Hash of the last line, which depends on all lines before it: 64 hex digits."""
        return self._chain.last

    def reserve(
        self,
        spend: Spend,
        *,
        now: float,
        run: str,
        round_: int,
        attempt: int,
        model: str,
        clip_norm: float,
        delta: float,
        data: str,
    ) -> Entry:
        """Pay. When this returns, the entry is on disk, and only then may the first step be taken.

        Args:
            spend: The steps.
            now: Unix seconds.
            run: See :class:`Entry`; so are all that follow.
            round_: See there.
            attempt: See there.
            model: See there.
            clip_norm: See there.
            delta: See there.
            data: See there; cut to what a line holds.

        Raises:
            OSError: If the disk is full or fails. The ledger is closed: open it again, which repairs it.
        """
        entry = Entry(
            number=len(self._entries) + 1,
            time=now,
            kind=DP_SGD,
            run=run,
            round=round_,
            attempt=attempt,
            model=model,
            noise_multiplier=spend.noise_multiplier,
            clip_norm=clip_norm,
            sample_rate=spend.sample_rate,
            steps=spend.steps,
            delta=delta,
            data=data[:200],
        )
        line = self._chain.line(entry)
        try:
            append(self._file, line)
            self._chain.accept(line)
            replace(self._folder / "head", seal_head(self._owner.key, self._chain.head(entry.number)))
        except OSError:
            self.close()
            raise
        self._entries.append(entry)
        return entry


def read_entries(folder: Path, owner: Owner, *, clock: Callable[[], float] = time.time) -> tuple[Entry, ...]:
    """What a ledger says, without locking or changing it: also while an agent writes to it.

    Args:
        folder: Of the ledger; it need not be there.
        owner: Whose it must be.
        clock: Unix seconds.

    Raises:
        LedgerError: As for :meth:`Ledger.open`.
        OSError: If it cannot be read.
    """
    for _ in range(_READ_ATTEMPTS):
        before = _bytes(folder / "head")
        try:
            lines = _read(folder, owner, clock())
        except LedgerError:
            if _bytes(folder / "head") == before:
                raise
            continue  # the agent wrote an entry in between
        return () if lines is None else lines.entries
    raise LedgerError(LedgerRefusal.IN_USE.text(folder))


@dataclass(slots=True)
class _Lines:
    """What the head counts, and what stands behind it.

    Attributes:
        chain: After the last line that counts.
        entries: That count.
        rest: Bytes after them: at most one line, whole or torn.
        headless: There is no head yet, and nothing was paid.
    """

    chain: Chain
    entries: tuple[Entry, ...]
    rest: bytes
    headless: bool = False


def _begin(folder: Path, owner: Owner, now: float) -> _Lines:
    chain = Chain(owner.key)
    opening = Opening(
        version=VERSION,
        federation=owner.federation,
        device=owner.device,
        identity=identity_of(owner.key),
        time=now,
    )
    line = chain.line(opening)
    replace(folder / "entries", line)
    chain.accept(line)
    log.info("ledger_created", folder=str(folder))
    return _Lines(chain, (), b"", headless=True)


def _repair(folder: Path, owner: Owner, lines: _Lines) -> None:
    """Settle what a crash left between the line and the head. No step had been taken for it."""
    if lines.rest:
        length = lines.chain.length
        body = lines.chain.accept(lines.rest)
        if body is None:
            os.truncate(folder / "entries", length)
            log.warning(
                "ledger_repaired", torn_bytes=len(lines.rest), counted=False, reason="training had not begun"
            )
        else:
            entry = decode(body, Entry)
            lines.entries = (*lines.entries, entry)
            log.warning("ledger_entry_kept", entry=entry.number, reason="it was paid, training had not begun")
    if lines.rest or lines.headless:
        handle = os.open(folder / "entries", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        replace(folder / "head", seal_head(owner.key, lines.chain.head(len(lines.entries))))
        lines.rest = b""


def _read(folder: Path, owner: Owner, now: float) -> _Lines | None:
    """Read and check; None if there is no ledger."""
    # The head first: what is appended meanwhile stands behind what it counts.
    sealed, data = _bytes(folder / "head"), _bytes(folder / "entries")
    if data is None:
        if sealed is None:
            return None
        raise LedgerError(LedgerRefusal.SHORTENED.text(folder, "the file with the entries is gone"))
    chain = Chain(owner.key)
    first, newline, after = data.partition(b"\n")
    if chain.accept(first + newline) is None:
        raise LedgerError(_stranger(folder, owner, first) or LedgerRefusal.DAMAGED.text(folder, "line 1"))
    if sealed is None:
        if after:
            raise LedgerError(LedgerRefusal.SHORTENED.text(folder, "the file with the head is gone"))
        return _Lines(chain, (), b"", headless=True)
    head = unseal_head(owner.key, sealed)
    if head is None:
        raise LedgerError(LedgerRefusal.DAMAGED.text(folder, "the head"))
    if len(data) < head.length:
        raise LedgerError(
            LedgerRefusal.SHORTENED.text(folder, f"{len(data)} bytes are left of {head.length}")
        )
    entries = _entries(folder, chain, data[chain.length : head.length])
    if chain.head(len(entries)) != head:
        raise LedgerError(LedgerRefusal.DAMAGED.text(folder, f"{len(entries)} entries for {head.entries}"))
    rest = data[head.length :]
    if b"\n" in rest[:-1] or len(rest) > MAX_LINE_BYTES:
        raise LedgerError(LedgerRefusal.OLD_HEAD.text(folder, f"{len(rest)} bytes follow"))
    late = max((entry.time for entry in entries), default=now) - now
    if late > CLOCK_TOLERANCE_S:
        raise LedgerError(LedgerRefusal.FUTURE.text(folder, f"by {late / 3600:.1f} hours"))
    return _Lines(chain, entries, rest)


def _entries(folder: Path, chain: Chain, data: bytes) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for line in BytesIO(data):
        body = chain.accept(line)
        if body is None:
            raise LedgerError(LedgerRefusal.DAMAGED.text(folder, f"line {len(entries) + 2}"))
        entries.append(decode(body, Entry))
    return tuple(entries)


def _stranger(folder: Path, owner: Owner, line: bytes) -> str:
    """What is wrong if the opening names another owner; empty if it does not."""
    try:
        opening = decode(line.partition(b" ")[2], Opening)
    except LedgerError:
        return ""
    theirs = opening.federation, opening.device, opening.identity
    if theirs[:2] != (owner.federation, owner.device):
        return LedgerRefusal.ANOTHERS.text(folder, f"{opening.device!r} in federation {opening.federation!r}")
    if opening.identity != identity_of(owner.key):
        return LedgerRefusal.OLD_IDENTITY.text(folder)
    return ""


def _bytes(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LEDGER_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > MAX_LEDGER_BYTES:
        raise LedgerError(LedgerRefusal.DAMAGED.text(path.parent, f"{path.name} is too large"))
    return data
