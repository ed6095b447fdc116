"""A device without torch: a real link, a real identity, and updates made up from random numbers."""

import secrets
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from federation.bundle import Bundle, address
from federation.wire.codec import encode
from federation.wire.link import BrokerAddress, Connected, Inbox, Link, Message, Will
from federation.wire.messages import (
    AgentState,
    Capabilities,
    Credit,
    IdlePlan,
    ObjectRef,
    Receipt,
    RoundPlan,
    TrainMetrics,
    UpdateOffer,
    decode_msgpack,
    encode_json,
)
from federation.wire.signing import AGGREGATOR, Purpose, private_key, public_key, seal, unseal
from federation.wire.topics import Topics
from federation.wire.transfer import check_chunk, chunk_span, make_ref

DEADLINE_S = 30.0
REPEAT_S = 1.0
"""After so long without an answer an offer is made again, as a real agent does."""

CHUNK_BYTES = 1024

Delta = dict[str, NDArray[np.float32]]

_CAPABLE = Capabilities(
    version="test",
    device="cpu",
    threads=1,
    memory_mb=1,
    samples=100,
    encodings=("float32", "float16", "int8", "sq"),
    platform="test",
)


def noise(shapes: Mapping[str, tuple[int, ...]], agent: str, number: int) -> Delta:
    """What this agent has "learned" in this round: the same each time."""
    rng = np.random.default_rng([number, *agent.encode()])
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in sorted(shapes.items())}


def frame(delta: Delta) -> bytes:
    return encode(delta, "float32", np.random.default_rng(0))


