"""What devices say about releases, in the database: their last word about each, and which model they run."""

import sqlite3
import time
from collections.abc import Sequence

import msgspec

from aggregator.database import Database
from aggregator.releases.records import StoredFollower, StoredReport
from federation.wire.messages import encode_json
from federation.wire.predictions import ModelState
from federation.wire.release import ReleaseReport

REPORTED_RELEASES = 50
"""Releases whose reports are kept: with one row for each device and release the table cannot grow without end."""

SESSIONS_KEPT = 8
"""Lives of a device's process that are remembered: what an earlier one has reported is not taken for news."""

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS reports (
    number INTEGER NOT NULL, agent TEXT NOT NULL, report TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (number, agent)
) STRICT""",
    """CREATE TABLE IF NOT EXISTS followers (
    agent TEXT PRIMARY KEY, model TEXT NOT NULL, sessions TEXT NOT NULL, changed_at REAL NOT NULL
) STRICT""",
)


class ReleaseReports:
    """The tables of reports and of the devices that follow releases.

    Args:
        store: Of the state folder.
    """

    def __init__(self, store: Database) -> None:
        self._store = store
        with store.transaction() as db:
            for statement in _SCHEMA:
                db.execute(statement)

    def record_report(self, agent: str, report: ReleaseReport) -> None:
        """Keep a device's last word about a release."""
        now = time.time()
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?)",
                (report.number, agent, encode_json(report).decode(), now),
            )
            db.execute(
                "DELETE FROM reports WHERE number <= (SELECT max(number) FROM releases) - ?",
                (REPORTED_RELEASES,),
            )
            _remember_session(db, agent, report.session, now)

    def reports(self, number: int) -> dict[str, StoredReport]:
        """The last word of each device about a release, by name."""
        rows = self._store.read(
            "SELECT agent, report, at FROM reports WHERE number = ? ORDER BY agent", (number,)
        )
        return {
            agent: StoredReport(agent, msgspec.json.decode(text, type=ReleaseReport), at)
            for agent, text, at in rows
        }

    def report(self, number: int, agent: str) -> ReleaseReport | None:
        """The last word of one device about a release; None before the first."""
        row = self._store.read(
            "SELECT report FROM reports WHERE number = ? AND agent = ?", (number, agent)
        ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=ReleaseReport)

    def record_model(self, agent: str, model: ModelState) -> None:
        """Keep what a device says that it runs."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO followers VALUES (?, ?, '[]', ?) ON CONFLICT (agent) DO UPDATE SET "
                "model = excluded.model, changed_at = excluded.changed_at",
                (agent, encode_json(model).decode(), time.time()),
            )

    def followers(self) -> dict[str, StoredFollower]:
        """All devices that have ever said which model they run, by name."""
        rows = self._store.read("SELECT agent, model, sessions, changed_at FROM followers ORDER BY agent")
        return {
            agent: StoredFollower(
                agent,
                msgspec.json.decode(model, type=ModelState) if model else None,
                msgspec.json.decode(sessions, type=tuple[str, ...]),
                changed_at,
            )
            for agent, model, sessions, changed_at in rows
        }

    def forget_follower(self, agent: str) -> None:
        """Forget a device that is not enrolled any more, with all that it has said."""
        with self._store.transaction() as db:
            db.execute("DELETE FROM followers WHERE agent = ?", (agent,))
            db.execute("DELETE FROM reports WHERE agent = ?", (agent,))


def _remember_session(db: sqlite3.Connection, agent: str, session: str, now: float) -> None:
    row = db.execute("SELECT sessions FROM followers WHERE agent = ?", (agent,)).fetchone()
    known: Sequence[str] = () if row is None else msgspec.json.decode(row[0], type=tuple[str, ...])
    sessions = (*(one for one in known if one != session), session)[-SESSIONS_KEPT:]
    db.execute(
        "INSERT INTO followers VALUES (?, '', ?, ?) ON CONFLICT (agent) DO UPDATE SET "
        "sessions = excluded.sessions, changed_at = excluded.changed_at",
        (agent, msgspec.json.encode(sessions).decode(), now),
    )
