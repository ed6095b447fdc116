"""The link against real brokers: mosquitto over MQTT 5 and 3.1.1, and nats-server."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

import pytest
from brokers import Broker, Certificates, Kind, Relay, free_port, until

from federation.errors import BrokerRefusedError, TransportError
from federation.wire.link import (
    BrokerAddress,
    Connected,
    Disconnected,
    Inbox,
    Link,
    LinkFailed,
    Message,
    Will,
)

pytestmark = pytest.mark.network

CHUNK = 96 * 1024
_marks = itertools.count()
WAIT_S = 20.0

MakeBroker = Callable[..., Broker]
E = TypeVar("E")


class Peer:
    """A link with its inbox."""

    def __init__(self, address: BrokerAddress, client_id: str, **options: Any) -> None:
        self.inbox = Inbox()
        self.link = Link(address, client_id, on_event=self.inbox.put, retry_max_s=1.0, **options)
        self.link.start()

    def up(self) -> "Peer":
        self.link.wait_connected(WAIT_S)
        self.next(Connected)
        return self

    def next(self, kind: type[E], *, timeout_s: float = WAIT_S) -> E:
        """The next event of a kind; the others before it are skipped."""
        deadline = monotonic() + timeout_s
        seen: list[object] = []
        while (remaining := deadline - monotonic()) > 0:
            event = self.inbox.get(remaining)
            if isinstance(event, kind):
                return event
            seen.append(event)
        raise AssertionError(f"no {kind.__name__} within {timeout_s} s, only {seen[-5:]}")

    def message(self, topic: str) -> Message:
        """The next message on a topic."""
        while (message := self.next(Message)).topic != topic:
            pass
        return message

    def subscribed(self, *filters: str, qos: int = 1) -> "Peer":
        """Subscribe and come back when the broker has it: a mark of our own returns behind it."""
        mark = f"mark/{next(_marks)}"
        assert self.link.subscribe([*((name, qos) for name in filters), (mark, 1)])
        assert self.link.publish(mark, b"")
        # nats-server takes a subscription before it acknowledges it, mosquitto in order: the mark comes last.
        self.message(mark)
        return self


MakePeer = Callable[..., Peer]


@pytest.fixture
def make_peer() -> Iterator[MakePeer]:
    peers: list[Peer] = []

    def make(address: BrokerAddress, client_id: str, **options: Any) -> Peer:
        peers.append(Peer(address, client_id, **options))
        return peers[-1]

    yield make
    for peer in peers:
        peer.link.stop()


def test_messages_go_both_ways_and_binary_payloads_are_untouched(broker: Broker, make_peer: MakePeer) -> None:
    one, two = make_peer(broker.address(), "one").up(), make_peer(broker.address(), "two").up()
    one.subscribed("to/one/#")
    two.subscribed("to/two/+")
    every_byte = bytes(range(256)) * 5
    assert two.link.publish("to/one/x", every_byte, qos=0)
    assert one.message("to/one/x").payload == every_byte
    assert one.link.publish("to/two/x", b"")
    assert two.message("to/two/x").payload == b""


def test_the_protocol_found_is_reported(broker: Broker, make_peer: MakePeer) -> None:
    link = make_peer(broker.address(), "asks").up().link
    assert link.limits.protocol == (5 if broker.version == 5 else 3)
    assert link.limits.receive_maximum >= 1


def test_retained_messages_reach_a_late_subscriber_and_can_be_cleared(
    broker: Broker, make_peer: MakePeer
) -> None:
    writer = make_peer(broker.address(), "writer").up()
    writer.link.publish_bulk("kept/1", b"one", qos=1, retain=True, timeout_s=WAIT_S)
    writer.link.publish_bulk("kept/2", b"two", qos=1, retain=True, timeout_s=WAIT_S)
    writer.link.publish_bulk("kept/1", b"", qos=1, retain=True, timeout_s=WAIT_S)
    writer.link.flush(WAIT_S)
    late = make_peer(broker.address(), "late").up()
    late.link.subscribe([("kept/+", 1)])
    message = late.next(Message)
    assert (message.topic, message.payload, message.retain) == ("kept/2", b"two", True)


def test_unsubscribed_topics_fall_silent(broker: Broker, make_peer: MakePeer) -> None:
    peer = make_peer(broker.address(), "listener").up().subscribed("a", "b")
    assert peer.link.unsubscribe(["a"])
    peer.link.publish("a", b"unheard")
    peer.link.publish("b", b"heard")
    assert peer.next(Message).topic == "b"


WILL_CHILD = """
import sys
from federation.wire.link import BrokerAddress, Inbox, Link, Will
link = Link(BrokerAddress.parse(sys.argv[1]), "mortal", on_event=Inbox().put, will=Will("state", b"dead"), will_delay_s=1)
link.start()
link.wait_connected(20)
print("up", file=sys.stderr, flush=True)  # the log goes to stdout
sys.stdin.read()
"""


def test_the_will_fires_when_the_process_is_killed(broker: Broker, make_peer: MakePeer) -> None:
    watcher = make_peer(broker.address(), "watcher").up().subscribed("state")
    with subprocess.Popen(
        [sys.executable, "-c", WILL_CHILD, broker.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stderr is not None
        try:
            assert child.stderr.readline() == b"up\n"
        finally:
            child.kill()
    assert watcher.message("state").payload == b"dead"


def test_stop_says_the_last_words_and_no_will(broker: Broker, make_peer: MakePeer) -> None:
    watcher = make_peer(broker.address(), "watcher").up().subscribed("state", "end")
    leaver = make_peer(broker.address(), "leaver", will=Will("state", b"dead")).up()
    leaver.link.stop([("state", b"offline", 1, True)])
    assert not leaver.link.connected
    assert not leaver.link.publish("state", b"too late")
    watcher.link.publish("end", b"")
    # nats-server keeps no order between two publishers.
    heard = [watcher.next(Message) for _ in range(2)]
    assert {message.topic: message.payload for message in heard} == {"state": b"offline", "end": b""}


def test_a_killed_broker_is_found_again_on_its_port(broker: Broker, make_peer: MakePeer) -> None:
    peer = make_peer(broker.address(), "patient", retry_min_s=0.05).up().subscribed("again")
    broker.kill()
    assert not peer.next(Disconnected).refused
    until(lambda: not peer.link.connected, what="link down")
    assert peer.link.publish("again", b"nobody") is False
    with pytest.raises(TransportError, match="not connected"):
        peer.link.publish_bulk("again", b"nobody", timeout_s=1)
    broker.start()
    peer.next(Connected)
    peer.subscribed("again").link.publish("again", b"back")
    assert peer.message("again").payload == b"back"


def test_a_short_loss_leaves_no_subscription_and_over_mqtt_5_fires_no_will(
    broker: Broker, make_peer: MakePeer, make_relay: Callable[[Broker], Relay]
) -> None:
    relay = make_relay(broker)
    watcher = make_peer(broker.address(), "watcher").up().subscribed("state", "end")
    through = BrokerAddress(host="127.0.0.1", port=relay.port, version=broker.version)
    mobile = (
        make_peer(through, "mobile", will=Will("state", b"dead"), retry_min_s=0.05).up().subscribed("news")
    )
    relay.cut()
    mobile.next(Disconnected)
    mobile.next(Connected)
    mobile.subscribed("other")
    watcher.link.publish("news", b"unheard")
    watcher.link.publish("other", b"heard")
    # What was not acknowledged when the network broke comes once more.
    topics = (mobile.next(Message).topic for _ in range(100))
    assert next(topic for topic in topics if not topic.startswith("mark/")) == "other"
    watcher.link.publish("end", b"")
    assert watcher.next(Message).payload == (b"" if broker.version == 5 else b"dead")


def test_nats_without_a_version_costs_no_visible_delay(make_broker: MakeBroker, make_peer: MakePeer) -> None:
    broker = make_broker("nats")
    peer = make_peer(broker.address(), "quick", retry_min_s=100.0)  # one back-off would run into the timeout
    peer.up()
    assert peer.link.limits.protocol == 3


def test_a_version_that_the_broker_does_not_speak_is_refused(
    make_broker: MakeBroker, make_peer: MakePeer
) -> None:
    broker = make_broker("nats", version=5)
    with pytest.raises(BrokerRefusedError, match="does not speak this version"):
        make_peer(broker.address(), "modern").link.wait_connected(WAIT_S)


def test_a_wrong_password_names_address_user_and_remedy(
    broker_kind: Kind, make_broker: MakeBroker, make_peer: MakePeer
) -> None:
    broker = make_broker(broker_kind, accounts={"pi1": "right"})
    peer = make_peer(broker.address(username="pi1", password="wrong"), "liar")
    with pytest.raises(BrokerRefusedError) as caught:
        peer.link.wait_connected(WAIT_S)
    text = str(caught.value)
    assert f"127.0.0.1:{broker.port}" in text
    assert "'pi1'" in text
    assert "check user name and password" in text
    assert "wrong" not in text
    assert peer.next(Disconnected).refused
    make_peer(broker.address(username="pi1", password="right"), "honest").up()


def test_a_password_changed_under_a_running_link_is_retried_and_told_once(
    broker_kind: Kind, make_broker: MakeBroker, make_peer: MakePeer
) -> None:
    broker = make_broker(broker_kind, accounts={"pi1": "old"})
    peer = make_peer(broker.address(username="pi1", password="old"), "pi1", retry_min_s=0.05).up()
    broker.set_accounts({"pi1": "new"})
    broker.restart()
    while not peer.next(Disconnected).refused:
        pass
    broker.set_accounts({"pi1": "old"})
    broker.restart()
    peer.next(Connected)


def test_a_refused_publish_is_named_over_mqtt_5(make_broker: MakeBroker, make_peer: MakePeer) -> None:
    broker = make_broker(
        "mosquitto", version=5, accounts={"pi1": "p"}, acl="user pi1\ntopic readwrite mine/#\n"
    )
    peer = make_peer(broker.address(username="pi1", password="p"), "pi1").up()
    peer.link.publish("mine/x", b"")
    peer.link.publish("yours/x", b"")
    assert "yours/x" in peer.next(LinkFailed).error
    peer.link.publish_bulk("yours/y", b"", qos=1, timeout_s=WAIT_S)
    with pytest.raises(TransportError, match="1 bulk messages were lost"):
        peer.link.flush(WAIT_S)
    assert peer.link.connected


def test_a_refused_subscription_is_named(make_broker: MakeBroker, make_peer: MakePeer) -> None:
    rights = ', permissions: { publish: ["mine.>"], subscribe: ["mine", "mine.>", "$MQTT.>"] }'
    broker = make_broker("nats", accounts={"pi1": "p"}, permissions={"pi1": rights})
    peer = make_peer(broker.address(username="pi1", password="p"), "pi1").up()
    peer.link.subscribe([("mine/#", 0), ("yours/#", 0)])
    assert "yours/#" in peer.next(LinkFailed).error
    assert peer.link.connected


def test_an_unknown_host_is_named(make_peer: MakePeer) -> None:
    with pytest.raises(TransportError, match=r"unknown host 'broker\.invalid'"):
        make_peer(BrokerAddress.parse("mqtt://broker.invalid"), "lost").link.wait_connected(1.0)


def test_a_port_where_nobody_listens(make_peer: MakePeer) -> None:
    with pytest.raises(TransportError, match=r"connection refused by mqtt://127\.0\.0\.1"):
        make_peer(BrokerAddress.parse(f"mqtt://127.0.0.1:{free_port()}"), "lost").link.wait_connected(0.3)


def test_tls_with_the_right_authority(
    broker_kind: Kind, make_broker: MakeBroker, certificates: Certificates, make_peer: MakePeer
) -> None:
    broker = make_broker(broker_kind, certificates=certificates)
    peer = make_peer(broker.address(ca_pem=certificates.ca_pem), "safe").up().subscribed("big")
    payload = bytes(range(256)) * 3000  # several TLS records in one packet
    peer.link.publish("big", payload)
    assert peer.message("big").payload == payload


def test_tls_with_a_foreign_authority_is_told_at_once(
    make_broker: MakeBroker,
    certificates: Certificates,
    foreign_certificates: Certificates,
    make_peer: MakePeer,
) -> None:
    broker = make_broker("mosquitto", certificates=certificates)
    peer = make_peer(broker.address(ca_pem=foreign_certificates.ca_pem), "wary")
    with pytest.raises(TransportError, match="is not trusted") as caught:
        peer.link.wait_connected(WAIT_S)
    assert "not connected after" not in str(caught.value)


def test_a_client_certificate_lets_in_and_its_absence_does_not(
    broker_kind: Kind, make_broker: MakeBroker, certificates: Certificates, make_peer: MakePeer
) -> None:
    broker = make_broker(broker_kind, certificates=certificates, client_certificate=True)
    ca = certificates.ca_pem
    files = {
        "client_cert_file": certificates.file("client"),
        "client_key_file": certificates.file("client-key"),
    }
    make_peer(broker.address(ca_pem=ca, **files), "known").up()
    with pytest.raises(TransportError, match="client certificate"):
        make_peer(broker.address(ca_pem=ca), "unknown").link.wait_connected(1.0)


def test_plain_to_a_tls_port_and_tls_to_a_plain_port_say_so(
    make_broker: MakeBroker, certificates: Certificates, make_peer: MakePeer
) -> None:
    secure, plain = make_broker("mosquitto", certificates=certificates), make_broker("mosquitto")
    with pytest.raises(TransportError, match="mqtts://"):
        make_peer(BrokerAddress.parse(f"mqtt://127.0.0.1:{secure.port}"), "plain").link.wait_connected(1.0)
    with pytest.raises(TransportError, match="mqtt://"):
        make_peer(BrokerAddress.parse(f"mqtts://127.0.0.1:{plain.port}"), "secure").link.wait_connected(1.0)


def test_an_oversize_packet_is_refused_here_and_the_link_stays_up(
    make_broker: MakeBroker, make_peer: MakePeer
) -> None:
    broker = make_broker("mosquitto", version=5, max_packet_bytes=4096)
    peer = make_peer(broker.address(), "small").up().subscribed("t")
    assert peer.link.limits.max_packet_bytes == 4096
    fits = 4096 - 1 - 2 - 2 - 1 - 2 - 1  # header, its length, topic's length, topic, message id, properties
    with pytest.raises(TransportError, match="4097 bytes for t is over the broker's limit of 4096"):
        peer.link.publish("t", bytes(fits + 1))
    with pytest.raises(TransportError, match="4097 bytes for t is over the broker's limit of 4096"):
        peer.link.publish_bulk("t", bytes(fits + 1), qos=1, timeout_s=WAIT_S)
    assert peer.link.publish("t", bytes(fits))
    assert len(peer.message("t").payload) == fits


def test_a_limit_in_the_address_holds_where_the_broker_tells_none(
    make_broker: MakeBroker, make_peer: MakePeer
) -> None:
    broker = make_broker("nats", max_packet_bytes=8192)
    peer = make_peer(BrokerAddress.parse(f"{broker.url}?max_packet=8192"), "small").up()
    with pytest.raises(TransportError, match="limit of 8192"):
        peer.link.publish("t", bytes(8192))
    assert peer.link.connected


def test_an_exception_in_the_callback_is_reported_and_the_link_goes_on(broker: Broker) -> None:
    inbox = Inbox()

    def fragile(event: object) -> None:
        if isinstance(event, Message) and event.payload == b"bad":
            raise ZeroDivisionError("on purpose")
        inbox.post(event)

    link = Link(broker.address(), "fragile", on_event=fragile)
    link.start()
    try:
        link.wait_connected(WAIT_S)
        link.subscribe([("t", 1)])
        link.publish("t", b"bad")
        link.publish("t", b"good")
        events = [inbox.get(WAIT_S) for _ in range(3)]
        assert [type(event) for event in events] == [Connected, LinkFailed, Message]
        assert link.connected
    finally:
        link.stop()


def test_waiting_calls_are_refused_in_the_network_thread(broker: Broker) -> None:
    failures: list[str] = []
    done = threading.Event()

    def waits(event: object) -> None:
        if isinstance(event, Connected):
            calls: list[Callable[[], None]] = [
                lambda: link.publish_bulk("t", b"", timeout_s=1),
                lambda: link.flush(1),
                link.stop,
            ]
            for call in calls:
                with pytest.raises(RuntimeError) as caught:
                    call()
                failures.append(str(caught.value))
            done.set()

    link = Link(broker.address(), "eager", on_event=waits)
    link.start()
    try:
        assert done.wait(WAIT_S)
    finally:
        link.stop()
    assert len(failures) == 3


def test_two_hundred_retained_chunks_are_pulled_through_windows(broker: Broker, make_peer: MakePeer) -> None:
    count, window = 200, 16
    seeder = make_peer(broker.address(), "seeder").up()
    for index in range(count):
        payload = index.to_bytes(4, "big") * (CHUNK // 4)
        seeder.link.publish_bulk(f"object/{index}", payload, qos=1, retain=True, timeout_s=WAIT_S)
    seeder.link.flush(WAIT_S)
    puller = make_peer(broker.address(), "puller").up()
    missing, asked = set(range(count)), 0
    while missing:
        while asked < count and asked - (count - len(missing)) < window:
            puller.link.subscribe([(f"object/{asked}", 0)])
            asked += 1
        message = puller.next(Message)
        index = int(message.topic.removeprefix("object/"))
        assert message.payload == index.to_bytes(4, "big") * (CHUNK // 4)
        missing.discard(index)
        puller.link.unsubscribe([message.topic])


def test_bulk_at_qos_1_loses_nothing(broker: Broker, make_peer: MakePeer) -> None:
    count = 300
    reader = make_peer(broker.address(), "reader").up().subscribed("bulk/+")
    sender = make_peer(broker.address(), "sender").up()
    for index in range(count):
        sender.link.publish_bulk(f"bulk/{index}", bytes([index % 256]) * CHUNK, qos=1, timeout_s=WAIT_S)
    sender.link.flush(WAIT_S)
    arrived = {reader.next(Message).topic for _ in range(count)}
    assert arrived == {f"bulk/{index}" for index in range(count)}


def test_bulk_that_a_dead_broker_does_not_take_ends_with_an_error(
    broker: Broker, make_peer: MakePeer
) -> None:
    sender = make_peer(broker.address(), "sender").up()
    raised: list[TransportError] = []

    def push() -> None:
        try:
            while True:
                sender.link.publish_bulk("bulk", bytes(CHUNK), qos=1, timeout_s=WAIT_S)
        except TransportError as error:
            raised.append(error)

    pusher = threading.Thread(target=push)
    pusher.start()
    broker.kill()
    pusher.join(WAIT_S)
    assert len(raised) == 1


def test_an_unanswered_window_blocks_until_the_timeout(make_broker: MakeBroker, make_peer: MakePeer) -> None:
    broker = make_broker("mosquitto")
    sender = make_peer(broker.address(), "sender", max_inflight=4).up()
    assert broker.process is not None
    os.kill(broker.process.pid, signal.SIGSTOP)
    try:
        for _ in range(4):
            sender.link.publish_bulk("t", b"x", qos=1, timeout_s=WAIT_S)
        with pytest.raises(TransportError, match="no bulk message within"):
            sender.link.publish_bulk("t", b"x", qos=1, timeout_s=0.1)
        with pytest.raises(TransportError, match="no bulk message within"):
            sender.link.flush(0.1)
    finally:
        os.kill(broker.process.pid, signal.SIGCONT)
    sender.link.flush(WAIT_S)


def test_a_retained_message_that_is_replaced_while_we_subscribe_is_not_missed_when_it_is_repeated(
    make_broker: MakeBroker,
) -> None:
    """nats-server may deliver the old one alone, or last. The aggregator repeats each plan for that reason."""
    address = make_broker("nats").address()
    writer = Peer(address, "writer").up()
    for number in range(40):
        topic = f"plan/{number}"
        writer.link.publish_bulk(topic, b"old", qos=1, retain=True, timeout_s=WAIT_S)
        writer.link.flush(WAIT_S)
        reader = Peer(address, f"reader-{number}").up()
        reader.link.subscribe([("down", 1), (topic, 1)])
        writer.link.publish(topic, b"new", retain=True)
        reader.next(Message)  # subscribed: old or new
        writer.link.publish(topic, b"new", retain=True)
        while reader.next(Message).payload != b"new":
            pass
        reader.link.stop()
    writer.link.stop()
