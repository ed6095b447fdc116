"""The state of a federation for a terminal."""

import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aggregator.releases.tables import followers_table, releases_table
from aggregator.status import Report, RoundStatus
from aggregator.tables import foreign, make_table, number_text
from federation.wire.messages import Traffic

ROUNDS_SHOWN = 12
REFUSALS_SHOWN = 8
RELEASES_SHOWN = 8
NAMES_SHOWN = 3


def render(report: Report) -> str:
    """Lay a report out for a terminal."""
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(f"federation [bold]{report.federation}[/], run {report.run}")
        console.print(rounds_table(report.rounds[-ROUNDS_SHOWN:]))
        for spent in (report.client_privacy, report.distributed_privacy):
            if spent is not None:
                console.print(spent.to_text(), soft_wrap=True)
        console.print(agents_table(report.agents))
        if report.releases:
            console.print(releases_table(report.releases[-RELEASES_SHOWN:]))
        if report.followers:
            console.print(followers_table(report.followers))
        if report.refusals:
            counts = ", ".join(f"{code} {count}" for code, count in report.refusal_counts.items())
            console.print(f"refused: {counts}; the newest:")
            for row in report.refusals[:REFUSALS_SHOWN]:
                text = f"  round {row['round']}  {row['agent']}  {row['code']}: {row['detail']}"
                console.print(foreign(text))
        if report.declines:
            console.print("declined by agents, the newest:")
            for row in report.declines[:REFUSALS_SHOWN]:
                text = f"  round {row['round']}  {row['agent']}  {row['code']}: {row['reason']}"
                console.print(foreign(text))
    return capture.get().rstrip("\n")


def rounds_table(rounds: list[RoundStatus]) -> Table:
    """The rounds as a table."""
    headings = (
        "round", "phase", "updates", "seconds", "training s", "KB up", "wire KB up/down", "loss", "accuracy"
    )  # fmt: skip
    cells: list[tuple[str | Text, ...]] = []
    for row in rounds:
        phase = row.phase if row.attempt == 1 else f"{row.phase}, attempt {row.attempt}"
        phase += f", {row.masking}" if row.masking else ""
        if row.waiting_for:
            phase += f": waiting for {', '.join(row.waiting_for[:NAMES_SHOWN])}"
            phase += " …" if len(row.waiting_for) > NAMES_SHOWN else ""
        cells.append(
            (
                str(row.round),
                phase,
                f"{row.delivered}/{row.cohort}",
                number_text(row.seconds, ".1f"),
                number_text(row.train_s or None, ".1f"),
                f"{row.bytes_up / 1000:,.0f}",
                _both(row.agents_moved, 1e3, ",.0f"),
                number_text(row.loss, ".4f"),
                number_text(row.accuracy, ".2%"),
            )
        )
    return make_table(headings, cells)


def agents_table(agents: list[dict[str, Any]]) -> Table:
    """The agents as a table."""
    headings = (
        "agent", "state", "since", "device", "samples", "memory MB", "CPU %", "°C", "KB up/down", "MB up/down",
        "epsilon (delta)", "doing",
    )  # fmt: skip
    cells: list[tuple[str | Text, ...]] = []
    for row in agents:
        able, health = row["capabilities"] or {}, row["telemetry"] or {}
        last, total = (row["last_round"] or {}).get("moved"), health.get("total")
        cells.append(
            (
                row["agent"],
                "online" if row["online"] else "offline",
                _age(time.time() - row["changed_at"]),
                foreign(able.get("device", "")),
                str(able.get("samples", "")),
                number_text(health.get("process_mb"), ".0f"),
                number_text(health.get("cpu_percent"), ".0f"),
                number_text(health.get("temperature_c"), ".0f"),
                "" if last is None else _both(Traffic(**last), 1e3, ",.0f"),
                "" if total is None else _both(Traffic(**total), 1e6, ",.1f"),
                _epsilon(row["spent"]),
                _doing(health, row["upload"]) if row["online"] else "",
            )
        )
    return make_table(headings, cells)


def _epsilon(spent: dict[str, Any] | None) -> str:
    if spent is None:
        return ""
    return f"{'> ' if spent['went_back'] else ''}{spent['epsilon']:.2f} ({spent['delta']:g})"


def _doing(health: dict[str, Any], upload: dict[str, Any] | None) -> Text:
    phase = foreign(health.get("phase", ""))
    if upload is not None:
        return phase.append(f" {upload['received']}/{upload['total']} chunks")
    share = health.get("progress")
    return phase if share is None else phase.append(f" {share:.0%}")


def _both(moved: Traffic, unit: float, form: str) -> str:
    """Sent and received, in that unit; nothing where nothing is known."""
    if moved == Traffic():
        return ""
    return f"{moved.sent_bytes / unit:{form}}/{moved.received_bytes / unit:{form}}"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
