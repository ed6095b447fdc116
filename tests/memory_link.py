"""A broker in memory, and links to it with the interface of ``federation.wire.link``: no sockets, bad weather on demand.

It does what MQTT does (wildcards, retained messages, wills, clean sessions, both QoS) and delivers in the publisher's
thread. Weather falls on what the protocol claims to repair: chunks, offers, credits and receipts. Retained plans and
states travel at QoS 1 and are lost with a connection only, see :meth:`MemoryBroker.cut`.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from paho.mqtt.client import topic_matches_sub

from federation.errors import TransportError
from federation.wire.address import BrokerAddress
from federation.wire.connection import Will
from federation.wire.inbox import Connected, Disconnected, Limits, LinkEvent, Message
from federation.wire.messages import Traffic

ADDRESS = BrokerAddress.parse("mqtt://127.0.0.1:1")
"""Goes into constructors; nobody listens there."""

HEADER_BYTES = 10


@dataclass(frozen=True)
class Weather:
    """Probabilities, per message and receiver, in [0, 1]."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0


@dataclass
class MemoryBroker:
    """Routes messages between the links that it makes."""

    weather: Weather = field(default_factory=Weather)
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    retained: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Every publish: client id, topic, payload."""

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(self.seed)
        self.links: list[MemoryLink] = []

    def make_link(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        on_event: Callable[[LinkEvent], None],
        will: Will | None = None,
        max_rate: float | None = None,
    ) -> "MemoryLink":
        """What ``Link`` is to a real broker. Memory has no rate to cap."""
        assert isinstance(address, BrokerAddress)
        assert max_rate is None or max_rate > 0
        link = MemoryLink(self, client_id, on_event, will)
        self.links.append(link)
        return link

    def links_of(self, part: str) -> "list[MemoryLink]":
        """Connected links whose client id contains ``part``."""
        return [link for link in self.links if part in link.client_id and link.connected]

    def cut(self, link: "MemoryLink") -> None:
        """Break a link as a network does: what is held back is lost, and the will is published."""
        with self.lock:
            if not link.connected:
                return
            link.leave()
            if link.will is not None:
                will = link.will
                self.route(link.client_id, will.topic, will.payload, qos=will.qos, retain=will.retain)
            link.on_event(Disconnected("the cable was cut", refused=False))

    def restore(self, link: "MemoryLink") -> None:
        """Mend it: a clean session."""
        with self.lock:
            if not link.ended:
                link.join()

    def crash(self) -> None:
        """Forget everything and break all links without a will, as a killed broker does; then come back."""
        with self.lock:
            present = [link for link in self.links if link.connected]
            self.retained.clear()
            for link in present:
                link.leave()
                link.on_event(Disconnected("the broker was killed", refused=False))
            for link in present:
                link.join()

    def route(self, client_id: str, topic: str, payload: bytes, *, qos: int, retain: bool) -> None:
        with self.lock:
            self.log.append((client_id, topic, payload))
            if retain and payload:
                self.retained[topic] = payload
            elif retain:
                self.retained.pop(topic, None)
            for link in self.links:
                granted = link.granted(topic)
                if granted is not None:
                    self.deliver(link, Message(topic, payload, retain=False), min(qos, granted))

    def deliver(self, link: "MemoryLink", message: Message, qos: int) -> None:
        if qos and not any(f"/{branch}/" in message.topic for branch in ("up", "down")):
            link.hear(message)
            return
        weather, chance = self.weather, self.random.random
        if chance() < weather.drop:
            return
        if message.payload and chance() < weather.corrupt:
            message = Message(message.topic, self.flipped(message.payload), message.retain)
        if chance() < weather.reorder:
            link.held.append(message)
            return
        for _ in range(2 if chance() < weather.duplicate else 1):
            link.hear(message)
        while link.held:
            link.hear(link.held.pop())

    def flipped(self, payload: bytes) -> bytes:
        damaged = bytearray(payload)
        damaged[self.random.randrange(len(damaged))] ^= 1 << self.random.randrange(8)
        return bytes(damaged)


class MemoryLink:
    """One client of a :class:`MemoryBroker`; a ``LinkLike``."""

    def __init__(
        self, broker: MemoryBroker, client_id: str, on_event: Callable[[LinkEvent], None], will: Will | None
    ) -> None:
        self.broker, self.client_id, self.on_event, self.will = broker, client_id, on_event, will
        self.filters: dict[str, int] = {}
        self.held: list[Message] = []
        self.ended = False
        self.heard: list[tuple[str, int]] = []
        """Topic and payload bytes of every message that was delivered."""
        self.sent_bytes = self.received_bytes = self.sent_payload_bytes = self.received_payload_bytes = 0
        self._connected = False

    # --- what the owner calls -------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def limits(self) -> Limits:
        return self.broker.limits

    @property
    def traffic(self) -> Traffic:
        with self.broker.lock:
            return Traffic(
                sent_bytes=self.sent_bytes,
                received_bytes=self.received_bytes,
                sent_payload_bytes=self.sent_payload_bytes,
                received_payload_bytes=self.received_payload_bytes,
            )

    @property
    def waiting(self) -> int:
        return 0  # memory takes everything at once

    def start(self) -> None:
        with self.broker.lock:
            self.join()

    def wait_connected(self, timeout_s: float) -> None:
        if not self._connected:
            raise TransportError(f"not connected after {timeout_s} s")

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, yielding: bool = False
    ) -> bool:
        assert not (yielding and retain), "a chunk of an upload is not kept"
        size = self._check_size(topic, payload)
        with self.broker.lock:
            if not self._connected:
                return False
            self.sent_bytes += size
            self.sent_payload_bytes += len(payload)
            self.broker.route(self.client_id, topic, payload, qos=qos, retain=retain)
        return True

    def drop_waiting(self) -> None:
        assert not self.waiting

    def publish_bulk(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, timeout_s: float
    ) -> None:
        if not self.publish(topic, payload, qos=qos, retain=retain):
            raise TransportError(f"not connected: {topic} was not sent within {timeout_s} s")

    def flush(self, timeout_s: float) -> None:
        if not self.connected:
            raise TransportError(f"not connected: nothing was acknowledged within {timeout_s} s")

    def subscribe(self, filters: Sequence[tuple[str, int]]) -> bool:
        with self.broker.lock:
            if not self._connected:
                return False
            for pattern, qos in filters:
                self.filters[pattern] = qos
                for topic, payload in list(self.broker.retained.items()):
                    if topic_matches_sub(pattern, topic):
                        self.broker.deliver(self, Message(topic, payload, retain=True), qos)
        return True

    def unsubscribe(self, filters: Sequence[str]) -> bool:
        with self.broker.lock:
            for pattern in filters:
                self.filters.pop(pattern, None)
            return self._connected

    def stop(self, last: Sequence[tuple[str, bytes, int, bool]] = ()) -> None:
        with self.broker.lock:
            for topic, payload, qos, retain in last:
                self.publish(topic, payload, qos=qos, retain=retain)
            self.leave()
            self.ended = True

    # --- what the broker calls, holding its lock ------------------------------------------------------------------

    def join(self) -> None:
        self._connected = True
        self.on_event(Connected(self.broker.limits))

    def leave(self) -> None:
        self._connected = False
        self.filters.clear()
        self.held.clear()

    def granted(self, topic: str) -> int | None:
        if not self._connected:
            return None
        return max(
            (qos for pattern, qos in self.filters.items() if topic_matches_sub(pattern, topic)), default=None
        )

    def hear(self, message: Message) -> None:
        self.heard.append((message.topic, len(message.payload)))
        self.received_bytes += len(message.topic.encode()) + len(message.payload) + HEADER_BYTES
        self.received_payload_bytes += len(message.payload)
        self.on_event(message)

    def _check_size(self, topic: str, payload: bytes) -> int:
        size = len(topic.encode()) + len(payload) + HEADER_BYTES
        if size > self.limits.max_packet_bytes:
            raise TransportError(f"{size} bytes, the broker takes {self.limits.max_packet_bytes}")
        return size
