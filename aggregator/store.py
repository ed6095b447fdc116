"""What the aggregator must not forget: SQLite (WAL) for facts, files for weights.

::

    STATE/lock                     held by the one process that serves this state
    STATE/store.sqlite             run, rounds, updates, agents, refusals, traffic
    STATE/checkpoints/round-000003.safetensors, .json (hold-out metrics), .delta (leads there from round 2's)
    STATE/updates/000004/pi1       updates of the open round, until its checkpoint is durable
    STATE/incoming/pi1-<sha256>    uploads in progress

A fact is committed before anybody is told of it. Weights are written whole, then named in the database, so a crash
between the two leaves a file that nobody names, never a name without its file.
"""

import shutil
import time
from pathlib import Path

import msgspec

from aggregator.database import Database
from aggregator.records import StoredAgent, StoredRound, StoredUpdate, StoredVersion
from aggregator.spending import record_spent
from federation.errors import Rejection
from federation.files import disk_error, sync_folder, write_whole
from federation.task.checkpoint import FOLDER, checkpoint_path
from federation.task.model_card import HoldOutMetrics
from federation.wire.messages import AgentState, Capabilities, Decline, Telemetry, TrainMetrics, UpdateOffer

_RECORD_VERSION = (
    "INSERT INTO versions VALUES (?, ?, ?) ON CONFLICT (round) DO UPDATE SET "
    "digest = excluded.digest, encoding = excluded.encoding"
)

REFUSALS_KEPT = 10_000
"""Rows of the refusal log; older ones go, so that a hostile device cannot fill the disk."""


