"""A real server and real agents over a broker in memory: rounds end with the exact average, whatever the weather."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from memory_link import ADDRESS, MemoryBroker, Weather
from numpy.typing import NDArray

from aggregator.config import AggregatorConfig, RoundsConfig
from aggregator.enrolment import Enrolment
from aggregator.service import Service
from aggregator.store import Store
from edge_agent.agent import Agent, Options
from edge_agent.training import Cancelled, Trained, TrainingError
from federation.bundle import Bundle
from federation.errors import ConfigError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.encodings import ENCODINGS
from federation.wire.inbox import Limits, Message
from federation.wire.messages import (
    AgentState,
    Capabilities,
    RoundPlan,
    TaskSpec,
    Telemetry,
    TrainMetrics,
    encode_json,
)

NAME = "garden"
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
SHAPES = {"bias": (30,), "weight": (40, 30)}
LIMITS = Limits(max_packet_bytes=2048)
"""Chunks of 1 KiB: the model travels in five."""

PATIENCE_S = 40.0

Arrays = Mapping[str, NDArray[np.float32]]


def base_arrays() -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng(3)
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

    def train(self, base: Arrays, plan: RoundPlan, agent: str, cancelled: Callable[[], bool]) -> Trained:
        self.began.append(plan.round)
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

    def __init__(self, folder: Path, broker: MemoryBroker, agents: int, **rounds: float) -> None:
        self.folder, self.broker = folder, broker
        self.names = [f"pi{number}" for number in range(agents)]
        settings = {"count": 3, "min_agents": agents, "gather_s": 0, "quorum": 1.0, "grace_s": 60} | rounds
        self.config = AggregatorConfig(
            federation=NAME,
            state_dir=str(folder / "server"),
            rounds=RoundsConfig(**settings),  # type: ignore[arg-type]
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

    def join(self, name: str, trainer: TinyTrainer) -> Agent:
        able = Capabilities(
            version="0",
            device="cpu",
            threads=1,
            memory_mb=1,
            samples=samples_of(name),
            encodings=tuple(ENCODINGS),
            platform="test",
        )
        options = Options(state_dir=self.folder / name, telemetry_s=0)
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


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Start]:
    started: list[Federation] = []

    def start(
        agents: int = 3, *, weather: Weather | None = None, seed: int = 0, **rounds: float
    ) -> Federation:
        broker = MemoryBroker(weather or Weather(), LIMITS, seed)
        started.append(Federation(tmp_path, broker, agents, **rounds))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_three_agents_average_exactly(federation: Start) -> None:
    fleet = federation()
    trainers = {name: TinyTrainer() for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    fleet.check()
    assert all(trainer.ended == [1, 2, 3] for trainer in trainers.values())
    eventually(lambda: not list(fleet.folder.glob("pi*/outbox/*")), "outboxes are empty")
    assert not list((fleet.folder / "server" / "updates").rglob("pi*"))


def test_lost_repeated_reordered_and_damaged_messages_change_nothing(federation: Start) -> None:
    weather = Weather(drop=0.03, duplicate=0.2, reorder=0.05, corrupt=0.03)
    fleet = federation(3, weather=weather, count=2)
    trainers = {name: TinyTrainer() for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    fleet.check(2)
    assert all(trainer.ended == [1, 2] for trainer in trainers.values()), "nobody trained twice"


def test_cut_cables_and_a_broker_that_forgets_everything_change_nothing(federation: Start) -> None:
    fleet = federation(count=2)
    gate = threading.Event()
    trainers = {name: TinyTrainer(gate=gate) for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    eventually(lambda: all(trainer.began == [1] for trainer in trainers.values()), "all train")
    (cut,) = fleet.broker.links_of("pi0")
    fleet.broker.cut(cut)
    fleet.broker.crash()
    (server,) = fleet.broker.links_of("aggregator")
    fleet.broker.cut(server)
    gate.set()
    eventually(
        lambda: all(trainer.ended == [1] for trainer in trainers.values()), "training goes on without a link"
    )
    fleet.broker.restore(server)
    fleet.broker.restore(cut)
    assert served.result(PATIENCE_S) is True
    fleet.check(2)


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_a_server_that_is_started_again_goes_on_with_the_same_round(federation: Start, encoding: str) -> None:
    fleet = federation(count=1)
    gate = threading.Event()
    for name in fleet.names:
        fleet.join(name, TinyTrainer(gate=gate if name == "pi2" else None))
    service, served = fleet.serve()
    with fleet.store() as store:
        eventually(lambda: sorted(store.updates(1)) == ["pi0", "pi1"], "two have delivered")
    service.stop()
    assert served.result(PATIENCE_S) is False
    # An open round keeps its encoding, whatever the settings say now.
    fleet.config = msgspec.structs.replace(fleet.config, encoding=encoding)
    _, again = fleet.serve()
    gate.set()
    assert again.result(PATIENCE_S) is True
    fleet.check(1)


def test_an_agent_that_is_started_again_delivers_what_it_had_trained(federation: Start) -> None:
    fleet = federation(count=1)
    first, second = TinyTrainer(), TinyTrainer()
    agent = fleet.join("pi0", first)
    _, served = fleet.serve()
    others = threading.Event()
    for name in fleet.names[1:]:
        fleet.join(name, TinyTrainer(gate=others))
    eventually(lambda: first.began, "it trains")
    with fleet.store() as store:
        eventually(lambda: sorted(store.updates(1)) == ["pi0"], "it has delivered")
    fleet.leave(agent, "pi0")
    fleet.join("pi0", second)
    others.set()
    assert served.result(PATIENCE_S) is True
    fleet.check(1)
    assert (first.ended, second.began) == ([1], []), "a round with a receipt is not trained again"


def test_an_update_without_a_receipt_survives_the_agent(federation: Start) -> None:
    fleet = federation(count=1)
    gate, server_is_gone = threading.Event(), threading.Event()
    first, second = TinyTrainer(gate=server_is_gone), TinyTrainer()
    agent = fleet.join("pi0", first)
    for name in fleet.names[1:]:
        fleet.join(name, TinyTrainer(gate=gate))
    service, served = fleet.serve()
    eventually(lambda: first.began, "it was invited")
    service.stop()
    assert served.result(PATIENCE_S) is False
    server_is_gone.set()
    eventually(lambda: list(fleet.folder.glob("pi0/outbox/offer")), "its update is on disk")
    fleet.leave(agent, "pi0")
    fleet.join("pi0", second)
    gate.set()
    _, again = fleet.serve()
    assert again.result(PATIENCE_S) is True
    fleet.check(1)
    assert second.began == []


def test_a_round_that_was_declined_is_trained_in_its_next_attempt(federation: Start) -> None:
    fleet = federation(count=1, deadline_s=1.0)
    unlucky = TinyTrainer(faults=[TrainingError("out of memory")])
    fleet.join("pi0", unlucky)
    for name in fleet.names[1:]:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    fleet.check(1)
    assert (unlucky.began, unlucky.ended) == ([1, 1], [1])


def test_a_chatty_agent_does_not_stop_the_clock(federation: Start) -> None:
    fleet = federation(2, count=1, min_agents=1, quorum=0.5, deadline_s=1.0, cohort_size=2)
    fleet.join("pi0", TinyTrainer())
    fleet.join("pi1", TinyTrainer(gate=threading.Event()))
    eventually(
        lambda: len([topic for topic in fleet.broker.retained if topic.endswith("/state")]) == 2, "births"
    )
    (chatty,) = fleet.broker.links_of("pi1")
    report = encode_json(
        Telemetry(
            session=chatty.client_id[-16:],
            phase="training",
            uptime_s=1,
            cpu_percent=1,
            process_mb=1,
            available_mb=1,
            disk_free_mb=1,
        )
    )
    ended = threading.Event()

    service, served = fleet.serve()

    def chat() -> None:
        while not ended.is_set():
            if len(service._inbox._items) < 50:  # never empty, never full
                chatty.publish(f"fedge/1/{NAME}/agent/pi1/telemetry", report, qos=0)

    talking = fleet.pool.submit(chat)
    try:
        assert served.result(PATIENCE_S) is True
    finally:
        ended.set()
        talking.result()
    with fleet.store() as store:
        assert sorted(store.updates(1)) == ["pi0"]


def test_the_second_process_under_one_name_ends_the_first(federation: Start) -> None:
    fleet = federation(1)
    fleet.join("pi0", TinyTrainer())
    first = fleet.agents["pi0"]
    eventually(lambda: fleet.broker.retained, "a birth")
    fleet.folder = fleet.folder / "copy"
    fleet.join("pi0", TinyTrainer())
    with pytest.raises(ConfigError, match="another process runs as 'pi0'"):
        first.result(PATIENCE_S)


def test_the_birth_of_an_earlier_life_that_the_broker_delivers_late_ends_nobody(federation: Start) -> None:
    fleet = federation(1)
    fleet.join("pi0", TinyTrainer())
    eventually(lambda: fleet.broker.retained, "a birth")
    (link,) = fleet.broker.links_of("pi0")
    earlier = encode_json(AgentState(state="online", session="0" * 16))
    fleet.broker.deliver(link, Message(f"fedge/1/{NAME}/agent/pi0/state", earlier, retain=True), 1)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    assert not fleet.agents["pi0"].done()


def test_a_revoked_agent_is_not_invited_any_more(federation: Start) -> None:
    fleet = federation(3, count=2, min_agents=2, cohort_size=3, gather_s=0.5, quorum=0.5, grace_s=0.2)
    gate = threading.Event()
    for name in fleet.names:
        fleet.join(name, TinyTrainer(gate=gate))
    _, served = fleet.serve()
    with fleet.store() as store:
        eventually(lambda: store.rounds() and len(store.rounds()[0].cohort) == 3, "a round is open")
        fleet.enrolment.revoke("pi2")
        fleet.broker.cut(fleet.broker.links_of("pi2")[0])
        gate.set()
        eventually(lambda: len(store.rounds()) == 2, "the next round")
        assert store.rounds()[1].cohort == ("pi0", "pi1")
    assert served.result(PATIENCE_S) is True
