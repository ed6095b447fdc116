"""Where the time of a round goes, from the logs of the aggregator and its agents (JSON lines, one clock)."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.runner import BenchmarkError, middle

SPANS = {
    "open": "closing of the last round -> announcement of this one",
    "fetch": "announcement -> base model on the device",
    "train": "base model on the device -> trained",
    "encode": "trained -> update encoded, signed, on disk, offered",
    "upload": "offered -> accepted by the aggregator, on its disk",
    "fold": "last update accepted -> new checkpoint on disk, round closed",
}
"""What lies between two events; the agent is the one whose update was accepted last, so the spans add up to the round."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of a log.

    Attributes:
        at: Unix seconds.
        event: Past-tense name.
        round: That it belongs to; 0 if it does not say.
        agent: In the aggregator's log; empty if it does not say.
    """

    at: float
    event: str
    round: int
    agent: str


def read_log(path: Path) -> list[Mark]:
    """The events of one process; lines that are no event are skipped."""
    marks = []
    for line in path.read_text(errors="replace").splitlines():
        if not line.startswith("{"):
            continue
        entry = json.loads(line)
        at = datetime.fromisoformat(entry["timestamp"]).timestamp()
        marks.append(Mark(at, entry["event"], entry.get("round", 0), entry.get("agent", "")))
    return marks


def spans(aggregator: Path, agents: Sequence[Path], rounds: Iterable[int]) -> dict[str, float]:
    """Median over ``rounds`` of each of :data:`SPANS`, seconds.

    Args:
        aggregator: Its log.
        agents: Theirs, named ``...-AGENT.log`` with ``AGENT`` as enrolled.
        rounds: To look at; not the first, which no other one precedes.

    Raises:
        BenchmarkError: If an event is missing.
    """
    server = read_log(aggregator)
    devices = {path.stem: read_log(path) for path in agents}
    found: dict[str, list[float]] = {name: [] for name in SPANS}
    for number in rounds:
        last = max(
            (mark for mark in server if mark.event == "update_accepted" and mark.round == number),
            key=lambda mark: mark.at,
        )
        device = next(marks for name, marks in devices.items() if name.endswith(f"-{last.agent}"))
        times = [
            _at(server, "round_closed", number - 1),
            _at(server, "round_opened", number),
            _at(device, "training_started", number),
            _at(device, "model_trained", number),
            _at(device, "update_offered", number),
            last.at,
            _at(server, "round_closed", number),
        ]
        for name, begin, end in zip(SPANS, times[:-1], times[1:], strict=True):
            found[name].append(end - begin)
    return {name: middle(values) for name, values in found.items()}


def _at(marks: Iterable[Mark], event: str, number: int) -> float:
    for mark in marks:
        if mark.event == event and mark.round == number:
            return mark.at
    raise BenchmarkError(f"no {event!r} of round {number} in the log")
