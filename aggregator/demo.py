"""``aggregator demo``: a whole federation on this machine, as real processes, with a live picture of it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aggregator.broker import EmbeddedBroker
from aggregator.enrolment import Enrolment
from aggregator.status import Report, collect
from aggregator.status_view import agents_table, rounds_table
from federation.bundle import write_bundle
from federation.errors import ConfigError, FedgeError

FEDERATION = "demo"
SKEW = 1.0
"""Dirichlet concentration: low enough that the agents' shares differ visibly, high enough that all learn."""

START_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 1800.0
POLL_S = 0.2
TERMINATE_S = 15.0
MARKER = ".fedge-demo"


@dataclass(slots=True)
class Processes:
    """Children that end with the demo.

    Args:
        logs: Folder for what they print.
    """

    logs: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str, threads: int) -> None:
        """Start a child; its output goes to ``logs/NAME.log``."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with (self.logs / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches the demo, which then stops the children in order.
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def check(self) -> None:
        """Raise if a child has ended that should not have.

        Raises:
            ConfigError: With the end of its log.
        """
        for name, process in self.running.items():
            code = process.poll()
            if code not in (None, 0):
                raise ConfigError(f"{name} ended with exit code {code}:\n{self.tail(name)}")

    def ended(self, name: str) -> bool:
        """Whether a child has ended."""
        return self.running[name].poll() is not None

    def until_logged(self, name: str, event: str) -> None:
        """Wait until a child has said something.

        Raises:
            ConfigError: If it ends before, or is silent for :data:`START_TIMEOUT_S`.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while event not in (self.logs / f"{name}.log").read_text(errors="replace"):
            self.check()
            if self.ended(name) or time.monotonic() > deadline:
                raise ConfigError(f"{name} never said {event!r}:\n{self.tail(name)}")
            time.sleep(POLL_S)

    def tail(self, name: str, lines: int = 12) -> str:
        """The end of a child's log."""
        return "\n".join((self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End all children, politely first."""
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(TERMINATE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_demo(*, data: str, folder: Path, agents: int, rounds: int, settings: Sequence[str] = ()) -> None:
    """Run the demo and say what happened.

    Args:
        data: Data specification; every agent takes a Dirichlet share of its training part.
        folder: Replaced, if an earlier demo made it.
        agents: Processes that train.
        rounds: Of federated averaging.
        settings: More of the aggregator's, ``KEY=VALUE``, such as ``privacy.secagg.enabled=true``.

    Raises:
        ConfigError: If the folder is something else, or a process fails.
    """
    console = Console()
    began = time.monotonic()
    _fresh(folder)
    state, logs = folder / "aggregator", folder / "logs"
    names = [f"agent-{number}" for number in range(1, agents + 1)]
    serve = (*_enrolled(folder, names), "--holdout", data, "--rounds", str(rounds), *_shape(agents, settings))
    with _processes(logs) as processes:
        console.print(
            f"[bold]fedge demo[/]: {agents} agents learn [bold]{data}[/] together; the data stays with each."
        )
        processes.start("aggregator", *serve, threads=1)
        _start_agents(processes, names, data=data, folder=folder)
        report = _watch(console, processes, state, rounds)
        processes.stop()
        processes.check()
    _roll_out(console, serve, folder, data=data, bundle=_bundle(folder, names[0]))
    _conclude(console, report, folder, _bundle(folder, names[0]), time.monotonic() - began)


def _roll_out(console: Console, serve: Sequence[str], folder: Path, *, data: str, bundle: Path) -> None:
    """From the last checkpoint to labels on a device, the way a real fleet gets them."""
    images = _unseen_images(data, folder / "unseen")
    at = ("--state", str(folder / "aggregator"))
    with _processes(folder / "logs") as processes:
        processes.start("releases", *serve, "--stay", threads=1)
        processes.until_logged("releases", "broker_connected")
        console.print("\n[bold]Release[/]: exported, quantized if that costs nothing, signed, announced:")
        _show(console, "aggregator.cli", "release", "--channel", "stable", *at)
        console.print(
            "\n[bold]Inference[/] on unseen images: a device fetches the release over MQTT, tests it, and runs it "
            "(onnxruntime, no torch):"
        )
        _show(
            console, "edge_agent.cli", "infer", str(bundle), "--source", str(images), "--log-level", "error"
        )
        console.print()
        _show(console, "aggregator.cli", "releases", *at)
        processes.stop()
        processes.check()


def _fresh(folder: Path) -> None:
    if folder.exists():
        if not (folder / MARKER).exists():
            raise ConfigError(f"{folder} exists and no demo made it: name another --folder")
        shutil.rmtree(folder)
    (folder / "logs").mkdir(parents=True)
    (folder / MARKER).touch()


@contextlib.contextmanager
def _processes(logs: Path) -> Iterator[Processes]:
    processes = Processes(logs)
    try:
        yield processes
    finally:
        processes.stop()


def _enrolled(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Give every agent its bundle; the command that serves them."""
    state = folder / "aggregator"
    enrolment = Enrolment(state, FEDERATION)
    broker = EmbeddedBroker(enrolment, port=_free_port())
    for name in names:
        write_bundle(_bundle(folder, name), enrolment.enroll(name, broker_url=broker.url))
    return (
        *_python("aggregator.cli", "serve", "--federation", FEDERATION, "--state", str(state)),
        *("--listen", f"{broker.host}:{broker.port}"),
    )


def _shape(agents: int, settings: Sequence[str]) -> tuple[str, ...]:
    """What the run is like."""
    return (
        *("--min-agents", str(agents), "--cohort-size", str(agents), "--epochs", "4", "--lr", "0.05"),
        *(part for setting in settings for part in ("--set", setting)),
    )


def _start_agents(processes: Processes, names: Sequence[str], *, data: str, folder: Path) -> None:
    threads = max(1, (os.cpu_count() or 1) // len(names))
    for number, name in enumerate(names, start=1):
        share = f"{data}@dirichlet({SKEW}),agent={number}/{len(names)}"
        processes.start(
            name,
            *_python("edge_agent.cli", "run", str(_bundle(folder, name)), "--data", share),
            *("--threads", str(threads), "--telemetry", "2", "--log-format", "console"),
            threads=threads,
        )


def _bundle(folder: Path, name: str) -> Path:
    return folder / f"{name}.bundle.json"


def _watch(console: Console, processes: Processes, state: Path, rounds: int) -> Report:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    task = progress.add_task("starting the processes", total=rounds)
    began = time.monotonic()
    report: Report | None = None
    with Live(progress, console=console, refresh_per_second=4) as live:
        while not processes.ended("aggregator"):
            processes.check()
            waited = time.monotonic() - began
            if waited > RUN_TIMEOUT_S or (waited > START_TIMEOUT_S and not (report and report.rounds)):
                raise ConfigError(
                    f"the demo stands still after {waited:.0f} s:\n{processes.tail('aggregator')}"
                )
            if (state / "store.sqlite").exists():
                report = collect(state)
                _refuse_to_stand_still(report)
                closed = sum(row.phase == "closed" for row in report.rounds)
                online = sum(bool(row["online"]) for row in report.agents)
                doing = f"round {closed + 1}" if report.rounds else f"{online} agents online"
                progress.update(task, completed=closed, description=doing if closed < rounds else "done")
                live.update(Group(rounds_table(report.rounds), "", agents_table(report.agents), "", progress))
            time.sleep(POLL_S)
        processes.check()
        report = collect(state)
        progress.update(task, completed=rounds, description="done")
        live.update(Group(rounds_table(report.rounds), "", agents_table(report.agents), "", progress))
    return report


def _refuse_to_stand_still(report: Report) -> None:
    """Raise if nobody takes part in the open round, as when the settings ask for what no agent accepts.

    Raises:
        ConfigError: With the reason of one of them.
    """
    reasons = [
        row["reason"] for row in report.declines if report.rounds and row["round"] == report.rounds[-1].round
    ]
    if reasons and len(reasons) == len(report.agents):
        raise ConfigError(f"all {len(reasons)} agents declined round {report.rounds[-1].round}: {reasons[0]}")


def _unseen_images(data: str, folder: Path) -> Path:
    """Write a few held-out images as files, as a camera would leave them."""
    from federation.task.data import write_samples

    return write_samples(data, folder, count=8)


def _show(console: Console, module: str, *arguments: str) -> None:
    done = subprocess.run(_python(module, *arguments), check=False, capture_output=True, text=True)
    if done.returncode:
        raise FedgeError(
            f"{module} {' '.join(arguments)} ended with exit code {done.returncode}: {done.stderr.strip()}"
        )
    console.print(done.stdout.rstrip(), markup=False, highlight=False, soft_wrap=True)


def _conclude(console: Console, report: Report, folder: Path, bundle: Path, seconds: float) -> None:
    last = report.rounds[-1]
    accuracy = (
        "" if last.accuracy is None else f" to [bold]{last.accuracy:.1%}[/] on images that no agent has seen"
    )
    state = folder / "aggregator"
    sent = sum(row.bytes_up for row in report.rounds) / 1e6
    console.print(
        f"\n[bold]Done[/] in {seconds:.0f} s: {last.delivered} agents trained one model in {last.round} round{'s' if last.round > 1 else ''}{accuracy}.\n"
        f"They sent {sent:.1f} MB of updates and not one image.\n"
        f"  release      {state / 'releases' / '1'}\n"
        f"  checkpoints  {state / 'checkpoints'}\n"
        f"  logs         {folder / 'logs'}\n"
        "Next:\n"
        f"  {_typed('aggregator')} status {state}\n"
        f"  {_typed('edge-agent')} models {bundle}\n"
        f"  {_typed('edge-agent')} infer {bundle} --source {folder / 'unseen'}\n"
        f"  {_typed('aggregator')} init            # write fedge.toml for a federation of your own",
        soft_wrap=True,
    )


def _typed(command: str) -> str:
    """How to type a command of ours here: `make demo` leaves its virtual environment inactive."""
    if shutil.which(command):
        return command
    installed = Path(sys.executable).with_name(command)
    return str(installed.relative_to(Path.cwd()) if installed.is_relative_to(Path.cwd()) else installed)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
