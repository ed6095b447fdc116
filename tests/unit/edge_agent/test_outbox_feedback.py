"""edge_agent.outbox with an encoding that leaves values out: over rounds, all of them arrive."""

import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from memory_link import ADDRESS, MemoryBroker

from edge_agent.agent import Agent, Options
from edge_agent.feedback import Arrays
from edge_agent.outbox import Outbox
from edge_agent.training import Trained
from federation.bundle import Bundle
from federation.wire.codec import decode, schema_of
from federation.wire.messages import (
    Capabilities,
    FullModel,
    Receipt,
    RoundPlan,
    TaskSpec,
    TrainMetrics,
    TrainSpec,
    UpdateOffer,
)
from federation.wire.signing import AGGREGATOR, Purpose, seal
from federation.wire.topics import Topics
from federation.wire.transfer import make_ref

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SPEC = "topk:0.1"
MODEL = make_ref(b"model" * 30, 64)
PLAN = RoundPlan(
    run="0" * 16,
    round=1,
    attempt=1,
    task=TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,)),
    train=TrainSpec(),
    base=MODEL.sha256,
    full=FullModel(version=MODEL.sha256, object=MODEL),
    deltas=(),
    up_encoding=SPEC,
    max_noise=0.0,
    cohort=("pi1",),
    deadline_s=60,
    issued_at=0,
    upload_chunk_bytes=64,
)
METRICS = TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=1.0)


