"""A real server and a real agent with --max-rate over mosquitto: the cap holds, and the bytes are counted and stored."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from brokers import Broker, Relay, until
from numpy.typing import NDArray

from aggregator.config import AggregatorConfig, BrokerConfig, RoundsConfig
from aggregator.enrolment import Enrolment
from aggregator.service import Service
from aggregator.status import collect
from aggregator.store import Store
from edge_agent.agent import Agent, Options
from edge_agent.training import Trained
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.wire.encodings import ENCODINGS
from federation.wire.messages import Capabilities, RoundPlan, TaskSpec, Traffic, TrainMetrics
from federation.wire.rate import BURST_S, parse_rate, upload_chunk_bytes
from privacy.budget import PrivateRound

pytestmark = pytest.mark.network

NAME = "metered"
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
SHAPES = {"bias": (40,), "weight": (600, 100)}
MODEL_BYTES = 4 * (40 + 600 * 100)
ROUNDS = 2
CAP = parse_rate("800kbit")
DOWN_CHUNK = 16 * 1024
UNASKED_BYTES = 16 * 1024
"""Plans, credits and receipts come when they come; what they cost is taken from what is pulled next."""

PATIENCE_S = 90.0

Arrays = Mapping[str, NDArray[np.float32]]


def model() -> dict[str, NDArray[np.float32]]:
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


class NoiseTrainer:
    """Gives an update at once, without torch."""

    def samples(self, task: TaskSpec) -> int:
        raise AssertionError(f"no round of {task.model} is private")

    def train(
        self,
        base: Arrays,
        plan: RoundPlan,
        agent: str,
        cancelled: Callable[[], bool],
        *,
        private: PrivateRound | None = None,
    ) -> Trained:
        assert private is None
        assert not cancelled()
        draw = np.random.default_rng([plan.round, len(agent)])
        delta = {name: draw.standard_normal(base[name].shape).astype(np.float32) for name in sorted(base)}
        return Trained(delta, 10, TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=0.0))

    def initial(self, task: TaskSpec, seed: int) -> Arrays:
        raise AssertionError(f"{task.model} was not built from a seed ({seed})")


class Metered:
    """One server, one agent behind a relay that counts, each in a thread."""

    def __init__(
        self, folder: Path, broker: Broker, relay: Relay, *, max_rate: float | None, telemetry_s: float
    ) -> None:
        self.relay, self.state = relay, folder / "server"
        config = AggregatorConfig(
            federation=NAME,
            state_dir=str(self.state),
            up_encoding="float32",
            down_encoding="full",
            rounds=RoundsConfig(count=ROUNDS, min_agents=1, gather_s=0, quorum=1.0),
            broker=BrokerConfig(chunk_bytes=DOWN_CHUNK),
        )
        with Store(self.state, NAME, create=True) as store:
            info = CheckpointInfo(federation=NAME, round=0, task=TASK)
            store.write_checkpoint(0, checkpoint_bytes(info, model()))
        enrolment = Enrolment(self.state, NAME)
        bundle = enrolment.enroll("pi1", broker_url=f"mqtt://127.0.0.1:{relay.port}")
        able = Capabilities(
            version="0",
            device="cpu",
            threads=1,
            memory_mb=1,
            samples=10,
            encodings=tuple(ENCODINGS),
            platform="test",
        )
        self.store = Store(self.state, NAME)
        self.store.lock()
        self.service = Service(config, self.store, enrolment, TASK, broker.address())
        options = Options(state_dir=folder / "pi1", telemetry_s=telemetry_s, max_rate=max_rate)
        self.agent = Agent(bundle, able, NoiseTrainer(), options)
        self.pool = ThreadPoolExecutor(2)
        self.serving = self.pool.submit(self.service.run)
        self.working = self.pool.submit(self.agent.run)

    def accounts(self) -> dict[tuple[int, str], Traffic]:
        report = collect(self.state)
        found = {(row.round, "aggregator"): row.server_moved for row in report.rounds}
        return found | {(row.round, "pi1"): row.agents_moved for row in report.rounds}

    def close(self) -> None:
        self.agent.stop()
        self.service.stop()
        self.pool.shutdown()
        self.store.close()


@pytest.fixture
def make_metered(
    tmp_path: Path, make_broker: Callable[..., Broker], make_relay: Callable[[Broker], Relay]
) -> Iterator[Callable[..., Metered]]:
    made: list[Metered] = []

    def make(*, max_rate: float | None = None, telemetry_s: float) -> Metered:
        broker = make_broker("mosquitto")
        relay = make_relay(broker)
        made.append(Metered(tmp_path, broker, relay, max_rate=max_rate, telemetry_s=telemetry_s))
        return made[-1]

    yield make
    for metered in made:
        metered.close()


def test_a_capped_agent_keeps_its_cap_and_tells_what_rounds_have_cost(
    make_metered: Callable[..., Metered],
) -> None:
    began = monotonic()
    metered = make_metered(max_rate=CAP, telemetry_s=3600.0)
    relay = metered.relay

    def done_within_the_cap() -> bool:
        up, down = relay.up, relay.down  # read before the clock: later is only laxer
        allowed = CAP * (monotonic() - began + BURST_S)
        assert up <= allowed + upload_chunk_bytes(CAP)
        assert down <= allowed + DOWN_CHUNK + UNASKED_BYTES
        assert not metered.working.done(), metered.working.exception()
        return metered.serving.done()

    until(done_within_the_cap, timeout_s=PATIENCE_S, what="all rounds are closed")
    assert metered.serving.result() is True
    accounts = metered.accounts()
    of_agent = [accounts[number, "pi1"] for number in range(1, ROUNDS + 1)]
    for moved in of_agent:
        assert MODEL_BYTES < moved.sent_payload_bytes < moved.sent_bytes < 1.1 * MODEL_BYTES
        assert MODEL_BYTES < moved.received_payload_bytes < moved.received_bytes < 1.1 * MODEL_BYTES
    assert sum(moved.sent_bytes for moved in of_agent) < relay.up
    assert sum(moved.received_bytes for moved in of_agent) < relay.down
    for number in range(1, ROUNDS + 1):
        server = accounts[number, "aggregator"]
        assert MODEL_BYTES < server.received_payload_bytes < server.received_bytes < 1.1 * MODEL_BYTES
        assert MODEL_BYTES < server.sent_payload_bytes < server.sent_bytes


def test_without_telemetry_nothing_is_told(make_metered: Callable[..., Metered]) -> None:
    metered = make_metered(telemetry_s=0.0)
    assert metered.serving.result(PATIENCE_S) is True
    accounts = metered.accounts()
    assert all(accounts[number, "pi1"] == Traffic() for number in range(1, ROUNDS + 1))
    assert all(accounts[number, "aggregator"] != Traffic() for number in range(1, ROUNDS + 1))
