"""What real brokers do rarely or never: a listener that answers with bytes written out here."""

import socket
import threading
from collections.abc import Iterator

import pytest

from federation.errors import BrokerRefusedError
from federation.wire.connection import Connection, Meter
from federation.wire.link import BrokerAddress, Connected, Disconnected, Inbox, Link, Message, Will
from federation.wire.sending import SendQueue, Wake, publish_job

WAIT_S = 20.0
CONNACK_5 = b"\x20\x03\x00\x00\x00"
CONNACK_3 = b"\x20\x02\x00\x00"


class ScriptedBroker:
    """Answers each connection's CONNECT with the next script; None hangs up without an answer."""

    def __init__(self, *scripts: bytes | None) -> None:
        self._scripts = iter(scripts)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.versions: list[int] = []
        self.address = BrokerAddress(host="127.0.0.1", port=self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for script in self._scripts:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.versions.append(connection.recv(4096)[8])
            if script is None:
                connection.close()
            else:
                connection.sendall(script)
                self._open.append(connection)

    def rest(self) -> bytes:
        """What the first client has sent since its CONNECT, once it has hung up."""
        self._thread.join(WAIT_S)
        (connection,) = self._open
        connection.settimeout(WAIT_S)
        return b"".join(iter(lambda: connection.recv(4096), b""))

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept(), which close() does not
        self._server.close()
        self._thread.join(WAIT_S)
        for connection in self._open:
            connection.close()


@pytest.fixture
def scripted(request: pytest.FixtureRequest) -> Iterator[ScriptedBroker]:
    broker = ScriptedBroker(*request.param)
    yield broker
    broker.close()


def following(broker: ScriptedBroker) -> tuple[Link, Inbox]:
    inbox = Inbox()
    link = Link(broker.address, "me", on_event=inbox.put, retry_min_s=0.01)
    link.start()
    return link, inbox


def scripts(*answers: bytes | None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scripted", [answers], indirect=True, ids=["scripted"])


@scripts(CONNACK_5 + b"\xe0\x02\x8e\x00")
def test_a_takeover_is_told_as_such(scripted: ScriptedBroker) -> None:
    link, inbox = following(scripted)
    try:
        assert isinstance(inbox.get(WAIT_S), Connected)
        assert inbox.get(WAIT_S) == Disconnected(
            "session taken over by another client with this id", refused=False
        )
    finally:
        link.stop()


@scripts(None, CONNACK_3)
def test_a_broker_that_hangs_up_on_mqtt_5_is_tried_with_3_1_1(scripted: ScriptedBroker) -> None:
    link, inbox = following(scripted)
    try:
        event = inbox.get(WAIT_S)
        assert isinstance(event, Connected)
        assert event.limits.protocol == 3
        assert scripted.versions == [5, 4]
    finally:
        link.stop()


@scripts(b"\x20\x0b\x00\x00\x08\x21\x00\x0a\x27\x00\x00\x10\x00")
def test_limits_are_read_from_the_connack(scripted: ScriptedBroker) -> None:
    link, inbox = following(scripted)
    try:
        event = inbox.get(WAIT_S)
        assert isinstance(event, Connected)
        assert (event.limits.receive_maximum, event.limits.max_packet_bytes) == (10, 4096)
    finally:
        link.stop()


@scripts(b"\x20\x03\x00\x8a\x00")
def test_a_ban_is_told_with_a_remedy(scripted: ScriptedBroker) -> None:
    link, _ = following(scripted)
    try:
        with pytest.raises(BrokerRefusedError, match="banned this client; ask who runs it"):
            link.wait_connected(WAIT_S)
    finally:
        link.stop()


@pytest.mark.parametrize(
    "scripted",
    [
        (b"\xff" * 64, CONNACK_3),
        (CONNACK_5 + b"\x30\xff\xff\xff\xff\x01", CONNACK_5),  # a length of five bytes
        (CONNACK_5 + b"\x30\x03\x00\x09a", CONNACK_5),  # a topic longer than its packet
        (CONNACK_5 + b"\x90\x00", CONNACK_5),  # an acknowledgement of nothing
        (CONNACK_5 + b"\x00\x00", CONNACK_5),  # a packet of no kind
    ],
    indirect=True,
    ids=["no-mqtt", "length", "topic", "suback", "kind"],
)
def test_garbage_from_a_broker_does_not_end_the_link(scripted: ScriptedBroker) -> None:
    link, inbox = following(scripted)
    try:
        for _ in range(20):
            event = inbox.get(WAIT_S)
            if isinstance(event, Connected) and len(scripted.versions) == 2:
                break
        else:
            pytest.fail("the link did not come back")
    finally:
        link.stop()


@scripts(CONNACK_5 + b"\x30\x06\x00\x01\xff\x00ab" + b"\x30\x06\x00\x01t\x00ok")
def test_a_topic_that_is_not_utf_8_is_dropped_and_the_next_message_arrives(scripted: ScriptedBroker) -> None:
    link, inbox = following(scripted)
    try:
        events = [inbox.get(WAIT_S) for _ in range(3)]
        assert events[2] == Message("t", b"ok", retain=False)
        assert link.connected
    finally:
        link.stop()


class Stopping:
    """Stops a connection as ``Link.stop()`` would from another thread, just as its loop asks whether it should end."""

    def __init__(self, broker: ScriptedBroker, *, once_let_in: bool) -> None:
        self._wake = Wake()
        self._queue = SendQueue(16, self._wake)
        self._once_let_in = once_let_in
        self._asked = False
        self._connection = Connection(
            broker.address,
            None,
            "me",
            version=3,
            keepalive_s=60,
            will=Will("state", b"dead"),
            will_delay_s=0,
            resume=False,
            filters=set(),
            queue=self._queue,
            meter=Meter(),
            wake=self._wake,
            emit=lambda _: None,
            opened=self._queue.open,
        )

    def run(self) -> None:
        self._connection.run(self._is_asked)
        self._wake.close()

    def _is_asked(self) -> bool:
        if not self._asked and (self._queue.is_open or not self._once_let_in):
            self._queue.end([publish_job("state", b"bye", qos=0, retain=True)])
            self._asked = True
        return self._asked


LAST_WORDS = b"\x31\x0a\x00\x05statebye"
DISCONNECT = b"\xe0\x00"


@scripts(CONNACK_3)
def test_last_words_that_come_in_the_middle_of_a_turn_are_said_before_the_end(
    scripted: ScriptedBroker,
) -> None:
    Stopping(scripted, once_let_in=True).run()
    assert scripted.rest() == LAST_WORDS + DISCONNECT


@scripts(b"")
def test_a_stop_before_the_broker_has_let_us_in_leaves_the_last_words_to_the_will(
    scripted: ScriptedBroker,
) -> None:
    Stopping(scripted, once_let_in=False).run()
    assert scripted.rest() == b"", "DISCONNECT would take back the will"
