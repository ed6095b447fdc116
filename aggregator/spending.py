"""What devices say that they have spent of their privacy budgets, kept in the store."""

import sqlite3
import time
from dataclasses import dataclass

import msgspec
import structlog

from aggregator.database import Database
from federation.wire.terms import Spent

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class StoredSpent:
    """The last word of a device.

    Attributes:
        agent: Its name.
        round: Of the update that said it.
        spent: What it said.
        went_back: Its ledger had as many entries before, so it was restored from a backup or begun anew: ``spent``
            leaves something out.
    """

    agent: str
    round: int
    spent: Spent
    went_back: bool


def record_spent(db: sqlite3.Connection, run: str, number: int, agent: str, spent: Spent) -> None:
    """Keep what a device says, in the transaction that accepts its update; warn if its ledger went back.

    Args:
        db: In a transaction.
        run: Of the plan.
        number: Of the round.
        agent: Its name.
        spent: What it said.
    """
    before = db.execute("SELECT max(entry) FROM spent WHERE agent = ?", (agent,)).fetchone()[0]
    if before is not None and spent.entry <= before:
        log.warning(
            "ledger_went_back",
            agent=agent,
            round=number,
            entry=spent.entry,
            before=before,
            remedy="its ledger was restored from a backup or begun anew: its epsilon leaves out what came after (docs/operations.md)",
        )
    db.execute(
        "INSERT OR REPLACE INTO spent VALUES (?, ?, ?, ?, ?, ?)",
        (run, number, agent, spent.entry, msgspec.json.encode(spent).decode(), time.time()),
    )


def last_spent(database: Database) -> dict[str, StoredSpent]:
    """The last word of every device that has spent anything, by name."""
    rows = database.read("SELECT agent, round, entry, spent FROM spent ORDER BY rowid")
    last: dict[str, StoredSpent] = {}
    for agent, number, entry, text in rows:
        before = last.get(agent)
        # It stays so, even when the new ledger has grown longer than the old one.
        went_back = before is not None and (before.went_back or entry <= before.spent.entry)
        last[agent] = StoredSpent(agent, number, msgspec.json.decode(text, type=Spent), went_back)
    return last