class Device:
    """One outbox over several rounds, each time as a new process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rng = np.random.default_rng(4)
        self.base: Arrays = {"w": np.ones((20, 30), np.float32)}
        self.plan = PLAN

    def box(self) -> Outbox:
        return Outbox(self._folder, federation="home", agent="pi1", key=KEY)

    def send(self, delta: Arrays, *, accepted: bool | None, private: bool = False) -> Arrays:
        """Put an update; hear a receipt, or none; forget the update. Returns what the aggregator decodes."""
        self.plan = msgspec.structs.replace(self.plan, round=self.plan.round + 1)
        offer = self.box().put(
            self.plan,
            self.base,
            delta,
            samples=7,
            metrics=METRICS,
            rng=self._rng,
            chunk_bytes=64,
            private=private,
        )
        box = self.box()
        assert box.pending() == offer
        data = b"".join(box.chunk(offer, index) for index in range(offer.object.chunks))
        if accepted is not None:
            receipt = receipt_of(offer, accepted=accepted)
            box.settle(receipt)
            self.box().settle(receipt)  # once more, after a restart
        box.clear()
        return decode(data, schema_of(delta), self.plan.up_encoding)


class NoTrainer:
    """A device whose update is on disk already has nothing to train."""

    def train(self, *_: object, **__: object) -> Trained:
        raise AssertionError

    def samples(self, *_: object) -> int:
        raise AssertionError

    def initial(self, *_: object) -> Arrays:
        raise AssertionError


def test_the_agent_settles_it_when_it_hears_the_receipt(tmp_path: Path, delta: Arrays) -> None:
    server, device_key = Ed25519PrivateKey.generate(), bytes(range(32)).hex()
    bundle = Bundle(
        federation="home",
        agent="pi1",
        private_key=device_key,
        aggregator_key=server.public_key().public_bytes_raw().hex(),
        broker="mqtt://127.0.0.1:1",
        username="pi1",
        password="x",
    )
    box = Outbox(tmp_path / "outbox", federation="home", agent="pi1", key=KEY)
    base = {name: np.ones_like(array) for name, array in delta.items()}
    offer = box.put(
        PLAN, base, delta, samples=7, metrics=METRICS, rng=np.random.default_rng(1), chunk_bytes=64
    )
    able = Capabilities(
        version="0", device="cpu", threads=1, memory_mb=1, samples=7, encodings=("topk",), platform="test"
    )
    broker, topics = MemoryBroker(), Topics("home")
    options = Options(state_dir=tmp_path, telemetry_s=0)
    agent = Agent(bundle, able, NoTrainer(), options, make_link=broker.make_link)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        link = broker.make_link(ADDRESS, "aggregator", on_event=lambda _: None)
        link.start()

        def publish(topic: str, message: RoundPlan | Receipt, purpose: Purpose) -> None:
            sealed = seal(message, purpose=purpose, federation="home", sender=AGGREGATOR, key=server)
            link.publish(topic, sealed, qos=1, retain=False)

        deadline = time.monotonic() + 20
        while not any(topic == topics.offer("pi1") for _, topic, _ in broker.log):
            assert time.monotonic() < deadline, "it never offers"
            publish(topics.plan, PLAN, Purpose.PLAN)
            time.sleep(0.01)
        publish(topics.receipt("pi1"), receipt_of(offer, accepted=True), Purpose.RECEIPT)
        while (tmp_path / "outbox" / "offer").exists():
            assert time.monotonic() < deadline, "it never hears the receipt"
            time.sleep(0.01)
    finally:
        agent.stop()
        thread.join()
    assert [path.name for path in (tmp_path / "outbox" / "feedback").iterdir()] == ["residual"]


def receipt_of(offer: UpdateOffer, *, accepted: bool) -> Receipt:
    return Receipt(run=offer.run, round=offer.round, sha256=offer.object.sha256, accepted=accepted)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


@pytest.fixture
def delta() -> Arrays:
    return {"w": np.random.default_rng(8).normal(0, 1, (20, 30)).astype(np.float32)}


def nothing(delta: Arrays) -> Arrays:
    return {name: np.zeros_like(array) for name, array in delta.items()}


def test_all_that_was_left_out_arrives_in_later_rounds(device: Device, delta: Arrays) -> None:
    arrived = device.send(delta, accepted=True)["w"].astype(np.float64)
    assert np.count_nonzero(arrived) == 60
    for _ in range(12):
        arrived += device.send(nothing(delta), accepted=True)["w"]
    assert np.abs(arrived - delta["w"]).max() < 1e-2 * np.abs(delta["w"]).max()


def test_a_refused_update_takes_nothing_with_it(device: Device, delta: Arrays) -> None:
    first = device.send(delta, accepted=True)["w"]
    refused = device.send(nothing(delta), accepted=False)["w"]
    again = device.send(nothing(delta), accepted=True)["w"]
    np.testing.assert_array_equal(refused, again)
    assert not np.any((again != 0) & (first != 0))


def test_without_a_receipt_what_was_left_out_is_given_up(device: Device, delta: Arrays) -> None:
    device.send(delta, accepted=True)
    assert device.send(nothing(delta), accepted=None)["w"].any()
    assert not device.send(nothing(delta), accepted=True)["w"].any()


def test_a_private_round_and_another_do_not_mix(device: Device, delta: Arrays) -> None:
    device.send(delta, accepted=True, private=True)
    assert not device.send(nothing(delta), accepted=True, private=False)["w"].any()
    device.send(delta, accepted=True, private=False)
    assert not device.send(nothing(delta), accepted=True, private=True)["w"].any()


@pytest.mark.parametrize("change", [{"run": "1" * 16}, {"up_encoding": "topk:0.2"}])
def test_another_run_or_encoding_begins_afresh(device: Device, delta: Arrays, change: dict[str, str]) -> None:
    device.send(delta, accepted=True)
    device.plan = msgspec.structs.replace(device.plan, **change)
    assert not device.send(nothing(delta), accepted=True)["w"].any()


def test_an_encoding_without_state_in_between_ends_it(device: Device, delta: Arrays) -> None:
    device.send(delta, accepted=True)
    device.plan = msgspec.structs.replace(device.plan, up_encoding="sq:2")
    assert not device.send(nothing(delta), accepted=True)["w"].any()
    device.plan = msgspec.structs.replace(device.plan, up_encoding=SPEC)
    assert not device.send(nothing(delta), accepted=True)["w"].any()
