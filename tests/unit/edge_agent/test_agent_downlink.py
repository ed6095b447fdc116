"""edge_agent.agent from a signed plan to the start of training, over a broker in memory: on the right model or not at all."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from memory_link import MemoryBroker
from msgspec import structs
from numpy.typing import NDArray
from version_chain import FEDERATION, SEED, TOPICS, Chain, built, chunks_of, full_file

from edge_agent.agent import Agent, Options
from edge_agent.training import Trained
from federation.bundle import Bundle
from federation.wire.messages import (
    AgentMessage,
    Capabilities,
    Decline,
    FullModel,
    RoundPlan,
    TaskSpec,
    TrainMetrics,
    UpdateOffer,
)
from federation.wire.signing import AGGREGATOR, Purpose, public_key_hex, seal, unseal
from federation.wire.transfer import make_ref
from federation.wire.versions import model_digest
from privacy.budget import PrivateRound

CHAIN = Chain(3)
AGGREGATOR_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
AGENT_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
CAPABLE = Capabilities(
    version="test", device="cpu", threads=1, memory_mb=1, samples=1, encodings=("float32",), platform="test"
)
PATIENCE_S = 20.0

Arrays = Mapping[str, NDArray[np.float32]]


class Trainer:
    """Says which version it was given. ``seed_shift`` makes this machine build other models than the aggregator's."""

    def __init__(self, seed_shift: int = 0) -> None:
        self.seed_shift = seed_shift
        self.built: list[int] = []
        self.began: list[str] = []

    def initial(self, task: TaskSpec, seed: int) -> Arrays:
        assert task.labels
        self.built.append(seed)
        return built(seed + self.seed_shift)

    def samples(self, task: TaskSpec) -> int:
        return len(task.labels)

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
        assert (plan.cohort, cancelled()) == ((agent,), False)
        self.began.append(model_digest(base))
        metrics = TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=0.0)
        return Trained({name: np.ones_like(array) for name, array in base.items()}, 5, metrics)


class Device:
    """An agent in a thread, and what its aggregator hears of it."""

    def __init__(self, folder: Path, trainer: Trainer, chunks: Mapping[str, bytes]) -> None:
        self.state, self.trainer = folder, trainer
        self.objects = folder / "objects"
        self.broker = MemoryBroker(retained=dict(chunks))
        bundle = Bundle(
            federation=FEDERATION,
            agent="pi1",
            private_key="00" * 32,
            aggregator_key=public_key_hex(AGGREGATOR_KEY),
            broker="mqtt://127.0.0.1:1",
            username="pi1",
            password="secret",
        )
        options = Options(state_dir=folder, telemetry_s=0)
        self.agent = Agent(bundle, CAPABLE, trainer, options, make_link=self.broker.make_link)

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.agent.run)
        thread.start()
        try:
            yield
        finally:
            self.agent.stop()
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def announce(self, plan: RoundPlan) -> None:
        sealed = seal(
            plan, purpose=Purpose.PLAN, federation=FEDERATION, sender=AGGREGATOR, key=AGGREGATOR_KEY
        )
        self.broker.route("aggregator", TOPICS.plan, sealed, qos=1, retain=True)

    def answer(self) -> AgentMessage:
        """Wait for its offer, or for its refusal, which comes only once."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with self.broker.lock:
                sent = [payload for _, topic, payload in self.broker.log if topic == TOPICS.offer("pi1")]
            if sent:
                message: UpdateOffer | Decline = unseal(
                    sent[0],
                    UpdateOffer | Decline,  # type: ignore[arg-type]  # msgspec takes a union of tagged structs
                    purpose=Purpose.AGENT,
                    federation=FEDERATION,
                    sender="pi1",
                    key=AGENT_KEY.public_key(),
                )
                return message
            assert time.monotonic() < deadline, "neither an offer nor a refusal"
            time.sleep(0.005)

    def takes_part_in(self, plan: RoundPlan) -> None:
        with self.running():
            self.announce(plan)
            offer = self.answer()
        assert isinstance(offer, UpdateOffer), offer
        assert offer.base == plan.base
        assert self.trainer.began == [plan.base]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Device]:
    def device(*, seed_shift: int = 0, chunks: Mapping[str, bytes] | None = None) -> Device:
        return Device(tmp_path, Trainer(seed_shift), CHAIN.retained() if chunks is None else chunks)

    return device


Make = Callable[..., Device]


def test_a_newcomer_trains_on_the_full_model(make: Make) -> None:
    make().takes_part_in(CHAIN.plan(2))


def test_a_newcomer_trains_on_an_older_full_model_and_the_deltas_since(make: Make) -> None:
    make().takes_part_in(CHAIN.plan(3, oldest=1, full=CHAIN.full(1)))


def test_the_first_round_needs_no_object_at_all(make: Make) -> None:
    device = make(chunks={})
    device.takes_part_in(CHAIN.plan(0, full=CHAIN.full(0, seed=SEED)))
    assert device.trainer.built == [SEED]


def test_a_machine_that_builds_another_model_fetches_the_full_one(make: Make) -> None:
    device = make(seed_shift=1)
    device.takes_part_in(CHAIN.plan(1, oldest=0, full=CHAIN.full(0, seed=SEED)))
    assert device.trainer.built == [SEED]


def test_a_version_that_the_disk_has_damaged_is_fetched_again(make: Make) -> None:
    device = make()
    damaged = device.objects / f"{CHAIN.digests[1]}.safetensors"
    damaged.write_bytes(CHAIN.files[1][:-4] + bytes(4))
    device.takes_part_in(CHAIN.plan(2, oldest=1))


def test_a_full_model_that_is_another_version_is_declined_with_both_digests(make: Make) -> None:
    data = full_file(built(SEED + 1))
    ref = make_ref(data, 512)
    device = make(chunks=chunks_of(ref, data))
    plan = CHAIN.plan(2, full=FullModel(version=CHAIN.digests[2], object=ref))
    with device.running():
        device.announce(plan)
        declined = device.answer()
        assert isinstance(declined, Decline)
        assert (declined.run, declined.round) == (plan.run, plan.round)
        assert plan.base[:12] in declined.reason
        assert model_digest(built(SEED + 1))[:12] in declined.reason
        assert device.trainer.began == []


def test_a_declined_round_is_taken_up_when_a_later_attempt_offers_the_right_model(make: Make) -> None:
    data = full_file(built(SEED + 1))
    ref = make_ref(data, 512)
    device = make(chunks=CHAIN.retained() | chunks_of(ref, data))
    with device.running():
        device.announce(CHAIN.plan(2, full=FullModel(version=CHAIN.digests[2], object=ref)))
        assert isinstance(device.answer(), Decline)
        with device.broker.lock:
            device.broker.log.clear()
        device.announce(structs.replace(CHAIN.plan(2), attempt=2))
        assert isinstance(device.answer(), UpdateOffer)
    assert device.trainer.began == [CHAIN.digests[2]]


def test_code_that_this_device_does_not_allow_is_not_run_to_build_a_model(make: Make) -> None:
    plan = CHAIN.plan(0, full=CHAIN.full(0, seed=SEED))
    device = make()
    with device.running():
        device.announce(structs.replace(plan, task=structs.replace(plan.task, model="foreign.code:model")))
        declined = device.answer()
    assert isinstance(declined, Decline)
    assert "--allow-model foreign.code:model" in declined.reason
    assert (device.trainer.built, device.trainer.began) == ([], [])
