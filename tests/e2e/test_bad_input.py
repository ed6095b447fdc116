"""Offenders against a real aggregator: each is refused with its code, and the round goes on without it."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from brokers import Broker
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from devices import CHUNK_BYTES, Delta, Device, frame, noise
from processes import FEDERATION, TINY_SHAPES, TINY_TASK, Federation, Process, begin_tiny_run

from aggregator.enrolment import Enrolment
from federation.bundle import Bundle
from federation.errors import Rejection
from federation.wire.codec import max_encoded_bytes
from federation.wire.link import BrokerAddress
from federation.wire.messages import CHUNK_DIGEST_BYTES, Receipt, RoundPlan, UpdateOffer
from federation.wire.transfer import make_ref

pytestmark = pytest.mark.network

GOOD, BAD = ("good-1", "good-2"), ("bad-1", "bad-2", "bad-3", "bad-4")
"""No two tests let the same offender be refused with the same code: of such, one a second goes to the store."""

ROUNDS = (
    *("--rounds", 1000, "--min-agents", 2, "--cohort-size", len(GOOD) + len(BAD), "--deadline", 60),
    *("--set", "rounds.gather_s=600", "--set", "rounds.quorum=0.4", "--set", "rounds.max_samples=1000"),
    *(
        "--up-encoding",
        "float32",
        "--set",
        "rounds.max_update_norm=1000",
        "--set",
        f"broker.chunk_bytes={CHUNK_BYTES}",
    ),
)


@dataclass
class Arena:
    """A running federation of devices that the tests steer, on one broker."""

    federation: Federation
    server: Process
    devices: dict[str, Device]
    outsider: Device

    def fresh_round(self) -> RoundPlan:
        """A round to which nobody has delivered yet: an earlier test may have left one half done."""
        while True:
            plan = self.devices[GOOD[0]].in_round()
            row = self.federation.round(plan.round)
            assert row is not None
            if row.phase == "open" and not row.delivered and plan.round not in self._touched:
                self._touched.add(plan.round)
                for device in self.devices.values():
                    device.in_round(plan.round)
                return plan
            self.complete(plan)

    def __post_init__(self) -> None:
        self._touched: set[int] = set()

    def honest(self, name: str, plan: RoundPlan) -> tuple[UpdateOffer, bytes]:
        data = frame(noise(TINY_SHAPES, name, plan.round))
        return self.devices[name].offer(plan, data), data

    def complete(self, plan: RoundPlan, *, without: tuple[str, ...] = ()) -> None:
        """Everybody else delivers; the round closes without waiting for the offenders' deadline."""
        for name, device in self.devices.items():
            if name not in without:
                device.deliver(*self.honest(name, plan))
        self.federation.until(lambda: self.federation.closed(plan.round), f"round {plan.round} closes", 20)
        self.devices[GOOD[0]].in_round(plan.round + 1)
        assert self.server.alive(), self.server.tail

    def completes_without(self, *offenders: str, plan: RoundPlan) -> None:
        self.complete(plan, without=offenders)
        assert self.federation.delivered(plan.round) == len(self.devices) - len(offenders)

    def refusals(self, agent: str, *, since: int = 0) -> set[str]:
        """Codes in the store, as `aggregator status` shows them."""
        rows = self.federation.report().refusals
        return {row["code"] for row in rows if row["agent"] == agent and row["round"] >= since}

    def until_refused(self, agent: str, code: Rejection) -> None:
        """In any round: a code that an agent was refused with less than a second ago is not written again."""
        self.federation.until(lambda: code in self.refusals(agent), f"{agent} is refused: {code}", 20)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    federation = Federation(tmp_path_factory.mktemp("arena"), "embedded")
    devices: dict[str, Device] = {}
    try:
        begin_tiny_run(federation.state)
        bundles = {name: federation.enroll(name) for name in (*GOOD, *BAD, "outsider")}
        server = federation.serve(*TINY_TASK, *ROUNDS)
        server.until_logged("broker_connected")
        outsider = Device(bundles.pop("outsider"), announce=False).connected()
        devices = {name: Device(bundle).connected() for name, bundle in bundles.items()}
        yield Arena(federation, server, devices, outsider)
        outsider.stop()
    finally:
        for device in devices.values():
            device.stop()
        federation.close()


def assert_refused(receipt: Receipt, code: Rejection) -> None:
    assert (receipt.accepted, receipt.code) == (False, code)
    assert receipt.detail, "a refusal says what is wrong"


@dataclass(frozen=True)
class AtTheDoor:
    """An offer that is refused before a byte of the update is sent."""

    code: Rejection
    change: Callable[[UpdateOffer, RoundPlan], dict[str, Any]]
    agent: str = BAD[0]
    final: bool = True
    """The agent is out of this round. False: it was about another one, and this one still waits for it."""


