"""A federation of real processes on this machine: `aggregator serve` with its broker, and agents."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aggregator.broker_process import BrokerFiles
from aggregator.enrolment import Enrolment
from aggregator.records import StoredRound, StoredUpdate
from aggregator.status import collect
from aggregator.store import Store
from benchmarks.processes import Child, Children, module, peak_mb
from benchmarks.runner import BenchmarkError
from federation.bundle import write_bundle

FEDERATION = "bench"

START_S = 180.0
"""Importing torch in several processes at once takes tens of seconds on a small machine."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be run.

    Attributes:
        model: Name.
        data: For the aggregator to derive the task from.
        rounds: How many.
        agents: How many take part in each round.
        holdout: Evaluate each round on this; empty for no evaluation.
        train: Settings of ``[train]``.
        settings: Further ones for ``--set``, by name.
    """

    model: str
    data: str
    rounds: int
    agents: int
    holdout: str = ""
    train: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Round:
    """One closed round, all in seconds of the wall clock.

    Attributes:
        row: As stored.
        updates: By agent; their metrics hold what training took.
    """

    row: StoredRound
    updates: Mapping[str, StoredUpdate]

    @property
    def longest_training_s(self) -> float:
        """Of its agents."""
        return max(update.metrics.train_s for update in self.updates.values())

    @property
    def seconds(self) -> float:
        """From opening to closing."""
        assert self.row.closed_at is not None
        return self.row.closed_at - self.row.opened_at


class Fleet:
    """One aggregator with its embedded broker, and whoever joins it.

    Args:
        children: Run the processes.
        folder: Of this fleet alone; created.
        run: What is to be run.
        host: Address of the broker.
        server_prefix: Put before the server's command, to run it elsewhere.
        agent_prefix: Put before the agents' commands.
        telemetry_s: Seconds between the agents' reports, which also tell what rounds have moved; 0 for none.
    """

    def __init__(
        self,
        children: Children,
        folder: Path,
        run: Run,
        *,
        host: str = "127.0.0.1",
        server_prefix: Sequence[str] = (),
        agent_prefix: Sequence[str] = (),
        telemetry_s: float = 0.0,
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.state, self._run, self._children = folder, folder / "state", run, children
        self._host, self._server_prefix, self._agent_prefix = host, server_prefix, agent_prefix
        self._telemetry_s = telemetry_s
        self.port = free_port()
        self._enrolment = Enrolment(self.state, FEDERATION)
        self.broker_peak_mb = 0.0

    def enroll(self, name: str, *, port: int = 0) -> Path:
        """The bundle of a new agent, which reaches the broker through ``port``; 0 is the broker's own."""
        path = self.folder / f"{name}.bundle.json"
        write_bundle(
            path, self._enrolment.enroll(name, broker_url=f"mqtt://{self._host}:{port or self.port}")
        )
        return path

    def serve(self) -> Child:
        """Start `aggregator serve`."""
        run = self._run
        values = {f"train.{key}": value for key, value in run.train.items()} | dict(run.settings)
        settings = [argument for key, value in values.items() for argument in ("--set", f"{key}={value}")]
        holdout = ["--holdout", run.holdout] if run.holdout else []
        return self._children.start(
            f"{self.folder.name}-aggregator",
            *self._server_prefix,
            *module("aggregator.cli", "serve", "--federation", FEDERATION, "--state", str(self.state)),
            *("--listen", f"{self._host}:{self.port}", "--model", run.model, "--data", run.data, *holdout),
            *("--rounds", str(run.rounds), "--min-agents", str(run.agents)),
            *("--cohort-size", str(run.agents), "--deadline", "3600", "--log-format", "json", *settings),
        )

    def join(self, data: Sequence[str]) -> list[Child]:
        """Start one `edge-agent run` for each share of the data, each with one thread."""
        bundles = [self.enroll(f"agent-{number}") for number in range(1, len(data) + 1)]
        return [self.start(bundle, share) for bundle, share in zip(bundles, data, strict=True)]

    def start(self, bundle: Path, share: str) -> Child:
        """Start `edge-agent run` with one thread."""
        return self._children.start(
            f"{self.folder.name}-{bundle.name.partition('.')[0]}",
            *self._agent_prefix,
            *module("edge_agent.cli", "run", str(bundle), "--data", share),
            *("--threads", "1", "--device", "cpu", "--telemetry", f"{self._telemetry_s:g}"),
            *("--log-format", "json"),
        )

    def finish(self, server: Child, timeout_s: float) -> list[Round]:
        """Wait until the aggregator has finished its run.

        Returns:
            The rounds, oldest first.

        Raises:
            BenchmarkError: If a process fails, or an update was refused, which would falsify the figures.
        """
        broker = self.broker_pid()

        def over() -> bool:
            self.broker_peak_mb = max(self.broker_peak_mb, peak_mb(broker))
            return server.ended

        self._children.until(over, timeout_s, f"{server.name} finishes its rounds")
        report = collect(self.state)
        if report.refusal_counts:
            raise BenchmarkError(f"updates were refused: {report.refusal_counts}, see {server.log}")
        with Store(self.state) as store:
            rounds = [Round(row, store.updates(row.round)) for row in store.rounds()]
        if len(rounds) != self._run.rounds or any(len(r.updates) != self._run.agents for r in rounds):
            raise BenchmarkError(f"not every agent took part in every round, see {server.log}")
        return rounds

    def broker_pid(self) -> int:
        """Of the embedded broker, once it runs."""
        pid = BrokerFiles(self.state.resolve()).pid
        self._children.until(lambda: pid.exists() and bool(pid.read_text().strip()), START_S, "broker up")
        return int(pid.read_text())


def train_together(
    children: Children, folder: Path, run: Run, shares: Sequence[str], timeout_s: float
) -> list[Round]:
    """Run a whole federation of `edge-agent run` processes, one for each share, and end them."""
    fleet = Fleet(children, folder, run)
    agents = fleet.join(shares)
    server = fleet.serve()
    rounds = fleet.finish(server, timeout_s)
    children.stop(server, *agents)
    return rounds


def free_port() -> int:
    """A port of loopback on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
