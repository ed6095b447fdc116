"""A federation in memory: a real server and real agents, each in a thread, over a broker in memory."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from memory_link import ADDRESS, MemoryBroker
from numpy.typing import NDArray

from aggregator.config import AggregatorConfig, RoundsConfig
from aggregator.enrolment import Enrolment
from aggregator.privacy_config import PrivacyConfig
from aggregator.service import Service
from aggregator.store import Store
from edge_agent.agent import Agent, Options
from edge_agent.config import PrivacyLimits
from edge_agent.terms import parse_requirement
from edge_agent.training import Cancelled, Trained
from federation.bundle import Bundle
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.encodings import ENCODINGS
from federation.wire.inbox import Limits
from federation.wire.masking import MASKED
from federation.wire.messages import (
    Capabilities,
    RoundPlan,
    TaskSpec,
    TrainMetrics,
)
from federation.wire.versions import model_digest
from privacy.budget import PrivateRound

NAME = "garden"
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
SHAPES = {"bias": (30,), "weight": (40, 30)}
KEEP = 2
"""Deltas that a plan names."""

LIMITS = Limits(max_packet_bytes=2048)
"""Chunks of 1 KiB: the model travels in five."""

PATIENCE_S = 40.0

SEED = 3

SAMPLES = 1000
"""That a device has, as far as its privacy is concerned."""

Arrays = Mapping[str, NDArray[np.float32]]


def base_arrays() -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng(SEED)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def samples_of(agent: str) -> int:
    return 10 + 7 * int(agent[-1])


def delta_of(base: Arrays, agent: str, number: int) -> dict[str, NDArray[np.float32]]:
    """Half of the way from the base to a point of the agent's own: wrong if the base is."""
    draw = np.random.default_rng([int(agent[-1]), number])
    return {
        name: (np.float32(0.5) * (draw.standard_normal(base[name].shape).astype(np.float32) - base[name]))
        for name in sorted(base)
    }


def fedavg(agents: list[str], rounds: int) -> dict[str, NDArray[np.float32]]:
    """The paper's formula in float64, one agent after the other."""
    model = base_arrays()
    for number in range(1, rounds + 1):
        deltas = {agent: delta_of(model, agent, number) for agent in sorted(agents)}
        weight = float(sum(samples_of(agent) for agent in agents))
        for name in model:
            total = np.zeros(model[name].shape, np.float64)
            for agent, delta in deltas.items():
                total += delta[name].astype(np.float64) * samples_of(agent)
            model[name] = (model[name] + total / weight).astype(np.float32)
    return model


class TinyTrainer:
    """Trains in no time, without torch. ``gate``, when given, is waited for; ``faults`` are raised, one per round."""

    def __init__(self, *, gate: threading.Event | None = None, faults: list[Exception] | None = None) -> None:
        self.gate, self.faults = gate, faults or []
        self.began: list[int] = []
        self.ended: list[int] = []
        self.bases: dict[int, str] = {}
        """Digest of the model that each round was trained on."""
        self.private: list[PrivateRound | None] = []
        self.built: list[int] = []
        """Seeds from which an initial model was built."""

    def initial(self, task: TaskSpec, seed: int) -> Arrays:
        assert task == TASK
        self.built.append(seed)
        # Another seed stands for a machine whose random numbers differ.
        return base_arrays() if seed == SEED else {name: array + 1 for name, array in base_arrays().items()}

    def samples(self, task: TaskSpec) -> int:
        assert task == TASK
        return SAMPLES

    def train(
        self,
        base: Arrays,
        plan: RoundPlan,
        agent: str,
        cancelled: Callable[[], bool],
        *,
        private: PrivateRound | None = None,
    ) -> Trained:
        self.private.append(private)
        self.began.append(plan.round)
        self.bases[plan.round] = model_digest(base)
        while self.gate is not None and not self.gate.wait(0.01):
            if cancelled():
                raise Cancelled
        if self.faults:
            raise self.faults.pop(0)
        self.ended.append(plan.round)
        metrics = TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=0.0)
        return Trained(delta_of(base, agent, plan.round), samples_of(agent), metrics)


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


