"""How much of the broker's raw rate transfers reach, what is lost on the way, and how much memory it takes.

Everything runs as real processes on this machine against a real mosquitto, set up as docs/operations.md says. *Raw* is
what plain paho clients reach with the same bytes, in as many processes and with as many clients, through the same
broker in the same call: 96 KiB messages pushed without hashes, files or acknowledgements of their own
(``benchmarks.raw_carriers``), at QoS 0 and at QoS 1, of which the faster one counts, by what was delivered.
"""

import getpass
import json
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec

from benchmarks import carriers, raw_carriers
from benchmarks.processes import Child, Children, module
from benchmarks.rounds import find_data
from benchmarks.runner import BenchmarkError, Options, Results, main, middle, say
from benchmarks.slow_rounds import bad_link

QUESTION = (
    "how much of the broker's raw rate do transfers reach, what is lost, and how much memory does it take?"
)
PARTS = ("down", "up", "hundred", "badlink")

MB = 1_000_000
MIB = 1 << 20
CHUNK_BYTES = 96 * 1024
DOWN_BYTES, DOWN_AGENTS = 45 * MB, 20
UP_BYTES, UP_AGENTS = 20 * MIB, 20
MANY_BYTES, MANY_AGENTS = 10 * MIB, 100
PROCESSES = 4
"""That hold the agents: one would be the bottleneck itself, and many more than cores only wait for each other."""

START_S, RUN_S = 120.0, 300.0


class Mosquitto:
    """A fresh broker.

    Args:
        children: Run the process.
        folder: Of this broker alone; created.
    """

    def __init__(self, children: Children, folder: Path) -> None:
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        config = folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\nuser {getpass.getuser()}\nallow_anonymous true\nset_tcp_nodelay true\n"
            "max_packet_size 1048576\nmax_inflight_messages 64\nmax_queued_messages 4000\n"
            f"persistence true\npersistence_location {folder}/\nautosave_interval 60\n"
        )
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise BenchmarkError("mosquitto is not installed: it is the broker that this benchmark is about")
        self.child = children.start(f"{folder.parent.name}-mosquitto", program, "-c", str(config))
        children.until(self._listens, START_S, "mosquitto listens")
        self.url = f"mqtt://127.0.0.1:{self.port}"

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run.

    Attributes:
        rate: Delivered bytes over the time from the first publish to the last delivery, MB/s. Delivered is, in a raw
            run, handed to the callback; in ours, verified and written to its file.
        lost: Messages that did not arrive.
        extra: Payload bytes that came more than once, as a share of the object's.
        broker_mb: Peak of the broker, MiB.
        aggregator_mb: Peak of the aggregator's side, MiB; 0 in a raw run.
        receipt_rate: As ``rate``, until the last receipt of an upload: each update was then read back, hashed as a
            whole, decoded, checked, synced and recorded; 0 otherwise.
    """

    rate: float
    lost: int
    extra: float
    broker_mb: float
    aggregator_mb: float = 0.0
    receipt_rate: float = 0.0


class Run:
    """One broker and the processes around it, from go to done."""

    def __init__(self, children: Children, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self._children = folder, children
        self.broker = Mosquitto(children, folder / "broker")
        self._running: list[Child] = []

    def start(self, name: str, program: str, task: msgspec.Struct) -> Child:
        """Start one end."""
        child = self._children.start(
            f"{self.folder.name}-{name}", *module(f"benchmarks.{program}", msgspec.json.encode(task).decode())
        )
        self._running.append(child)
        return child

    def ours(self, role: str, agents: Sequence[str], object_bytes: int) -> Child:
        """Start an end made of the product's parts."""
        task = carriers.Task(
            role, self.broker.url, str(self.folder), tuple(agents), CHUNK_BYTES, object_bytes
        )
        return self.start(f"{role}-{agents[0] if agents else 'one'}", "carriers", task)

    def raw(self, role: str, topics: Sequence[str], clients: Sequence[str], qos: int, messages: int) -> Child:
        """Start an end made of plain paho clients."""
        task = raw_carriers.Task(
            role,
            "127.0.0.1",
            self.broker.port,
            str(self.folder),
            tuple(topics),
            tuple(clients),
            qos,
            messages,
            CHUNK_BYTES,
        )
        return self.start(f"{role}-{clients[0]}", "raw_carriers", task)

    def go(self) -> dict[str, list[dict[str, float]]]:
        """Let all begin once all are ready, and wait until all are done.

        Returns:
            What each said at the end.
        """
        self._until_told("ready", START_S)
        (self.folder / "go").touch()
        self._until_told("done", RUN_S)
        return {child.name: self._told(child, "done") for child in self._running}

    def finish(self, *, aggregator: Child | None = None) -> tuple[float, float]:
        """End all.

        Returns:
            Peaks of the broker and of the aggregator's side, MiB.
        """
        for child in [self.broker.child, *self._running]:
            child.look()
        self._children.stop(*self._running, self.broker.child)
        shutil.rmtree(self.folder)
        return self.broker.child.peak_mb, aggregator.peak_mb if aggregator else 0.0

    def _until_told(self, event: str, timeout_s: float) -> None:
        self._children.until(
            lambda: all(self._told(child, event) for child in self._running), timeout_s, f"all are {event}"
        )

    def _told(self, child: Child, event: str) -> list[dict[str, float]]:
        lines = (line for line in child.log.read_text().splitlines() if line.startswith("{"))
        return [record for record in map(json.loads, lines) if record.get("event") == event]


