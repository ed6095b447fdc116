"""What happened, read from the store: for a person or a program, beside a running server or after it."""

import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aggregator.store import Store

ROUNDS_SHOWN = 12
REFUSALS_SHOWN = 8
NAMES_SHOWN = 3


class RoundStatus(msgspec.Struct, frozen=True):
    """One round.

    Attributes:
        round: Number.
        phase: ``open``, ``folding`` or ``closed``.
        attempt: Higher than 1 when it was extended.
        cohort: Agents invited.
        delivered: Updates accepted.
        seconds: From opening to closing; None while open.
        train_s: Longest local training, seconds.
        fold_s: Averaging, seconds.
        bytes_up: Payload of the accepted updates.
        loss: Hold-out loss, nats.
        accuracy: Hold-out top-1, in [0, 1].
        evaluate_s: Evaluation, seconds.
        waiting_for: Members of the open round's cohort that have not delivered.
    """

    round: int
    phase: str
    attempt: int
    cohort: int
    delivered: int
    seconds: float | None
    train_s: float
    fold_s: float | None
    bytes_up: int
    loss: float | None
    accuracy: float | None
    evaluate_s: float | None
    waiting_for: list[str]


class Report(msgspec.Struct, frozen=True):
    """The state of a federation.

    Attributes:
        federation: Name.
        run: Identifier of the run.
        rounds: All rounds, oldest first.
        agents: As they last announced themselves.
        refusals: The newest, with code and detail.
        refusal_counts: By code.
    """

    federation: str
    run: str
    rounds: list[RoundStatus]
    agents: list[dict[str, Any]]
    refusals: list[dict[str, Any]]
    refusal_counts: dict[str, int]

    def to_json(self) -> str:
        """One JSON object, indented, with a newline."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


def collect(folder: Path) -> Report:
    """Read the store; the server may be running.

    Raises:
        ConfigError: If the folder is not a state folder.
    """
    with Store(folder) as store:
        rounds = []
        for row in store.rounds():
            updates = store.updates(row.round)
            rounds.append(
                RoundStatus(
                    round=row.round,
                    phase=row.phase,
                    attempt=row.attempt,
                    cohort=len(row.cohort),
                    delivered=len(updates),
                    seconds=None if row.closed_at is None else row.closed_at - row.opened_at,
                    train_s=max((update.metrics.train_s for update in updates.values()), default=0.0),
                    fold_s=row.fold_s,
                    bytes_up=sum(update.bytes for update in updates.values()),
                    loss=row.loss,
                    accuracy=row.accuracy,
                    evaluate_s=row.evaluate_s,
                    waiting_for=[] if row.phase == "closed" else sorted(set(row.cohort) - set(updates)),
                )
            )
        agents = [
            {
                "agent": agent.agent,
                "online": agent.online,
                "changed_at": agent.changed_at,
                "capabilities": msgspec.to_builtins(agent.capabilities),
                "telemetry": msgspec.to_builtins(agent.telemetry),
            }
            for agent in store.agents()
        ]
        refusals = [
            {"round": number, "agent": agent, "code": code, "detail": detail, "at": at}
            for number, agent, code, detail, at in store.refusals()
        ]
        return Report(store.federation, store.run, rounds, agents, refusals, store.refusal_counts())


def render(report: Report) -> str:
    """Lay a report out for a terminal."""
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(f"federation [bold]{report.federation}[/], run {report.run}")
        console.print(rounds_table(report.rounds[-ROUNDS_SHOWN:]))
        console.print(agents_table(report.agents))
        if report.refusals:
            counts = ", ".join(f"{code} {count}" for code, count in report.refusal_counts.items())
            console.print(f"refused: {counts}; the newest:")
            for row in report.refusals[:REFUSALS_SHOWN]:
                text = f"  round {row['round']}  {row['agent']}  {row['code']}: {row['detail']}"
                console.print(_foreign(text))
    return capture.get().rstrip("\n")


def rounds_table(rounds: list[RoundStatus]) -> Table:
    """The rounds as a table."""
    table = Table(
        "round",
        "phase",
        "updates",
        "seconds",
        "training s",
        "KB up",
        "loss",
        "accuracy",
        box=None,
        pad_edge=False,
    )
    for row in rounds:
        phase = row.phase if row.attempt == 1 else f"{row.phase}, attempt {row.attempt}"
        if row.waiting_for:
            phase += f": waiting for {', '.join(row.waiting_for[:NAMES_SHOWN])}"
            phase += " …" if len(row.waiting_for) > NAMES_SHOWN else ""
        table.add_row(
            str(row.round),
            phase,
            f"{row.delivered}/{row.cohort}",
            _number(row.seconds, ".1f"),
            _number(row.train_s or None, ".1f"),
            f"{row.bytes_up / 1000:,.0f}",
            _number(row.loss, ".4f"),
            _number(row.accuracy, ".2%"),
        )
    return table


def agents_table(agents: list[dict[str, Any]]) -> Table:
    """The agents as a table."""
    table = Table(
        "agent",
        "state",
        "since",
        "device",
        "samples",
        "memory MB",
        "CPU %",
        "°C",
        "doing",
        box=None,
        pad_edge=False,
    )
    for row in agents:
        able, health = row["capabilities"] or {}, row["telemetry"] or {}
        table.add_row(
            row["agent"],
            "online" if row["online"] else "offline",
            _age(time.time() - row["changed_at"]),
            _foreign(able.get("device", "")),
            str(able.get("samples", "")),
            _number(health.get("process_mb"), ".0f"),
            _number(health.get("cpu_percent"), ".0f"),
            _number(health.get("temperature_c"), ".0f"),
            _foreign(health.get("phase", "")) if row["online"] else "",
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _foreign(text: str) -> Text:
    """What a device wrote, without the markup and the terminal commands that it may hold."""
    return Text("".join(sign if sign.isprintable() else "?" for sign in text))


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
