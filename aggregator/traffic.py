"""What a round costs on the wire and how far its uploads are: kept in the store, where another process can read it."""

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from aggregator.database import Database
from federation.logs import PROGRESS_LOG_S, Sparingly
from federation.wire.credit import Progress
from federation.wire.link import LinkLike
from federation.wire.messages import Traffic
from federation.wire.signing import AGGREGATOR

log = structlog.get_logger()

WATCH_S = 5.0
"""Between two looks at the uploads: each is a write to the disk while any is in progress, and none otherwise."""

ACCOUNT_S = 60.0
"""Between two entries of the server's own bytes while a round is open: what kill -9 can make it forget."""

_COUNTERS = "sent_bytes, received_bytes, sent_payload_bytes, received_payload_bytes"


@dataclass(frozen=True, slots=True)
class StoredTraffic:
    """What one end has moved for one round.

    Attributes:
        round: Number.
        agent: Whose bytes; ``aggregator`` for the server's own.
        moved: As that end has counted them.
    """

    round: int
    agent: str
    moved: Traffic


@dataclass(frozen=True, slots=True)
class StoredUpload:
    """An upload that was in progress at the last look.

    Attributes:
        agent: Whose.
        received: Chunks that are on the aggregator's disk.
        total: Chunks of the update.
    """

    agent: str
    received: int
    total: int


class TrafficLog:
    """The tables of traffic and uploads.

    Args:
        database: Of the state folder.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, number: int, agent: str, moved: Traffic) -> None:
        """Keep what an agent says that a round has cost it; a later word takes the place of a former one."""
        self._write(number, agent, moved, "excluded.{0}")

    def add(self, number: int, agent: str, moved: Traffic) -> None:
        """Add to what is kept: the rest of a round, perhaps counted by another process."""
        self._write(number, agent, moved, "{0} + excluded.{0}")

    def _write(self, number: int, agent: str, moved: Traffic, value: str) -> None:
        updates = ", ".join(f"{name} = {value.format(name)}" for name in _COUNTERS.split(", "))
        counters = (
            moved.sent_bytes,
            moved.received_bytes,
            moved.sent_payload_bytes,
            moved.received_payload_bytes,
        )
        with self._database.transaction() as db:
            db.execute(
                f"INSERT INTO traffic (round, agent, {_COUNTERS}) VALUES (?, ?, ?, ?, ?, ?) "  # noqa: S608 - our own names
                f"ON CONFLICT (round, agent) DO UPDATE SET {updates}",
                (number, agent, *counters),
            )

    def read(self) -> list[StoredTraffic]:
        """All that is kept, by round and agent."""
        rows = self._database.read(f"SELECT round, agent, {_COUNTERS} FROM traffic ORDER BY round, agent")  # noqa: S608 - our own names
        return [
            StoredTraffic(
                number,
                agent,
                Traffic(
                    sent_bytes=sent,
                    received_bytes=received,
                    sent_payload_bytes=sent_payload,
                    received_payload_bytes=received_payload,
                ),
            )
            for number, agent, sent, received, sent_payload, received_payload in rows
        ]

    def show_uploads(self, uploads: list[Progress]) -> None:
        """Put these in the place of the uploads that were shown before."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM uploads")
            db.executemany(
                "INSERT INTO uploads VALUES (?, ?, ?)",
                [(upload.agent, upload.stored, upload.total) for upload in uploads],
            )

    def uploads(self) -> list[StoredUpload]:
        """Those that were in progress at the last look, by agent."""
        rows = self._database.read("SELECT agent, received, total FROM uploads ORDER BY agent")
        return [StoredUpload(*row) for row in rows]


class Watch:
    """Looks at the uploads and the link now and then, on behalf of the service's loop.

    Args:
        log_of_traffic: Where it goes.
        link: Whose bytes are counted.
        uploads: Those in progress.

    Attributes:
        due: When :meth:`look` is to be called, monotonic seconds.
    """

    def __init__(
        self, log_of_traffic: TrafficLog, link: LinkLike, uploads: Callable[[], list[Progress]]
    ) -> None:
        self._log, self._link, self._uploads = log_of_traffic, link, uploads
        self._round: int | None = None
        self._counted = link.traffic
        self._account_due = 0.0
        self._shown: list[Progress] = []
        self._telling = Sparingly(PROGRESS_LOG_S)
        self.due = 0.0
        log_of_traffic.show_uploads([])  # an earlier process may have been killed with some

    def opened(self, number: int) -> None:
        """This round is open, or goes on: what is moved from now on is for it."""
        if number != self._round:
            self.closed()
            self._round, self._counted = number, self._link.traffic

    def closed(self) -> None:
        """No round is open any more, or the service ends."""
        self._account()
        self._round = None

    def look(self, now: float) -> None:
        """Write down how far the uploads are, and from time to time what was moved."""
        self.due = now + WATCH_S
        uploads = self._uploads()
        if uploads != self._shown:
            self._log.show_uploads(uploads)
            self._shown = uploads
        if not uploads:
            self._telling.restart()
        elif self._telling.due(now):
            log.info(
                "updates_arriving",
                agents=len(uploads),
                received=sum(upload.stored for upload in uploads),
                total=sum(upload.total for upload in uploads),
            )
        if now >= self._account_due:
            self._account_due = now + ACCOUNT_S
            self._account()

    def _account(self) -> None:
        if self._round is None:
            return
        traffic = self._link.traffic
        if traffic != self._counted:
            self._log.add(self._round, AGGREGATOR, traffic.since(self._counted))
            self._counted = traffic