def summary(told: dict[str, list[dict[str, float]]], end: str = "finished") -> tuple[float, float]:
    """Bytes delivered, and seconds from the first publish to the last delivery, or to another ``end``."""
    records = [record for records in told.values() for record in records]
    began = min(record["began"] for record in records if "began" in record)
    finished = max(record[end] for record in records if end in record)
    return sum(record.get("bytes", 0) for record in records), finished - began


def shares(names: Sequence[str]) -> list[Sequence[str]]:
    """The agents of each process."""
    return [names[start::PROCESSES] for start in range(PROCESSES)]


def names_of(count: int) -> list[str]:
    """Agents."""
    return [f"agent-{number}" for number in range(1, count + 1)]


def our_down(children: Children, folder: Path, length: int, agents: int) -> Outcome:
    """One object onto the broker and from there to every agent's disk."""
    run = Run(children, folder)
    (folder / "object").write_bytes(Random(1).randbytes(length))
    seeder = run.ours("seed", (), length)
    for names in shares(names_of(agents)):
        run.ours("pull", names, length)
    delivered, seconds = summary(run.go())
    broker_mb, aggregator_mb = run.finish(aggregator=seeder)
    lost = agents * length - int(delivered)
    return Outcome(delivered / seconds / MB, -(-lost // CHUNK_BYTES), 0.0, broker_mb, aggregator_mb)


def our_up(children: Children, folder: Path, length: int, agents: int) -> Outcome:
    """An update of every agent to the aggregator's disk, checked and answered."""
    run = Run(children, folder)
    names = names_of(agents)
    collector = run.ours("collect", names, length)
    for some in shares(names):
        run.ours("offer", some, length)
    told = run.go()
    delivered, seconds = summary(told)
    receipted = summary(told, "receipted")[1]
    arrived = sum(record.get("arrived_bytes", 0) for records in told.values() for record in records)
    broker_mb, aggregator_mb = run.finish(aggregator=collector)
    lost = max(0, agents * length - int(delivered))
    return Outcome(
        delivered / seconds / MB,
        -(-lost // CHUNK_BYTES),
        arrived / delivered - 1,
        broker_mb,
        aggregator_mb,
        delivered / receipted / MB,
    )


def raw_down(children: Children, folder: Path, length: int, agents: int, qos: int) -> Outcome:
    """One publisher, every agent a subscriber."""
    run = Run(children, folder)
    messages = -(-length // CHUNK_BYTES)
    for names in shares(names_of(agents)):
        run.raw("raw-subscribe", ["raw/down"] * len(names), names, qos, messages)
    run.raw("raw-publish", ["raw/down"], ["source"], qos, messages)
    return raw_outcome(run)


def raw_up(children: Children, folder: Path, length: int, agents: int, qos: int) -> Outcome:
    """Every agent a publisher, one subscriber."""
    run = Run(children, folder)
    messages = -(-length // CHUNK_BYTES)
    run.raw("raw-subscribe", ["raw/up/+"], ["sink"], qos, agents * messages)
    for names in shares(names_of(agents)):
        run.raw("raw-publish", [f"raw/up/{name}" for name in names], names, qos, messages)
    return raw_outcome(run)


def raw_outcome(run: Run) -> Outcome:
    """What a raw run gave."""
    told = run.go()
    delivered, seconds = summary(told)
    lost = sum(int(record.get("lost", 0)) for records in told.values() for record in records)
    broker_mb, _ = run.finish()
    return Outcome(delivered / seconds / MB, lost, 0.0, broker_mb)


def direction(children: Children, options: Options, results: Results, key: str) -> list[Outcome]:
    """One direction, ours and raw in turn.

    Returns:
        Our runs.
    """
    length, agents = (DOWN_BYTES, DOWN_AGENTS) if key == "down" else (UP_BYTES, UP_AGENTS)
    ours_of, raw_of = (our_down, raw_down) if key == "down" else (our_up, raw_up)
    repeats = 3 if options.quick else 5
    say(
        f"{key}: {length / MB:.0f} MB, {agents} agents in {PROCESSES} processes, {repeats} times, beside raw at QoS 0 and 1"
    )
    ours, raw = [], []
    for repeat in range(repeats):
        ours.append(ours_of(children, options.folder / f"{key}-{repeat}", length, agents))
        pair = [
            raw_of(children, options.folder / f"raw-{key}-{repeat}-{qos}", length, agents, qos)
            for qos in (0, 1)
        ]
        raw.append(max(pair, key=lambda outcome: outcome.rate))
        say(
            f"    {ours[-1].rate:.0f} MB/s; raw "
            + ", ".join(f"{o.rate:.0f} MB/s with {o.lost} lost, broker {o.broker_mb:.0f} MB" for o in pair)
        )
    share = [a.rate / b.rate for a, b in zip(ours, raw, strict=True)]
    what = f"{length / MB:.0f} MB x {agents}; median of {repeats}"
    spread = f"{min(share):.0%} to {max(share):.0%}"
    results.add(f"{key}_share", 100 * middle(share), "%", f"of raw's rate, {spread}; {what}")
    results.add(
        f"{key}_mb_s",
        middle(o.rate for o in ours),
        "MB/s",
        f"first publish to last chunk verified and in its file; {what}",
    )
    if key == "up":
        results.add(
            "up_receipt_mb_s",
            middle(o.receipt_rate for o in ours),
            "MB/s",
            "to the last receipt: every update hashed again, decoded, checked, synced, recorded",
        )
    results.add(
        f"raw_{key}_mb_s",
        middle(o.rate for o in raw),
        "MB/s",
        "the better of QoS 0 and 1, by what was delivered",
    )
    results.add(f"raw_{key}_lost", middle(o.lost for o in raw), "messages", "that the faster raw run lost")
    results.add(f"{key}_repeated", 100 * middle(o.extra for o in ours), "%", "payload that came twice")
    return ours


def hundred(children: Children, options: Options, results: Results) -> list[Outcome]:
    """A hundred agents at once."""
    repeats = 1 if options.quick else 3
    say(f"hundred: {MANY_AGENTS} agents x {MANY_BYTES / MB:.0f} MB at once, {repeats} times")
    outcomes = [
        our_up(children, options.folder / f"hundred-{repeat}", MANY_BYTES, MANY_AGENTS)
        for repeat in range(repeats)
    ]
    note = f"{MANY_AGENTS} x {MANY_BYTES / MB:.0f} MB; median of {repeats}"
    results.add("hundred_mb_s", middle(o.rate for o in outcomes), "MB/s", note)
    results.add(
        "hundred_aggregator_peak_mb", middle(o.aggregator_mb for o in outcomes), "MB", f"peak RSS; {note}"
    )
    results.add(
        "hundred_broker_peak_mb",
        middle(o.broker_mb for o in outcomes),
        "MB",
        f"peak RSS of mosquitto; {note}",
    )
    return outcomes


def measure(options: Options, results: Results) -> None:
    """Run the parts that were asked for."""
    runs: list[Outcome] = []
    with Children(options.folder / "logs") as children:
        for key in ("down", "up"):
            if key in options.parts:
                runs += direction(children, options, results, key)
        if "hundred" in options.parts:
            runs += hundred(children, options, results)
        if "badlink" in options.parts:
            data = find_data()
            bad_link(children, options, results, data.spec, data.suffix)
    if runs:
        results.add(
            "lost_chunks", sum(o.lost for o in runs), "chunks", "that never arrived, over all our runs"
        )
        results.add(
            "broker_peak_mb", max(o.broker_mb for o in runs), "MB", "peak RSS of mosquitto, worst of our runs"
        )
        results.add(
            "aggregator_peak_mb",
            max(o.aggregator_mb for o in runs),
            "MB",
            "peak RSS of the aggregator's side, worst of our runs",
        )


if __name__ == "__main__":
    main("transfer", QUESTION, measure, PARTS)
