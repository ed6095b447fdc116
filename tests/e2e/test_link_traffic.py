"""What a link counts and how it keeps a cap, against real brokers and a relay that counts for itself."""

from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest
from brokers import Broker, Relay, until

from federation.wire.link import BrokerAddress, Connected, Disconnected, Inbox, Link, Message
from federation.wire.messages import Traffic
from federation.wire.rate import BURST_S, LEAST_RATE

pytestmark = pytest.mark.network

WAIT_S = 20.0
CHUNK = 96 * 1024
HEADERS = 64
"""More than what MQTT adds to one of these messages."""

MakeRelay = Callable[[Broker], Relay]


class Counted:
    """A link behind a relay of its own, and all that it was told."""

    def __init__(self, broker: Broker, relay: Relay, **options: Any) -> None:
        self.relay = relay
        self.inbox = Inbox()
        self.heard: list[object] = []
        suffix = f"?version={broker.version}" if broker.version else ""
        where = BrokerAddress.parse(f"mqtt://127.0.0.1:{relay.port}{suffix}")
        self.link = Link(where, f"counted-{relay.port}", on_event=self.inbox.put, retry_max_s=0.5, **options)
        self.link.start()

    def listen(self) -> list[object]:
        while (event := self.inbox.get(0)) is not None:
            self.heard.append(event)
        return self.heard

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.listen())

    def topics(self) -> list[str]:
        return [event.topic for event in self.listen() if isinstance(event, Message)]

    @property
    def agrees(self) -> bool:
        traffic = self.link.traffic
        return (traffic.sent_bytes, traffic.received_bytes) == (self.relay.up, self.relay.down)

    def settled(self, what: str) -> Traffic:
        """Wait until link and relay have counted the same, to the byte."""
        try:
            until(lambda: self.agrees, timeout_s=WAIT_S, what=what)
        except AssertionError as error:
            raise AssertionError(
                f"{what}: {self.link.traffic}, relay {self.relay.up} {self.relay.down}"
            ) from error
        return self.link.traffic


@pytest.fixture
def make_counted(make_relay: MakeRelay) -> Iterator[Callable[..., Counted]]:
    made: list[Counted] = []

    def make(broker: Broker, **options: Any) -> Counted:
        made.append(Counted(broker, make_relay(broker), **options))
        made[-1].link.wait_connected(WAIT_S)
        return made[-1]

    yield make
    for counted in made:
        counted.link.stop()


def test_every_byte_is_counted_over_all_connections(
    broker: Broker, make_counted: Callable[..., Counted]
) -> None:
    counted = make_counted(broker)
    link = counted.link
    link.subscribe([("small/#", 1), ("large/+", 0)])
    first = counted.settled("after the subscriptions")
    assert first.sent_bytes > 0
    assert first.received_bytes > 0
    assert first.sent_payload_bytes == first.received_payload_bytes == 0

    for index in range(20):
        assert link.publish(f"small/{index}", bytes(index), qos=index % 2)
    for index in range(20):
        link.publish_bulk(f"large/{index}", bytes(CHUNK), qos=0, timeout_s=WAIT_S)
    payload = sum(range(20)) + 20 * CHUNK
    until(lambda: len(counted.topics()) >= 40, timeout_s=WAIT_S, what="all came back")
    until(lambda: link.traffic.sent_payload_bytes == payload, timeout_s=WAIT_S, what="all acknowledged")
    second = counted.settled("after the messages")
    moved = second.since(first)
    assert moved.sent_payload_bytes == moved.received_payload_bytes == payload
    assert (
        payload < moved.sent_bytes < payload + 40 * HEADERS + 20 * HEADERS
    )  # messages, and their acknowledgements

    counted.relay.cut()
    until(lambda: counted.count(Connected) == 2, timeout_s=WAIT_S, what="connected again")
    third = counted.settled("after a reconnect")
    assert third.sent_bytes > second.sent_bytes
    assert third.received_bytes > second.received_bytes
    assert third.sent_payload_bytes == payload


def test_a_cap_holds_at_all_times_and_control_goes_first(
    make_broker: Callable[..., Broker], make_counted: Callable[..., Counted]
) -> None:
    rate, chunk, chunks = 200_000.0, 20_000, 30
    began = monotonic()
    counted = make_counted(make_broker("mosquitto"), max_rate=rate)
    link = counted.link
    link.subscribe([("chunk/+", 0), ("control", 0)])
    for index in range(chunks):
        assert link.publish(f"chunk/{index}", bytes(chunk), qos=0, yielding=True)
        assert link.publish(f"chunk/{index}", bytes(chunk), qos=0, yielding=True)  # asked for twice
    assert link.publish("control", b"", qos=0)

    def within_the_cap() -> bool:
        up = counted.relay.up  # read before the clock: later is only laxer
        elapsed = monotonic() - began
        assert up <= rate * (elapsed + BURST_S) + chunk + HEADERS
        return len(counted.topics()) >= chunks + 1

    until(within_the_cap, timeout_s=WAIT_S, what="all came back")
    topics = counted.topics()
    assert topics.index("control") < len(topics) - 1, "the last chunk came after it"
    assert sorted(topics) == sorted({*topics}), "what still waited was not queued twice"
    assert monotonic() - began >= chunks * chunk / rate - BURST_S - chunk / rate


def test_pings_go_on_while_a_large_packet_is_being_paid_for(
    make_broker: Callable[..., Broker], make_counted: Callable[..., Counted]
) -> None:
    counted = make_counted(make_broker("mosquitto"), max_rate=LEAST_RATE, keepalive_s=1)
    link = counted.link
    before = counted.settled("connected").sent_bytes
    assert link.publish("first", bytes(CHUNK), qos=0, yielding=True)
    assert link.publish("second", bytes(CHUNK), qos=0, yielding=True)
    # The first takes 49 s of the cap; a broker ends a connection that is silent for 1.5 s.
    until(lambda: link.traffic.sent_bytes >= before + CHUNK + 4 * 2, timeout_s=WAIT_S, what="four pings")
    assert link.traffic.sent_bytes < before + 2 * CHUNK, "the second waits"
    assert counted.count(Disconnected) == 0
    assert link.connected


def test_last_words_do_not_wait_for_the_cap(
    make_broker: Callable[..., Broker], make_counted: Callable[..., Counted]
) -> None:
    broker = make_broker("mosquitto")
    listener, counted = make_counted(broker), make_counted(broker, max_rate=LEAST_RATE)
    listener.link.subscribe([("farewell", 1)])
    listener.settled("subscribed")
    counted.link.publish("chunk", bytes(CHUNK), qos=0, yielding=True)
    until(lambda: counted.link.traffic.sent_bytes > CHUNK, timeout_s=WAIT_S, what="in debt for 49 s")
    counted.link.stop([("farewell", b"bye", 1, False)])
    until(lambda: listener.topics() == ["farewell"], timeout_s=WAIT_S, what="heard")
