"""The SQLite database of a state folder: its schema, whose it is, one server at a time, durable transactions."""

import fcntl
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from federation.errors import ConfigError
from federation.files import disk_error

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, phase TEXT NOT NULL, cohort TEXT NOT NULL, base TEXT NOT NULL,
    encoding TEXT NOT NULL, opened_at REAL NOT NULL, deadline_at REAL NOT NULL, closed_at REAL, fold_s REAL,
    loss REAL, accuracy REAL, evaluate_s REAL
) STRICT;
CREATE TABLE IF NOT EXISTS versions (
    round INTEGER PRIMARY KEY, digest TEXT NOT NULL, encoding TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS updates (
    round INTEGER NOT NULL, agent TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, samples INTEGER NOT NULL,
    metrics TEXT NOT NULL, stored_at REAL NOT NULL, PRIMARY KEY (round, agent)
) STRICT;
CREATE TABLE IF NOT EXISTS agents (
    agent TEXT PRIMARY KEY, online INTEGER NOT NULL, session TEXT NOT NULL, capabilities TEXT NOT NULL,
    changed_at REAL NOT NULL, telemetry TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS refusals (
    id INTEGER PRIMARY KEY, round INTEGER NOT NULL, agent TEXT NOT NULL, code TEXT NOT NULL, detail TEXT NOT NULL, at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS traffic (
    round INTEGER NOT NULL, agent TEXT NOT NULL, sent_bytes INTEGER NOT NULL, received_bytes INTEGER NOT NULL,
    sent_payload_bytes INTEGER NOT NULL, received_payload_bytes INTEGER NOT NULL, PRIMARY KEY (round, agent)
) STRICT;
CREATE TABLE IF NOT EXISTS uploads (agent TEXT PRIMARY KEY, received INTEGER NOT NULL, total INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS noisy_rounds (
    run TEXT NOT NULL, round INTEGER NOT NULL, noise_multiplier REAL NOT NULL, sampling_rate REAL NOT NULL, clip_norm REAL NOT NULL,
    expected REAL NOT NULL, epsilon REAL NOT NULL, delta REAL NOT NULL, digest TEXT, encoding TEXT, next_clip_norm REAL,
    PRIMARY KEY (run, round)
) STRICT;
CREATE TABLE IF NOT EXISTS masked_noise (
    run TEXT NOT NULL, round INTEGER NOT NULL, noise_multiplier REAL NOT NULL, clip_norm REAL NOT NULL, noise REAL NOT NULL,
    norm REAL NOT NULL, largest REAL NOT NULL, epsilon REAL NOT NULL, delta REAL NOT NULL, PRIMARY KEY (run, round)
) STRICT;
CREATE TABLE IF NOT EXISTS spent (
    run TEXT NOT NULL, round INTEGER NOT NULL, agent TEXT NOT NULL, entry INTEGER NOT NULL, spent TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (run, round, agent)
) STRICT;
CREATE TABLE IF NOT EXISTS declines (
    round INTEGER NOT NULL, agent TEXT NOT NULL, code TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (round, agent)
) STRICT;
CREATE INDEX IF NOT EXISTS refusals_by_code ON refusals (code);
"""


_GLANCE_S = 0.2
"""For how long a server that starts may find the lock taken by somebody who only looks whether one runs."""


class Database:
    """SQLite in WAL mode in one federation's state folder.

    Args:
        folder: ``STATE``; created when ``create`` is set.
        federation: Must match what the folder was made for.
        create: Whether a missing folder may be created.

    Attributes:
        folder: ``STATE``.
        federation: Whose it is.
        run: Identifier of the run; a new folder is a new run.

    Raises:
        ConfigError: If the folder belongs to another federation or a newer fedge, is missing, or cannot be written.
    """

    def __init__(self, folder: Path, federation: str | None = None, *, create: bool = False) -> None:
        self.folder = folder
        database = folder / "store.sqlite"
        if not create and not database.exists():
            raise ConfigError(
                f"{folder} is not the state folder of an aggregator: there is no {database.name} in it"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(database, isolation_level=None, timeout=30.0, check_same_thread=False)
            # FULL: a commit is on the disk when it returns, since receipts promise it.
            self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + _SCHEMA)
        except OSError as error:
            raise disk_error(error, folder) from error
        except sqlite3.Error as error:
            raise ConfigError(f"cannot open {database}: {error}") from error
        self._lock_file: int | None = None
        self._one_writer = threading.RLock()
        self._check_meta(federation)

    def _check_meta(self, federation: str | None) -> None:
        with self.transaction() as db:
            meta = dict(db.execute("SELECT key, value FROM meta"))
            if not meta and federation is not None:
                meta = {
                    "schema": str(SCHEMA_VERSION),
                    "federation": federation,
                    "run": secrets.token_hex(8),
                    "created_at": str(time.time()),
                }
                db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        if int(meta.get("schema", SCHEMA_VERSION)) > SCHEMA_VERSION:
            raise ConfigError(
                f"{self.folder} was written by a newer fedge (format {meta['schema']}, this one reads up to {SCHEMA_VERSION}): "
                "upgrade fedge"
            )
        if federation is not None and meta["federation"] != federation:
            raise ConfigError(
                f"{self.folder} holds the federation {meta['federation']!r}, not {federation!r}: "
                "choose another state_dir, or set federation to match"
            )
        self.federation = meta.get("federation", "")
        self.run = meta.get("run", "")

    def lock(self) -> None:
        """Become the one process that serves this folder.

        Raises:
            ConfigError: If another process does.
        """
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + _GLANCE_S
        while not _locks(handle, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                os.close(handle)
                raise ConfigError(
                    f"another aggregator is serving {self.folder}; stop it first, or use another state_dir"
                )
            time.sleep(_GLANCE_S / 10)
        self._lock_file = handle

    def served(self) -> bool:
        """Whether a process, another one or this, serves this folder now."""
        if self._lock_file is not None:
            return True
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            return not _locks(handle, fcntl.LOCK_SH)
        finally:
            os.close(handle)

    def close(self) -> None:
        """Release the database and the lock."""
        self._db.close()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the disk at the end.

        Raises:
            ConfigError: If it cannot be written.
        """
        try:
            with self._one_writer:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    if self._db.in_transaction:  # on a full disk SQLite has rolled back by itself
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"cannot write {self.folder / 'store.sqlite'}: {error}; free disk space or fix its permissions, nothing was lost"
            ) from error

    def remember(self, key: str, value: str) -> None:
        """Keep one fact of the run."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (key, value),
            )

    def recall(self, key: str) -> str | None:
        """Read a fact that was remembered."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def begin_run(self) -> None:
        """Give the folder a new run: devices obey it afresh, and take every plan of the former one for a replay."""
        run = secrets.token_hex(8)
        with self.transaction() as db:
            db.execute("UPDATE meta SET value = ? WHERE key = 'run'", (run,))
            db.execute(
                "DELETE FROM updates WHERE round IN (SELECT round FROM rounds WHERE phase != 'closed')"
            )
            db.execute(
                "DELETE FROM traffic WHERE round IN (SELECT round FROM rounds WHERE phase != 'closed')"
            )
            db.execute("DELETE FROM rounds WHERE phase != 'closed'")
        self.run = run

    def read(self, query: str, parameters: tuple[object, ...] = ()) -> sqlite3.Cursor:
        """Run a query that changes nothing."""
        return self._db.execute(query, parameters)


def _locks(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