def too_long(_: UpdateOffer, plan: RoundPlan) -> dict[str, Any]:
    length = max_encoded_bytes(TINY_SHAPES, plan.up_encoding) + 1
    chunks = -(-length // CHUNK_BYTES)
    ref = msgspec.structs.replace(
        make_ref(bytes(length), CHUNK_BYTES), digests=secrets.token_bytes(chunks * CHUNK_DIGEST_BYTES)
    )
    return {"object": ref}


AT_THE_DOOR = {
    "stale round": AtTheDoor(Rejection.STALE_ROUND, lambda offer, _: {"round": offer.round - 1}, final=False),
    "future round": AtTheDoor(
        Rejection.FUTURE_ROUND, lambda offer, _: {"round": offer.round + 1}, final=False
    ),
    "another run": AtTheDoor(Rejection.WRONG_RUN, lambda _, __: {"run": secrets.token_hex(8)}, final=False),
    "another base": AtTheDoor(Rejection.WRONG_BASE, lambda _, __: {"base": secrets.token_hex(32)}),
    "another encoding": AtTheDoor(Rejection.WRONG_ENCODING, lambda _, __: {"encoding": "int8"}),
    "too many samples": AtTheDoor(Rejection.BAD_SAMPLE_COUNT, lambda _, __: {"samples": 1001}),
    "a length that lies": AtTheDoor(Rejection.WRONG_LENGTH, too_long),
    "larger chunks than allowed": AtTheDoor(
        Rejection.WRONG_LENGTH, lambda _, __: {"object": make_ref(bytes(4096), 2048)}, agent=BAD[1]
    ),
}


@pytest.mark.parametrize("case", AT_THE_DOOR.values(), ids=AT_THE_DOOR)
def test_a_bad_offer_is_refused_before_a_byte_is_sent(arena: Arena, case: AtTheDoor) -> None:
    plan = arena.fresh_round()
    if plan.round == 1:  # there is no earlier round to be stale
        arena.complete(plan)
        plan = arena.fresh_round()
    device = arena.devices[case.agent]
    offer, _ = arena.honest(case.agent, plan)
    lie = msgspec.structs.replace(offer, **case.change(offer, plan))
    device.send_offer(lie)
    assert_refused(device.receipt(lie), case.code)
    assert not device.asked, "nothing of it was asked for"
    arena.until_refused(case.agent, case.code)
    arena.completes_without(*((case.agent,) if case.final else ()), plan=plan)


def with_last_value(value: float) -> Callable[[Delta], bytes]:
    """Our encoder refuses such numbers, so they are put into the frame."""
    return lambda delta: frame(delta)[:-4] + np.float32(value).tobytes()


def without(name: str) -> Callable[[Delta], bytes]:
    return lambda delta: frame({key: array for key, array in delta.items() if key != name})


def with_also(name: str, array: np.ndarray) -> Callable[[Delta], bytes]:
    return lambda delta: frame(dict(sorted({**delta, name: array}.items())))


CONTENT: dict[str, tuple[Rejection, str, Callable[[Delta], bytes]]] = {
    "missing tensor": (Rejection.MISSING_TENSOR, BAD[0], without("bias")),
    # In place of as many values of "weight": a longer update would be refused for its length already.
    "extra tensor": (
        Rejection.EXTRA_TENSOR,
        BAD[0],
        lambda delta: frame({**delta, "weight": delta["weight"][1:], "x": delta["weight"][0, :20].copy()}),
    ),
    "wrong shape": (
        Rejection.WRONG_SHAPE,
        BAD[0],
        with_also("weight", np.zeros((60, 16), np.float32)),
    ),
    "NaN": (Rejection.NON_FINITE, BAD[0], with_last_value(float("nan"))),
    "infinite": (Rejection.NON_FINITE, BAD[1], with_last_value(float("inf"))),
    "truncated": (Rejection.WRONG_LENGTH, BAD[2], lambda delta: frame(delta)[:-8]),
    "random bytes": (Rejection.MALFORMED, BAD[0], lambda delta: secrets.token_bytes(len(frame(delta)))),
    "drowns the others": (
        Rejection.NORM_TOO_LARGE,
        BAD[0],
        lambda delta: frame({key: 1000 * array for key, array in delta.items()}),
    ),
}


@pytest.mark.parametrize(("code", "name", "spoil"), CONTENT.values(), ids=CONTENT)
def test_bad_content_is_refused_and_nobody_waits_for_the_offender(
    arena: Arena, code: Rejection, name: str, spoil: Callable[[Delta], bytes]
) -> None:
    plan = arena.fresh_round()
    device = arena.devices[name]
    data = spoil(noise(TINY_SHAPES, name, plan.round))
    assert_refused(device.deliver(device.offer(plan, data), data), code)
    arena.until_refused(name, code)
    arena.completes_without(name, plan=plan)


def test_a_bit_flip_is_asked_for_again_and_then_accepted(arena: Arena) -> None:
    plan = arena.fresh_round()
    device = arena.devices[BAD[0]]
    offer, data = arena.honest(BAD[0], plan)
    device.send_offer(offer)
    first = device.credit(offer)
    flipped = bytearray(data[:CHUNK_BYTES])
    flipped[17] ^= 0x20
    device.send_bytes(offer, 0, bytes(flipped))
    for index in first.chunks[1:]:
        device.send_chunk(offer, data, index)
    assert device.credit(offer).chunks == (0,)
    arena.until_refused(BAD[0], Rejection.WRONG_HASH)
    device.send_chunk(offer, data, 0)
    assert device.receipt(offer).accepted
    arena.completes_without(plan=plan)


def test_a_chunk_longer_than_announced_is_not_written(arena: Arena) -> None:
    plan = arena.fresh_round()
    device = arena.devices[BAD[3]]
    offer, data = arena.honest(BAD[3], plan)
    device.send_offer(offer)
    credit = device.credit(offer)
    for index in credit.chunks:
        device.send_bytes(offer, index, bytes(CHUNK_BYTES + 1))
    arena.until_refused(BAD[3], Rejection.WRONG_LENGTH)
    assert device.credit(offer).chunks[0] in credit.chunks, "it is asked for again"
    assert device.deliver(offer, data).accepted
    arena.completes_without(plan=plan)


def test_chunks_that_nobody_asked_for_are_ignored(arena: Arena) -> None:
    plan = arena.fresh_round()
    device = arena.devices[BAD[0]]
    offer, data = arena.honest(BAD[0], plan)
    for index in range(offer.object.chunks):
        device.send_chunk(offer, data, index)
    device.send_offer(offer)
    credit = device.credit(offer)
    assert credit.chunks == tuple(range(offer.object.chunks)), "what came before the offer was not kept"
    device.send_bytes(offer, 4095, b"beyond the end")
    assert device.deliver(offer, data).accepted
    arena.completes_without(plan=plan)


def test_a_replayed_offer_gets_the_same_receipt_and_counts_once(arena: Arena) -> None:
    plan = arena.fresh_round()
    device = arena.devices[BAD[0]]
    offer, data = arena.honest(BAD[0], plan)
    receipt = device.deliver(offer, data)
    assert receipt.accepted
    for _ in range(3):
        device.send_offer(offer)
        assert device.receipt(offer) == receipt
    assert not device.asked
    assert arena.federation.delivered(plan.round) == 1
    arena.completes_without(plan=plan)
    next_plan = device.in_round(plan.round + 1)
    device.send_offer(offer)
    assert_refused(device.receipt(offer), Rejection.STALE_ROUND)
    assert arena.federation.delivered(next_plan.round) == 0


def test_a_second_different_update_is_a_duplicate(arena: Arena) -> None:
    plan = arena.fresh_round()
    device = arena.devices[BAD[0]]
    assert device.deliver(*arena.honest(BAD[0], plan)).accepted
    data = frame(noise(TINY_SHAPES, "something else", plan.round))
    second = device.offer(plan, data)
    assert_refused(device.deliver(second, data), Rejection.DUPLICATE)
    arena.until_refused(BAD[0], Rejection.DUPLICATE)
    arena.completes_without(plan=plan)  # its first update still counts


def test_an_agent_that_was_not_invited_is_refused(arena: Arena) -> None:
    plan = arena.fresh_round()
    outsider = arena.outsider
    outsider.in_round(plan.round)
    data = frame(noise(TINY_SHAPES, "outsider", plan.round))
    offer = outsider.offer(plan, data)
    assert_refused(outsider.deliver(offer, data), Rejection.NOT_IN_COHORT)
    arena.until_refused("outsider", Rejection.NOT_IN_COHORT)
    arena.completes_without(plan=plan)


def test_an_offer_signed_by_another_key_gets_no_answer_and_harms_nobody(arena: Arena) -> None:
    plan = arena.fresh_round()
    device = arena.devices[BAD[0]]
    offer, data = arena.honest(BAD[0], plan)
    device.link.publish(
        device.topics.offer(BAD[0]), device.seal(offer, key=Ed25519PrivateKey.generate()), qos=1
    )
    arena.until_refused(BAD[0], Rejection.BAD_SIGNATURE)
    # A receipt would make the owner of the name drop an update that it really has.
    assert device.deliver(offer, data).accepted
    arena.completes_without(plan=plan)


def test_the_broker_keeps_an_agent_off_the_topics_of_another(arena: Arena) -> None:
    plan = arena.fresh_round()
    device = arena.devices[BAD[0]]
    offer, _ = arena.honest(BAD[0], plan)
    for topic in (device.topics.offer(GOOD[0]), device.topics.upload_chunk(GOOD[0], offer.object.sha256, 0)):
        device.link.publish(topic, device.seal(offer), qos=1)
    device.link.publish(
        device.topics.state(GOOD[0]), b'{"state":"offline","session":"0000000000000000"}', qos=1
    )
    arena.completes_without(plan=plan)  # each message was behind those three on the same connection
    assert not arena.refusals(GOOD[0], since=plan.round)


def test_garbage_on_every_topic_is_survived(arena: Arena) -> None:
    plan = arena.fresh_round()
    device = arena.devices[BAD[1]]
    topics = device.topics
    offer, data = arena.honest(BAD[1], plan)
    device.send_offer(offer)
    device.credit(offer)
    garbage = [
        b"",
        b"\x00",
        b"{}",
        b"[" * 5000,
        b"\x93" * 5000,
        *(secrets.token_bytes(size) for size in (7, 700, 7000)),
    ]
    targets = [
        topics.offer(BAD[1]),
        topics.state(BAD[1]),
        topics.telemetry(BAD[1]),
        topics.upload_chunk(BAD[1], offer.object.sha256, 0),
        topics.upload_chunk(BAD[1], "0" * 64, 0),
        topics.upload_chunk(BAD[1], offer.object.sha256, 99999),
        f"{topics.prefix}/agent/{BAD[1]}/up/not-a-hash/x",
        f"{topics.prefix}/agent/{BAD[1]}/up/a/b/c/d",
    ]
    for topic in targets:
        for payload in garbage:
            device.link.publish(topic, payload, qos=1)
    arena.until_refused(BAD[1], Rejection.MALFORMED)
    assert device.deliver(offer, data).accepted
    arena.completes_without(plan=plan)


def test_without_rights_on_the_broker_signatures_still_hold(
    make_broker: Callable[..., Broker], make_federation: Callable[..., Federation]
) -> None:
    """A broker that lets everybody write everything: identities are checked by the aggregator, not by the broker."""
    federation = make_federation("embedded")
    broker = make_broker("mosquitto")
    federation.url = broker.url
    begin_tiny_run(federation.state)
    enrolment = Enrolment(federation.state, FEDERATION)
    a, b = (enrolment.enroll(name, broker_url=broker.url) for name in ("a", "b"))
    server = federation.serve(
        "--broker", broker.url, *TINY_TASK, *ROUNDS, "--min-agents", 2, "--cohort-size", 2
    )
    server.until_logged("broker_connected")
    devices = [Device(bundle, where=_anonymous(bundle)).connected() for bundle in (a, b)]
    try:
        plan = devices[0].in_round(1)
        honest, data = _honest(devices[0], plan)
        # b speaks on a's topic: as itself, and under a's name with its own key.
        topic = devices[0].topics.offer("a")
        devices[1].link.publish(topic, devices[1].seal(honest), qos=1)
        devices[1].link.publish(topic, devices[0].seal(honest, key=devices[1].key), qos=1)
        expected = {Rejection.WRONG_SENDER, Rejection.BAD_SIGNATURE}
        federation.until(
            lambda: expected <= {row["code"] for row in federation.report().refusals if row["agent"] == "a"},
            "both are refused",
            20,
        )
        assert federation.delivered(1) == 0
        # And in the name of somebody whom nobody has enrolled.
        devices[1].link.publish(devices[1].topics.offer("nobody"), devices[1].seal(honest), qos=1)
        assert devices[0].deliver(honest, data).accepted
        devices[1].in_round(1)
        assert devices[1].deliver(*_honest(devices[1], plan)).accepted
        federation.until(lambda: federation.closed(1), "round 1 closes", 20)
        assert Rejection.UNKNOWN_AGENT in federation.report().refusal_counts
    finally:
        for device in devices:
            device.stop()


def _honest(device: Device, plan: RoundPlan) -> tuple[UpdateOffer, bytes]:
    data = frame(noise(TINY_SHAPES, device.name, plan.round))
    return device.offer(plan, data), data


def _anonymous(bundle: Bundle) -> BrokerAddress:
    return BrokerAddress.parse(bundle.broker)