class Store(Database):
    """The state folder of one federation's aggregator.

    Args:
        folder: ``STATE``; created when ``create`` is set.
        federation: Must match what the folder was made for.
        create: Whether a missing folder may be created.

    Raises:
        ConfigError: If the folder belongs to another federation or a newer fedge, is missing, or cannot be written.
    """

    def __init__(self, folder: Path, federation: str | None = None, *, create: bool = False) -> None:
        super().__init__(folder, federation, create=create)
        try:
            for name in (FOLDER, "updates", "incoming"):
                (folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error

    # --- rounds -------------------------------------------------------------------------------------------------

    def open_round(
        self,
        number: int,
        attempt: int,
        cohort: tuple[str, ...],
        *,
        base: str,
        encoding: str,
        deadline_s: float,
        masked: bool = False,
    ) -> None:
        """Record that a round, or its next attempt, is open. Masked updates of an earlier attempt are forgotten."""
        now = time.time()
        with self.transaction() as db:
            if masked:
                db.execute(
                    "DELETE FROM updates WHERE round = ? AND round IN "
                    "(SELECT round FROM rounds WHERE attempt < ?)",
                    (number, attempt),
                )
                db.execute(
                    "UPDATE rounds SET phase = 'open' WHERE round = ? AND attempt < ?", (number, attempt)
                )
            db.execute(
                "INSERT INTO rounds (round, attempt, phase, cohort, base, encoding, opened_at, deadline_at) "
                "VALUES (?, ?, 'open', ?, ?, ?, ?, ?) ON CONFLICT (round) DO UPDATE SET "
                "encoding = excluded.encoding, attempt = excluded.attempt, cohort = excluded.cohort, deadline_at = excluded.deadline_at",
                (
                    number,
                    attempt,
                    msgspec.json.encode(cohort).decode(),
                    base,
                    encoding,
                    now,
                    now + deadline_s,
                ),
            )

    def start_folding(self, number: int) -> None:
        """Record that the round takes no further update, so that a restart folds exactly the same ones."""
        with self.transaction() as db:
            db.execute("UPDATE rounds SET phase = 'folding' WHERE round = ?", (number,))

    def start_unmasking(self, number: int) -> None:
        """Record that the round takes no further update, and that the sum of those that are there is wanted."""
        with self.transaction() as db:
            db.execute("UPDATE rounds SET phase = 'unmasking' WHERE round = ?", (number,))

    def close_round(self, number: int, fold_s: float, version: StoredVersion) -> None:
        """Record that the round's checkpoint (and delta) is durable, and forget its updates' files."""
        with self.transaction() as db:
            db.execute(_RECORD_VERSION, (number, version.digest, version.encoding))
            db.execute(
                "UPDATE rounds SET phase = 'closed', closed_at = ?, fold_s = ? WHERE round = ?",
                (time.time(), fold_s, number),
            )
        self.sweep()

    def record_evaluation(self, number: int, loss: float, accuracy: float, evaluate_s: float) -> None:
        """Record the hold-out metrics of a closed round."""
        with self.transaction() as db:
            db.execute(
                "UPDATE rounds SET loss = ?, accuracy = ?, evaluate_s = ? WHERE round = ?",
                (loss, accuracy, evaluate_s, number),
            )

    def rounds(self) -> list[StoredRound]:
        """All rounds, oldest first."""
        rows = self.read(
            "SELECT round, attempt, phase, cohort, base, encoding, opened_at, deadline_at, closed_at, fold_s, loss, accuracy, "
            "evaluate_s FROM rounds ORDER BY round"
        )
        return [
            StoredRound(number, attempt, phase, _names(cohort), *rest)
            for number, attempt, phase, cohort, *rest in rows
        ]

    def newest_round(self) -> int:
        """Of all that were ever opened; 0 before the first."""
        return int(self.read("SELECT coalesce(max(round), 0) FROM rounds").fetchone()[0])

    # --- updates ------------------------------------------------------------------------------------------------

    def update_path(self, number: int, agent: str) -> Path:
        """Where an accepted update of the open round lies."""
        return self.folder / "updates" / f"{number:06d}" / agent

    def incoming_path(self, agent: str, sha256: str) -> Path:
        """Where an upload is collected. A new object of the same agent takes the place of the former."""
        path = self.folder / "incoming" / f"{agent}-{sha256}"
        for other in path.parent.glob(f"{agent}-{'[0-9a-f]' * 64}"):
            if other != path:
                other.unlink(missing_ok=True)
        return path

    def record_update(self, number: int, agent: str, offer: UpdateOffer) -> None:
        """Commit that an update, whose file is durable already, counts in the round."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    agent,
                    offer.object.sha256,
                    offer.object.length,
                    offer.samples,
                    msgspec.json.encode(offer.metrics).decode(),
                    time.time(),
                ),
            )
            if offer.spent is not None:
                record_spent(db, offer.run, number, agent, offer.spent)

    def updates(self, number: int) -> dict[str, StoredUpdate]:
        """Accepted updates of a round, by agent, sorted by name."""
        rows = self.read(
            "SELECT agent, sha256, bytes, samples, metrics FROM updates WHERE round = ? ORDER BY agent",
            (number,),
        )
        return {
            agent: StoredUpdate(
                agent,
                sha256,
                size,
                samples,
                msgspec.json.decode(metrics, type=TrainMetrics),
                self.update_path(number, agent),
            )
            for agent, sha256, size, samples, metrics in rows
        }

    def sweep(self) -> None:
        """Delete what no round needs: files of closed rounds, and what a crash left half written."""
        for file in (self.folder / FOLDER).glob(".*"):
            file.unlink()
        open_rounds = {
            f"{row[0]:06d}": row[0] for row in self.read("SELECT round FROM rounds WHERE phase != 'closed'")
        }
        for folder in (self.folder / "updates").iterdir():
            if folder.name not in open_rounds:
                # A check that ends this moment may put a file in: the next sweep takes it.
                shutil.rmtree(folder, ignore_errors=True)
                continue
            named = self.updates(open_rounds[folder.name])
            for file in folder.iterdir():
                if file.name not in named:
                    file.unlink()
        if not open_rounds:
            for file in (self.folder / "incoming").iterdir():
                file.unlink()

    # --- checkpoints --------------------------------------------------------------------------------------------

    def checkpoint_path(self, number: int) -> Path:
        """The global model after a round; 0 is the initial model."""
        return checkpoint_path(self.folder, number)

    def write_checkpoint(self, number: int, data: bytes) -> Path:
        """Write a checkpoint durably."""
        path = self.checkpoint_path(number)
        write_whole(path, data)
        return path

    def delta_path(self, number: int) -> Path:
        """The frame that leads to the global model after a round from the one before it."""
        return self.checkpoint_path(number).with_suffix(".delta")

    def write_delta(self, number: int, data: bytes) -> None:
        """Write a delta durably."""
        write_whole(self.delta_path(number), data)

    def record_version(self, number: int, digest: str, encoding: str) -> None:
        """Record which version of the global model a round made."""
        with self.transaction() as db:
            db.execute(_RECORD_VERSION, (number, digest, encoding))

    def version(self, number: int) -> StoredVersion | None:
        """Which version of the global model a round made; None where that is not known."""
        row = self.read("SELECT digest, encoding FROM versions WHERE round = ?", (number,)).fetchone()
        return None if row is None else StoredVersion(*row)

    def write_metrics(self, number: int, metrics: HoldOutMetrics) -> None:
        """Write hold-out metrics beside the checkpoint, where an export finds them."""
        write_whole(self.checkpoint_path(number).with_suffix(".json"), msgspec.json.encode(metrics))

    def prune_checkpoints(self, keep: int, *, spare: int) -> None:
        """Delete all but the ``keep`` newest checkpoints and that of round ``spare``; 0 keeps all."""
        if keep:
            for path in sorted((self.folder / FOLDER).glob("round-*.safetensors"))[:-keep]:
                if path != self.checkpoint_path(spare):
                    path.with_suffix(".json").unlink(missing_ok=True)
                    path.unlink()

    def prune_deltas(self, keep: int) -> None:
        """Delete all but the ``keep`` newest deltas."""
        for path in sorted((self.folder / FOLDER).glob("round-*.delta"))[:-keep]:
            path.unlink()

    # --- agents and refusals ------------------------------------------------------------------------------------

    def record_agent(self, agent: str, state: AgentState) -> None:
        """Keep an agent's last word."""
        capabilities = "" if state.capabilities is None else msgspec.json.encode(state.capabilities).decode()
        with self.transaction() as db:
            db.execute(
                "INSERT INTO agents (agent, online, session, capabilities, changed_at) VALUES (?, ?, ?, ?, ?) ON CONFLICT (agent) DO UPDATE SET online = excluded.online, "
                "session = excluded.session, changed_at = excluded.changed_at, "
                "capabilities = CASE excluded.capabilities WHEN '' THEN capabilities ELSE excluded.capabilities END",
                (agent, state.state == "online", state.session, capabilities, time.time()),
            )

    def record_telemetry(self, agent: str, telemetry: Telemetry) -> None:
        """Keep an agent's last health report."""
        with self.transaction() as db:
            db.execute(
                "UPDATE agents SET telemetry = ? WHERE agent = ?",
                (msgspec.json.encode(telemetry).decode(), agent),
            )

    def forget_presence(self) -> None:
        """Take all agents for offline: whoever is online says so again."""
        with self.transaction() as db:
            db.execute("UPDATE agents SET online = 0")

    def agents(self) -> list[StoredAgent]:
        """All agents that ever announced themselves, by name."""
        rows = self.read(
            "SELECT agent, online, session, capabilities, changed_at, telemetry FROM agents ORDER BY agent"
        )
        return [
            StoredAgent(
                agent,
                bool(online),
                session,
                msgspec.json.decode(text, type=Capabilities) if text else None,
                changed_at,
                msgspec.json.decode(telemetry, type=Telemetry) if telemetry else None,
            )
            for agent, online, session, text, changed_at, telemetry in rows
        ]

    def record_refusal(self, number: int, agent: str, code: Rejection, detail: str) -> None:
        """Keep why something of an agent was refused."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO refusals (round, agent, code, detail, at) VALUES (?, ?, ?, ?, ?)",
                (number, agent, code.value, detail, time.time()),
            )
            db.execute(
                "DELETE FROM refusals WHERE id <= (SELECT max(id) FROM refusals) - ?", (REFUSALS_KEPT,)
            )

    def refusals(self, limit: int = 20) -> list[tuple[int, str, str, str, float]]:
        """The newest refusals: round, agent, code, detail, Unix seconds."""
        rows = self.read(
            "SELECT round, agent, code, detail, at FROM refusals ORDER BY id DESC LIMIT ?", (limit,)
        )
        return [tuple(row) for row in rows]

    def record_decline(self, agent: str, decline: Decline) -> None:
        """Keep why an agent sits a round out; the last word counts."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO declines (round, agent, code, reason, at) VALUES (?, ?, ?, ?, ?)",
                (decline.round, agent, decline.code.value, decline.reason, time.time()),
            )

    def declines(self, limit: int = 20) -> list[tuple[int, str, str, str, float]]:
        """The newest declines: round, agent, code, reason, Unix seconds."""
        rows = self.read(
            "SELECT round, agent, code, reason, at FROM declines ORDER BY round DESC, at DESC LIMIT ?",
            (limit,),
        )
        return [tuple(row) for row in rows]

    def refusal_counts(self) -> dict[str, int]:
        """How many were refused, by code."""
        return dict(self.read("SELECT code, count(*) FROM refusals GROUP BY code ORDER BY code"))


def move_durably(source: Path, target: Path) -> None:
    """Rename within the state folder so that the new name survives a power loss."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    sync_folder(target.parent)


def _names(text: str) -> tuple[str, ...]:
    return msgspec.json.decode(text, type=tuple[str, ...])
