"""A federation of real processes: a broker, `aggregator serve`, `edge-agent run`; their logs, and their ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from brokers import free_port, until
from fleets import Mosquitto
from numpy.typing import NDArray

from aggregator.broker import EmbeddedBroker, reload_running
from aggregator.enrolment import MOSQUITTO_FOLDER, Enrolment
from aggregator.status import Report, RoundStatus, collect
from aggregator.store import Store
from federation.bundle import Bundle, read_bundle, write_bundle
from federation.errors import ConfigError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.messages import TaskSpec

BrokerName = Literal["embedded", "mosquitto"]
Tensors = dict[str, NDArray[np.float32]]

FEDERATION = "fleet"

PATIENCE_S = 240.0
"""Importing torch in four processes at once takes half a minute on two slow cores, and minutes beside other work."""

WHOLE_RUN_S = 900
"""For a test that waits for several such starts, one after the other."""

TAIL_LINES = 25


class Process:
    """A command of ours, its output in a log file.

    Args:
        name: Of the log.
        module: Run with ``python -m``.
        arguments: Of the command.
        folder: For the log.
        environment: Added to ours.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Iterable[object],
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", module, *map(str, arguments)]
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | dict(environment or {}),
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def text(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def tail(self) -> str:
        """The end of that, under its name."""
        lines = "\n".join(self.text.splitlines()[-TAIL_LINES:])
        return f"--- {self.name} (exit code {self.popen.poll()})\n{lines}"

    def alive(self) -> bool:
        return self.popen.poll() is None

    def logged(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """The log lines of that event that have these fields."""
        lines = (line for line in self.text.splitlines() if line.startswith("{") and line.endswith("}"))
        return [
            record
            for record in map(json.loads, lines)
            if record.get("event") == event and fields.items() <= record.items()
        ]

    def until_logged(self, event: str, timeout_s: float = PATIENCE_S, **fields: object) -> None:
        """Wait for a log line; fail at once when the process ends without it."""
        self.until(
            lambda: bool(self.logged(event, **fields)), f"{self.name} logs {event} {fields}", timeout_s
        )

    def until(self, ready: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        until(lambda: ready() or not self.alive(), timeout_s=timeout_s, what=f"{what}; {self.tail}")
        assert ready(), f"{self.name} ended before: {what}\n{self.tail}"

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {timeout_s} s\n{self.tail}") from None

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.popen.terminate()
        return self.wait()

    def kill(self) -> None:
        """Kill -9, as a power cut does."""
        self.popen.kill()
        self.popen.wait()

    def pause(self) -> None:
        """Stop it where it stands, so that a test can act in the middle of something."""
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def imports(self, library: str) -> bool:
        """Whether it has loaded a shared library whose path has this in it."""
        return library in Path(f"/proc/{self.pid}/maps").read_text()


class Federation:
    """One federation with a folder, a broker and an aggregator of its own.

    Args:
        folder: For state, bundles and logs.
        broker: ``embedded``, or ``mosquitto`` with the accounts and rights that the enrolment writes.
    """

    def __init__(self, folder: Path, broker: BrokerName) -> None:
        self.folder, self.broker = folder, broker
        self.state = folder / "state"
        self.enrolment = Enrolment(self.state, FEDERATION)
        self.bundles: dict[str, Path] = {}
        self.processes: list[Process] = []
        self.mosquitto: Mosquitto | None = None
        if broker == "mosquitto":
            self.mosquitto = Mosquitto(self.state / MOSQUITTO_FOLDER, self.state)
            self.mosquitto.start()
            self.url = self.mosquitto.url
            self.port = self.mosquitto.port
        else:
            self.port = free_port()
            self.url = EmbeddedBroker(self.enrolment, port=self.port).url

    def enroll(self, name: str) -> Bundle:
        """Enrol a device, and tell the broker."""
        bundle = self.enrolment.enroll(name, broker_url=self.url)
        self.bundles[name] = self.folder / f"{name}.bundle.json"
        write_bundle(self.bundles[name], bundle)
        if self.mosquitto is not None:
            self.mosquitto.reload()
        else:
            reload_running(self.state)
        return bundle

    def enrolment_of(self, name: str) -> Bundle:
        """The bundle of a device that was enrolled."""
        return read_bundle(self.bundles[name])

    def serve(self, *arguments: object, environment: Mapping[str, str] | None = None) -> Process:
        """Start the aggregator, or start it again on the same state."""
        where = (
            ("--broker", self.url)
            if self.mosquitto is not None
            else ("--broker", "embedded", "--listen", f"127.0.0.1:{self.port}")
        )
        common = ("serve", "--federation", FEDERATION, "--state", self.state, *where)
        return self._start("aggregator", "aggregator.cli", (*common, *arguments), environment)

    def agent(
        self,
        name: str,
        data: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Start a device, or start it again."""
        if name not in self.bundles:
            self.enroll(name)
        common = ("run", self.bundles[name], "--data", data, "--threads", "1", "--telemetry", "0.5")
        return self._start(name, "edge_agent.cli", (*common, *arguments), environment)

    def _start(
        self, name: str, module: str, arguments: Iterable[object], environment: Mapping[str, str] | None
    ) -> Process:
        lives = sum(process.name.split("#")[0] == name for process in self.processes)
        process = Process(f"{name}#{lives + 1}", module, arguments, self.folder, environment)
        self.processes.append(process)
        return process

    def report(self) -> Report:
        return collect(self.state)

    def round(self, number: int) -> RoundStatus | None:
        """That round, once it has been opened; None before."""
        try:
            rounds = self.report().rounds
        except ConfigError:  # the aggregator has not created its store yet
            return None
        return next((row for row in rounds if row.round == number), None)

    def delivered(self, number: int) -> int:
        """Updates accepted in that round."""
        row = self.round(number)
        return 0 if row is None else row.delivered

    def closed(self, number: int) -> bool:
        row = self.round(number)
        return row is not None and row.phase == "closed"

    def until(self, ready: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Poll until it is so; show all logs' ends if it never is."""
        try:
            until(ready, timeout_s=timeout_s, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tails()}") from None

    def until_closed(self, number: int) -> None:
        """Wait until that round's model is on disk."""
        self.until(lambda: self.closed(number), f"round {number} closes")

    def tensors(self, number: int) -> Tensors:
        """The global model after a round."""
        return read_checkpoint(self.state / "checkpoints" / f"round-{number:06d}.safetensors")[1]

    def tails(self) -> str:
        return "\n".join(process.tail for process in self.processes)

    def close(self) -> None:
        """End everything, whatever state it is in."""
        for process in self.processes:
            if process.alive():
                process.kill()
        if self.mosquitto is not None:
            self.mosquitto.stop()
        print(self.tails())  # noqa: T201  # pytest shows it with a failure


MakeFederation: TypeAlias = Callable[[BrokerName], Federation]


def same_bits(one: Tensors, other: Tensors) -> bool:
    """Whether two models are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() and one[name].shape == other[name].shape for name in one
    )


def run_command(
    module: str, *arguments: object, timeout_s: float = PATIENCE_S
) -> "subprocess.CompletedProcess[str]":
    """Run a command of ours to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


TINY_SHAPES = {"bias": (16,), "scale": (), "weight": (16, 60)}
"""About 4 KB: four chunks of 1 KB."""

TINY_TASK = (
    *("--model", "tiny"),
    *("--set", 'task.labels=["a", "b"]'),
    *("--set", "task.channels=1", "--set", "task.height=8", "--set", "task.width=8"),
)
"""A task that needs no data to derive and no torch to serve. No real agent could build its model."""


def begin_tiny_run(
    state: Path, shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(TINY_SHAPES)
) -> None:
    """Write the initial model, so that the aggregator need not build one and never imports torch."""
    task = TaskSpec(model="tiny", labels=("a", "b"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
    info = CheckpointInfo(federation=FEDERATION, round=0, task=task)
    rng = np.random.default_rng(7)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    with Store(state, FEDERATION, create=True) as store:
        store.write_checkpoint(0, checkpoint_bytes(info, arrays))


LEARNING = (
    *("--holdout", "digits", "--rounds", 3, "--min-agents", 3, "--cohort-size", 3, "--deadline", 600),
    *("--epochs", 12, "--batch-size", 16, "--lr", 0.05, "--set", "rounds.gather_s=600"),
)
"""Three rounds of real learning, with training long enough to be interrupted."""

SHARES = {f"agent-{number}": f"digits@iid,agent={number}/3" for number in (1, 2, 3)}
"""What each agent holds. The same names, shares and settings give the same bits on every run."""


def wrong_clock(folder: Path, offset_s: float) -> dict[str, str]:
    """Environment of a process whose wall clock is off by so much."""
    place = folder / f"clock{offset_s:+.0f}"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        f"import time\nright = time.time\ntime.time = lambda: right() + ({offset_s})\n"
    )
    return {"PYTHONPATH": str(place)}


def dies_before(folder: Path, step: str) -> dict[str, str]:
    """Environment of an aggregator that is killed, as by a power cut, just before it takes this step on its store."""
    place = folder / f"before-{step}"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import os, signal\nfrom aggregator.store import Store\n"
        f"Store.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    return {"PYTHONPATH": str(place)}


@dataclass(frozen=True)
class FinishedRun:
    """Three real agents that have learned together for three rounds, undisturbed, through the embedded broker.

    Attributes:
        federation: Its state is on disk; nothing runs any more.
        server_exit: Of the aggregator, which ended by itself.
        outlived: Agents that were up after the run was over.
        agent_exits: How they ended at SIGTERM.
    """

    federation: Federation
    server_exit: int
    outlived: tuple[str, ...]
    agent_exits: dict[str, int]


def finish(federation: Federation, server: Process, agents: Mapping[str, Process]) -> FinishedRun:
    """Wait for the end of the run, then end the agents."""
    server.until_logged("run_finished")
    server_exit = server.wait()
    for agent in agents.values():
        agent.until_logged("update_accepted", reason="accepted")
    outlived = tuple(name for name, agent in agents.items() if agent.alive())
    return FinishedRun(federation, server_exit, outlived, {name: a.terminate() for name, a in agents.items()})