class Device:
    """Takes part in rounds as its owner says, step by step, in the owner's thread.

    Args:
        bundle: Its identity.
        where: The broker, if not the bundle's.
        announce: Whether it says that it can train, and so is invited.
    """

    def __init__(self, bundle: Bundle, *, where: BrokerAddress | None = None, announce: bool = True) -> None:
        self.name = bundle.agent
        self.topics = Topics(bundle.federation)
        self.key: Ed25519PrivateKey = private_key(bundle.private_key)
        self._aggregator = public_key(bundle.aggregator_key)
        self._announce = announce
        self._birth = AgentState(state="online", session=secrets.token_hex(8), capabilities=_CAPABLE)
        death = msgspec.structs.replace(self._birth, state="offline", capabilities=None)
        self._death = encode_json(death)
        self._inbox = Inbox()
        self.connects = 0
        self.plan: RoundPlan | IdlePlan | None = None
        self.asked: deque[Credit] = deque()
        self.receipts: list[Receipt] = []
        self._chunks: dict[int, bytes] = {}
        self.link = Link(
            where or address(bundle),
            f"{self.name}-{self._birth.session}",
            on_event=self._inbox.put,
            will=Will(self.topics.state(self.name), self._death) if announce else None,
            retry_max_s=0.5,
        )
        self.link.start()

    def connected(self) -> "Device":
        """Wait until it is connected and has announced itself."""
        self.until(lambda: self.connects > 0, "the broker")
        return self

    def reconnected(self, connects: int) -> None:
        """Wait until it is connected once more than ``connects`` times."""
        self.until(lambda: self.connects > connects, "the broker again")

    def stop(self) -> None:
        """Say goodbye."""
        self.link.stop([(self.topics.state(self.name), self._death, 1, True)] if self._announce else [])

    def step(self, timeout_s: float = 0.05) -> None:
        """Take one event, if there is one."""
        match self._inbox.get(timeout_s):
            case Connected():
                self.connects += 1
                if self._announce:
                    self.link.publish(
                        self.topics.state(self.name), encode_json(self._birth), qos=1, retain=True
                    )
                self.link.subscribe([(self.topics.down(self.name), 1), (self.topics.plan, 1)])
            case Message(topic=topic, payload=payload):
                self._message(topic, payload)
            case _:
                pass

    def until(self, ready: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Take events until it is so."""
        deadline = monotonic() + timeout_s
        while not ready():
            assert monotonic() < deadline, f"{self.name} never saw: {what}; plan {self.plan}, {self.receipts}"
            self.step()

    def in_round(self, number: int = 0) -> RoundPlan:
        """Wait for the plan of that round (0: any that is open)."""

        def arrived() -> bool:
            return isinstance(self.plan, RoundPlan) and number in (0, self.plan.round)

        self.until(arrived, f"plan of round {number}")
        assert isinstance(self.plan, RoundPlan)
        return self.plan

    def fetch(self, ref: ObjectRef) -> bytes:
        """Download an object as any device may: every chunk checked."""
        self.link.subscribe([(self.topics.object_chunk(ref.sha256, index), 0) for index in range(ref.chunks)])
        self.until(lambda: len(self._chunks) == ref.chunks, f"{ref.chunks} chunks of {ref.sha256[:12]}")
        for index, payload in self._chunks.items():
            check_chunk(ref, index, payload)
        return b"".join(self._chunks[index] for index in range(ref.chunks))

    def offer(self, plan: RoundPlan, data: bytes, *, samples: int = 10) -> UpdateOffer:
        """An honest offer of ``data``."""
        return UpdateOffer(
            run=plan.run,
            round=plan.round,
            base=plan.base,
            object=make_ref(data, CHUNK_BYTES),
            encoding=plan.up_encoding,
            samples=samples,
            metrics=TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=0.1),
        )

    def seal(self, offer: UpdateOffer, *, key: Ed25519PrivateKey | None = None) -> bytes:
        """Sign an offer; with another key to forge one."""
        return seal(
            offer,
            purpose=Purpose.AGENT,
            federation=self.topics.federation,
            sender=self.name,
            key=key or self.key,
        )

    def send_offer(self, offer: UpdateOffer) -> None:
        self.link.publish(self.topics.offer(self.name), self.seal(offer), qos=1)

    def send_chunk(self, offer: UpdateOffer, data: bytes, index: int) -> None:
        """Send the right bytes of a chunk."""
        offset, length = chunk_span(offer.object, index)
        self.send_bytes(offer, index, data[offset : offset + length])

    def send_bytes(self, offer: UpdateOffer, index: int, payload: bytes) -> None:
        """Send whatever bytes as a chunk."""
        self.link.publish(self.topics.upload_chunk(self.name, offer.object.sha256, index), payload, qos=0)

    def credit(self, offer: UpdateOffer) -> Credit:
        """Wait until the aggregator asks for chunks of this object."""
        while True:
            self.until(lambda: bool(self.asked), f"credit for {offer.object.sha256[:12]}")
            credit = self.asked.popleft()
            if credit.sha256 == offer.object.sha256:
                return credit

    def offer_until_asked(self, offer: UpdateOffer) -> Credit:
        """Offer, again and again as a real agent does, until the aggregator asks for chunks of this object."""
        deadline, due = monotonic() + DEADLINE_S, 0.0
        while not any(credit.sha256 == offer.object.sha256 for credit in self.asked):
            assert monotonic() < deadline, f"{self.name}: nobody asked for its update of round {offer.round}"
            if monotonic() >= due:
                due = monotonic() + REPEAT_S
                self.send_offer(offer)
            self.step()
        return self.credit(offer)

    def receipt(self, offer: UpdateOffer) -> Receipt:
        """Wait for the next receipt for this object."""
        found: list[Receipt] = []

        def arrived() -> bool:
            found.extend(receipt for receipt in self.receipts if receipt.sha256 == offer.object.sha256)
            return bool(found)

        self.until(arrived, f"receipt for {offer.object.sha256[:12]}")
        self.receipts.remove(found[0])
        return found[0]

    def deliver(self, offer: UpdateOffer, data: bytes, timeout_s: float = DEADLINE_S) -> Receipt:
        """Offer, send what is asked for, and repeat the offer, until there is a receipt."""
        deadline = monotonic() + timeout_s
        connects, due = self.connects, 0.0
        while not any(receipt.sha256 == offer.object.sha256 for receipt in self.receipts):
            assert monotonic() < deadline, f"{self.name}: no receipt for round {offer.round}"
            if monotonic() >= due or self.connects != connects:
                connects, due = self.connects, monotonic() + REPEAT_S
                self.send_offer(offer)
            self.step()
            while self.asked:
                credit = self.asked.popleft()
                due = monotonic() + REPEAT_S
                if credit.sha256 == offer.object.sha256:
                    for index in credit.chunks:
                        self.send_chunk(offer, data, index)
        return self.receipt(offer)

    def _message(self, topic: str, payload: bytes) -> None:
        federation = self.topics.federation
        chunk = self.topics.parse_object_chunk(topic)
        if chunk is not None:
            self._chunks[chunk[1]] = payload
        elif topic == self.topics.plan:
            plan: RoundPlan | IdlePlan = unseal(
                payload,
                RoundPlan | IdlePlan,  # type: ignore[arg-type]  # msgspec takes a union of tagged structs
                purpose=Purpose.PLAN,
                federation=federation,
                sender=AGGREGATOR,
                key=self._aggregator,
            )
            if self.plan is None or plan.round >= self.plan.round:  # else an older one came late
                self.plan = plan
        elif topic == self.topics.credit(self.name):
            self.asked.append(decode_msgpack(payload, Credit))
        elif topic == self.topics.receipt(self.name):
            self.receipts.append(
                unseal(
                    payload,
                    Receipt,
                    purpose=Purpose.RECEIPT,
                    federation=federation,
                    sender=AGGREGATOR,
                    key=self._aggregator,
                )
            )
