"""Releases in the state folder: facts in the database, files in a folder each.

::

    STATE/releases/7/    model.onnx, golden.safetensors, model.delta (if there is one), manifest.signed (the newest that named it)

Files are durable before the row that names them; a decision is committed before anybody is told of it. Commands of operators
run in processes of their own: they write a request, and the one server carries it out, at once or when it runs again.
"""

import errno
import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from aggregator.database import Database
from aggregator.releases.records import (
    DELTA_FILE,
    ReleaseState,
    RequestKind,
    StoredChannel,
    StoredManifest,
    StoredRelease,
    StoredRequest,
)
from aggregator.releases.reports import ReleaseReports
from aggregator.releases.rollout_events import Announce, Command, Mark, Note
from federation.errors import ConfigError
from federation.files import disk_error, sync_folder, write_whole
from federation.release import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE
from federation.wire.messages import encode_msgpack
from federation.wire.release import Channel, Manifest, Release

FOLDER = "releases"

MANIFESTS_KEPT = 100
"""Older ones are forgotten: only the newest of each channel is ever published again."""

_VERSION_KEY = "manifest_version"

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS releases (
    number INTEGER PRIMARY KEY, release BLOB NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, added_at REAL NOT NULL,
    changed_at REAL NOT NULL, stable_at REAL
) STRICT""",
    """CREATE TABLE IF NOT EXISTS channels (
    channel TEXT PRIMARY KEY, number INTEGER, share REAL NOT NULL, began_at REAL NOT NULL, first_manifest INTEGER NOT NULL
) STRICT""",
    """CREATE TABLE IF NOT EXISTS manifests (
    version INTEGER PRIMARY KEY, channel TEXT NOT NULL, manifest BLOB NOT NULL, envelope BLOB NOT NULL
) STRICT""",
    """CREATE TABLE IF NOT EXISTS release_requests (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, number INTEGER, share REAL, at REAL NOT NULL, outcome TEXT
) STRICT""",
)


class ReleaseStore(ReleaseReports):
    """The releases of one federation's state folder. Safe in several processes at once.

    Args:
        store: Of the folder.
    """

    def __init__(self, store: Database) -> None:
        super().__init__(store)
        self._seen_version: int | None = None
        with store.transaction() as db:
            for statement in _SCHEMA:
                db.execute(statement)

    # --- releases -----------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """The number of a release that is made now. Whoever adds one first, has it."""
        return int(self._store.read("SELECT coalesce(max(number), 0) FROM releases").fetchone()[0]) + 1

    def folder(self, number: int) -> Path:
        """Where the files of a release lie."""
        return self._store.folder / FOLDER / str(number)

    def add(self, release: Release, folder: Path) -> StoredRelease:
        """Take in a release that was made: its files are moved and durable, then it is known. It is announced nowhere yet.

        Args:
            release: What the files are.
            folder: Holds ``model.onnx``, ``golden.safetensors`` and, where the release has a delta, ``model.delta``.

        Raises:
            ConfigError: If there is a release of that number, a file is missing, or the disk is full or not writable.
        """
        names = [MODEL_FILE, GOLDEN_FILE] + ([] if release.delta is None else [DELTA_FILE])
        for name in names:
            if not (folder / name).is_file():
                raise ConfigError(f"{folder} is not a release: there is no {name} in it")
        target = self.folder(release.number)
        with self._adding():
            if self.release(release.number) is not None:
                raise ConfigError(
                    f"there is a release {release.number} already, made meanwhile by another process: make it again"
                )
            try:
                _move_in(folder, names, target)
            except OSError as error:
                raise disk_error(error, target) from error
            now = time.time()
            with self._store.transaction() as db:
                db.execute(
                    "INSERT INTO releases VALUES (?, ?, ?, '', ?, ?, NULL)",
                    (release.number, encode_msgpack(release), ReleaseState.STORED.value, now, now),
                )
        return StoredRelease(release, ReleaseState.STORED, "", now, now, None, target)

    @contextmanager
    def _adding(self) -> Iterator[None]:
        path = self._store.folder / FOLDER
        try:
            path.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def releases(self) -> list[StoredRelease]:
        """All, oldest first."""
        rows = self._store.read(
            "SELECT number, release, state, reason, added_at, changed_at, stable_at FROM releases ORDER BY number"
        )
        return [self._stored(*row) for row in rows]

    def release(self, number: int) -> StoredRelease | None:
        """That release; None if there is none of this number."""
        row = self._store.read(
            "SELECT number, release, state, reason, added_at, changed_at, stable_at FROM releases WHERE number = ?",
            (number,),
        ).fetchone()
        return None if row is None else self._stored(*row)

    def _stored(self, number: int, release: bytes, state: str, reason: str, *times: float) -> StoredRelease:
        added_at, changed_at, stable_at = times
        return StoredRelease(
            msgspec.msgpack.decode(release, type=Release),
            ReleaseState(state),
            reason,
            added_at,
            changed_at,
            stable_at,
            self.folder(number),
        )

    def mark(self, number: int, state: ReleaseState, reason: str) -> None:
        """Record what has become of a release."""
        with self._store.transaction() as db:
            _mark(db, number, state, reason)

    def before(self, number: int) -> StoredRelease | None:
        """The release to go back to from this one: the newest before it that was stable and was not taken back."""
        fallen = (ReleaseState.HALTED, ReleaseState.WITHDRAWN)
        past = (row for row in reversed(self.releases()) if row.number < number)
        return next((row for row in past if row.stable_at is not None and row.state not in fallen), None)

    def prune(self, keep: int, spare: frozenset[int]) -> None:
        """Delete the files of all but the ``keep`` newest releases and those of ``spare``. The rows stay.

        Raises:
            ConfigError: If they cannot be deleted.
        """
        for row in self.releases()[:-keep]:
            if row.number not in spare and row.folder.exists():
                try:
                    shutil.rmtree(row.folder)
                except OSError as error:
                    raise disk_error(error, row.folder) from error

    # --- decisions ----------------------------------------------------------------------------------------------

    def carry_out(
        self, commands: Sequence[Command], request: StoredRequest | None = None, outcome: str = ""
    ) -> None:
        """Commit what the rollout has decided, all or nothing.

        Args:
            commands: Of one event.
            request: What they answer, if an operator asked.
            outcome: The answer.
        """
        if not commands and request is None:
            return
        with self._store.transaction() as db:
            for command in commands:
                match command:
                    case Announce():
                        _announce(db, command)
                    case Mark(number, state, reason):
                        _mark(db, number, state, reason)
                    case Note():
                        pass  # for the log
            if request is not None:
                _answer(db, request.id, outcome)

    # --- channels and manifests ---------------------------------------------------------------------------------

    def channel(self, channel: Channel) -> StoredChannel | None:
        """What a channel is meant to say; None before it ever had a release."""
        row = self._store.read(
            "SELECT number, share, began_at, first_manifest FROM channels WHERE channel = ?", (channel.value,)
        ).fetchone()
        return None if row is None else StoredChannel(channel, *row)

    def current(self, channel: Channel) -> StoredRelease | None:
        """The release of a channel; None if it has none."""
        known = self.channel(channel)
        return None if known is None or known.number is None else self.release(known.number)

    def next_manifest_version(self) -> int:
        """Take the next version. It is used up when this returns, whatever happens to the manifest.

        At least the Unix time in seconds: a state folder that was restored from a backup goes on above all that it has
        ever issued, and devices do not take its manifests for replays.
        """
        with self._store.transaction() as db:
            version = max(_newest_version(db) + 1, int(time.time()))
            db.execute(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (_VERSION_KEY, str(version)),
            )
        return version

    def first_manifest(self) -> int:
        """The version that the next manifest has at least."""
        row = self._store.read("SELECT value FROM meta WHERE key = ?", (_VERSION_KEY,)).fetchone()
        return 1 if row is None else int(row[0]) + 1

    def record_manifest(self, manifest: Manifest, envelope: bytes) -> None:
        """Keep a manifest that was signed, here and beside the files of its release, before it is published.

        Raises:
            ConfigError: If the disk is full or not writable.
        """
        if manifest.release is not None and self.folder(manifest.release.number).is_dir():
            write_whole(self.folder(manifest.release.number) / MANIFEST_FILE, envelope)
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO manifests VALUES (?, ?, ?, ?)",
                (manifest.version, manifest.channel.value, encode_msgpack(manifest), envelope),
            )
            db.execute(
                "DELETE FROM manifests WHERE version NOT IN (SELECT max(version) FROM manifests GROUP BY channel) "
                "AND version NOT IN (SELECT version FROM manifests ORDER BY version DESC LIMIT ?)",
                (MANIFESTS_KEPT,),
            )

    def manifest(self, channel: Channel) -> StoredManifest | None:
        """The newest manifest of a channel; None before the first."""
        row = self._store.read(
            "SELECT manifest, envelope FROM manifests WHERE channel = ? ORDER BY version DESC LIMIT 1",
            (channel.value,),
        ).fetchone()
        return None if row is None else StoredManifest(msgspec.msgpack.decode(row[0], type=Manifest), row[1])

    # --- requests of operators ----------------------------------------------------------------------------------

    def request(self, kind: RequestKind, number: int | None = None, share: float | None = None) -> int:
        """Ask the server for something, from any process. A running server answers within seconds, else the next one does.

        Args:
            kind: ``canary`` or ``stable`` announces a release; ``rollback`` goes back to release ``number``, or without a
                number takes back the canary if there is one, else the stable release in favour of the one before.
            number: Of the release.
            share: Of a canary's first step; None is the setting's.

        Returns:
            The request's id, for :meth:`outcome`.
        """
        with self._store.transaction() as db:
            row = db.execute(
                "INSERT INTO release_requests (kind, number, share, at) VALUES (?, ?, ?, ?) RETURNING id",
                (kind.value, number, share, time.time()),
            ).fetchone()
        return int(row[0])

    def requests(self) -> list[StoredRequest]:
        """Those that nobody has answered yet, oldest first."""
        rows = self._store.read(
            "SELECT id, kind, number, share, at, outcome FROM release_requests WHERE outcome IS NULL ORDER BY id"
        )
        return [StoredRequest(row[0], RequestKind(row[1]), *row[2:]) for row in rows]

    def outcome(self, request: int) -> str | None:
        """What the server has answered; None while it has not."""
        row = self._store.read("SELECT outcome FROM release_requests WHERE id = ?", (request,)).fetchone()
        return None if row is None else row[0]

    def answer(self, request: int, outcome: str) -> None:
        """Record what came of a request."""
        with self._store.transaction() as db:
            _answer(db, request, outcome)

    def changed(self) -> bool:
        """Whether another process has written to the database since the last call; true the first time."""
        version = int(self._store.read("PRAGMA data_version").fetchone()[0])
        before, self._seen_version = self._seen_version, version
        return version != before


def _mark(db: sqlite3.Connection, number: int, state: ReleaseState, reason: str) -> None:
    now = time.time()
    db.execute(
        "UPDATE releases SET state = ?, reason = ?, changed_at = ? WHERE number = ?",
        (state.value, reason, now, number),
    )
    if state is ReleaseState.STABLE:
        db.execute("UPDATE releases SET stable_at = ? WHERE number = ? AND stable_at IS NULL", (now, number))


def _announce(db: sqlite3.Connection, command: Announce) -> None:
    db.execute(
        "INSERT INTO channels VALUES (?, ?, ?, ?, ?) ON CONFLICT (channel) DO UPDATE SET number = excluded.number, "
        "share = excluded.share, began_at = excluded.began_at, first_manifest = excluded.first_manifest",
        (command.channel.value, command.number, command.share, time.time(), command.first_manifest),
    )


def _answer(db: sqlite3.Connection, request: int, outcome: str) -> None:
    db.execute("UPDATE release_requests SET outcome = ? WHERE id = ?", (outcome, request))


def _newest_version(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (_VERSION_KEY,)).fetchone()
    return 0 if row is None else int(row[0])


def _move_in(folder: Path, names: Sequence[str], target: Path) -> None:
    arriving = target.with_name(f".{target.name}")
    for left_over in (arriving, target):  # of a process that was killed before it wrote the row
        shutil.rmtree(left_over, ignore_errors=True)
    arriving.mkdir()
    for name in names:
        _move(folder / name, arriving / name)
    sync_folder(arriving)
    arriving.replace(target)
    sync_folder(target.parent)


def _move(source: Path, target: Path) -> None:
    """Move a file so that its content is on the disk, from another file system too."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, target)
        source.unlink()
    with target.open("rb") as file:
        os.fsync(file.fileno())