class Federation:
    """One server and its agents, each in a thread."""

    def __init__(
        self,
        folder: Path,
        broker: MemoryBroker,
        agents: int,
        *,
        up: str,
        down: str,
        privacy: PrivacyConfig,
        **rounds: float,
    ) -> None:
        self.folder, self.broker = folder, broker
        self.names = [f"pi{number}" for number in range(agents)]
        settings = {"count": 3, "min_agents": agents, "gather_s": 0, "quorum": 1.0, "grace_s": 60} | rounds
        self.config = AggregatorConfig(
            federation=NAME,
            state_dir=str(folder / "server"),
            up_encoding=up,
            down_encoding=down,
            keep_deltas=KEEP,
            rounds=RoundsConfig(**settings),  # type: ignore[arg-type]
            privacy=privacy,
        )
        with self.store() as store:
            info = CheckpointInfo(federation=NAME, round=0, task=TASK)
            store.write_checkpoint(0, checkpoint_bytes(info, base_arrays()))
        self.enrolment = Enrolment(folder / "server", NAME)
        self.bundles = {name: self.enrol(name) for name in self.names}
        self.pool = ThreadPoolExecutor(agents + 3)
        self.running: list[Agent | Service] = []
        self.agents: dict[str, Future[None]] = {}

    def enrol(self, name: str) -> Bundle:
        return self.enrolment.enroll(name, broker_url="mqtt://127.0.0.1:1")

    def store(self) -> Store:
        return Store(self.folder / "server", NAME, create=True)

    def serve(self) -> tuple[Service, Future[bool]]:
        store = self.store()
        store.lock()
        service = Service(self.config, store, self.enrolment, TASK, ADDRESS, make_link=self.broker.make_link)
        self.running.append(service)

        def run() -> bool:
            with store:
                return service.run()

        return service, self.pool.submit(run)

    def join(
        self,
        name: str,
        trainer: TinyTrainer,
        *,
        require: Sequence[str] = (),
        limits: PrivacyLimits | None = None,
    ) -> Agent:
        able = Capabilities(
            version="0",
            device="cpu",
            threads=1,
            memory_mb=1,
            samples=samples_of(name),
            encodings=(*ENCODINGS, MASKED),
            platform="test",
        )
        required = tuple(parse_requirement(text) for text in require)
        options = Options(
            state_dir=self.folder / name,
            telemetry_s=0,
            required=required,
            limits=limits or PrivacyLimits(),
        )
        agent = Agent(self.bundles[name], able, trainer, options, make_link=self.broker.make_link)
        self.running.append(agent)
        self.agents[name] = self.pool.submit(agent.run)
        return agent

    def leave(self, agent: Agent, name: str) -> None:
        agent.stop()
        self.agents.pop(name).result(PATIENCE_S)

    def close(self) -> None:
        for member in self.running:
            member.stop()
        self.pool.shutdown()

    def model(self, number: int) -> dict[str, NDArray[np.float32]]:
        with self.store() as store:
            return read_checkpoint(store.checkpoint_path(number))[1]

    def check(self, rounds: int = 3) -> None:
        """The last model is the formula's, to the bit, and every update was counted once."""
        for name, future in self.agents.items():
            assert not future.done(), f"{name} has ended: {future.exception()}"
        expected = fedavg(self.names, rounds)
        for name, array in self.model(rounds).items():
            np.testing.assert_array_equal(array, expected[name])
        with self.store() as store:
            assert [row.phase for row in store.rounds()] == ["closed"] * rounds
            assert all(sorted(store.updates(number)) == self.names for number in range(1, rounds + 1))


Start = Callable[..., Federation]
