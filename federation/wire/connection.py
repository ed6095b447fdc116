"""One connection to a broker, from the TCP handshake to its end. With :mod:`~federation.wire.client`, all there is of paho.

A fresh paho client is made for every connection and only one thread ever touches it, so nothing is resent behind
the owner's back, and none of paho's own threads can die unnoticed. The loop waits with epoll or kqueue where there
is one: ``select()`` fails past file descriptor 1024.
"""

import logging
import selectors
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Literal, cast

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from federation.wire import reasons
from federation.wire.address import LARGEST_PACKET, BrokerAddress
from federation.wire.client import Meter, MeteredClient
from federation.wire.inbox import UNLIMITED_RECEIVE_MAXIMUM, Limits, LinkEvent, LinkFailed, Message
from federation.wire.messages import MAX_CHUNK_BYTES
from federation.wire.reasons import Failure
from federation.wire.sending import Publish, SendQueue, Subscribe, Unsubscribe, Wake

MQTT_5: Final = 5

CONNECT_TIMEOUT_S: Final = 10.0
"""For TCP with TLS, and again for the broker's answer: slow phones' networks need seconds."""

FAREWELL_S: Final = 2.0
"""What a clean end may take: last words acknowledged, DISCONNECT sent."""

TICK_S: Final = 1.0
"""How often keepalive and deadlines are looked at when nothing happens."""

UNSENT_BYTES: Final = 128 * 1024
"""What the kernel may hold that it has not sent: one chunk and a little. More only ages there: pings would wait behind
it, and nothing could be taken back."""

FILTERS_PER_PACKET: Final = 8
"""AWS IoT takes no more in one SUBSCRIBE."""

UNACKED_QOS1: Final = 64
"""QoS 1 publishes handed to the broker without an answer. More buys no speed and delays pings behind them."""

RECEIVED_PACKET_BYTES: Final = MAX_CHUNK_BYTES + 64 * 1024
"""Longest packet we let an MQTT 5 broker send us: the largest chunk, and room for topic and properties."""


_NOT_UTF8: Final = "the broker delivered a topic that is not UTF-8; the message was dropped"


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for a client that vanishes."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a connection ended.

    Attributes:
        up_s: Seconds for which it was open; 0 if it never was.
        failure: Why; None after a clean stop.
    """

    up_s: float
    failure: Failure | None


class _LastError(logging.Handler):
    """Paho tells why a socket failed only to its log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage().removeprefix("failed to receive on socket: ")


class Connection:
    """Connects once and serves until the end.

    Args:
        address: Where to.
        context: TLS, or None.
        client_id: MQTT client id.
        version: 5, or 3 for MQTT 3.1.1.
        keepalive_s: Seconds between pings.
        will: The last will, or None.
        will_delay_s: Seconds by which an MQTT 5 broker delays it, and keeps the session for a resumption.
        resume: Take up the session of the previous connection, so that its delayed will does not fire.
        filters: Subscriptions of the previous connection; kept up to date here.
        queue: What to send.
        meter: Counts what is moved, and holds the cap on what is sent.
        wake: What interrupts the wait.
        emit: Where events go. Must not raise.
        opened: Called once the broker has let us in. Must not raise.
    """

    def __init__(
        self,
        address: BrokerAddress,
        context: ssl.SSLContext | None,
        client_id: str,
        *,
        version: Literal[3, 5],
        keepalive_s: int,
        will: Will | None,
        will_delay_s: int,
        resume: bool,
        filters: set[str],
        queue: SendQueue,
        meter: Meter,
        wake: Wake,
        emit: Callable[[LinkEvent], None],
        opened: Callable[[Limits], None],
    ) -> None:
        self._address = address
        self._version = version
        self._filters = filters
        self._queue = queue
        self._meter = meter
        self._wake = wake
        self._emit = emit
        self._opened = opened
        self._up_since: float | None = None
        self._failure: Failure | None = None
        self._unacked: dict[int, Publish] = {}
        self._unacked_qos1 = 0
        self._asked: dict[int, tuple[tuple[str, int], ...]] = {}
        self._confirmed: set[str] = set()
        self._refusals_told: set[str] = set()
        self._window = UNACKED_QOS1
        self._errors = _LastError()
        self._client = self._build(client_id, context, will, will_delay_s)
        self._keepalive_s = keepalive_s
        self._delay_s = will_delay_s if will is not None else 0
        self._resume = resume

    def run(self, stopping: Callable[[], bool]) -> Outcome:
        """Connect, serve, and return when the connection has ended or ``stopping`` says so.

        Returns:
            How it ended.
        """
        try:
            self._connect()
            if self._failure is None:
                self._loop(stopping)
        except OSError as error:
            self._failure = reasons.of_error(self._address, error)
        finally:
            sock = self._client.socket()
            if sock is not None:
                sock.close()
        up_s = 0.0 if self._up_since is None else monotonic() - self._up_since
        return Outcome(up_s, None if stopping() else self._failure)

    def _build(
        self, client_id: str, context: ssl.SSLContext | None, will: Will | None, will_delay_s: int
    ) -> MeteredClient:
        five = self._version == MQTT_5
        client = MeteredClient(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=None if five else True,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.meter = self._meter
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages = 0  # unlimited there: the window is kept here, where CONNACK's is known
        client.username_pw_set(self._address.username, self._address.password)
        if context is not None:
            client.tls_set_context(context)
        if will is not None:
            properties = None
            if five:
                properties = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=will_delay_s)
            client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        logger = logging.Logger("paho", logging.ERROR)  # noqa: LOG001 -- private: the application never sees it
        logger.addHandler(self._errors)
        client.enable_logger(logger)
        client.on_socket_open = self._on_socket_open
        # Its presence keeps paho from writing inside publish(); the loop asks want_write() itself.
        client.on_socket_register_write = lambda *_: None
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_plain = self._on_plain
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    def _connect(self) -> None:
        options: dict[str, Any] = {}
        if self._version == MQTT_5:
            properties = _properties(PacketTypes.CONNECT, MaximumPacketSize=RECEIVED_PACKET_BYTES)
            if self._delay_s:
                # A will is delayed only as long as its session lives.
                properties.SessionExpiryInterval = self._delay_s
            options = {"clean_start": not self._resume, "properties": properties}
        self._client.connect(self._address.host, self._address.port, self._keepalive_s, **options)

    def _loop(self, stopping: Callable[[], bool]) -> None:
        client = self._client
        sock = cast("socket.socket", client.socket())
        tls = sock if isinstance(sock, ssl.SSLSocket) else None
        answer_due = monotonic() + CONNECT_TIMEOUT_S
        farewell_due: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake.reader, selectors.EVENT_READ)
            selector.register(sock, selectors.EVENT_READ)
            mask = selectors.EVENT_READ
            while client.socket() is not None:
                now = monotonic()
                if self._up_since is None and now > answer_due:
                    self._failure = reasons.of_mute(self._address, CONNECT_TIMEOUT_S)
                    return
                capped_until = now if self._meter.cap is None or stopping() else self._meter.cap.ready_at(now)
                self._feed(capped=capped_until > now)
                wrote = self._write_now()
                if client.socket() is None:
                    return
                if stopping():
                    if farewell_due is None:
                        farewell_due = now + FAREWELL_S
                    if now > farewell_due or self._up_since is None or self._queue.unsaid:
                        return  # without DISCONNECT, which would take back the will: it stands in for the last words
                    self._say_goodbye()
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.want_write() else 0)
                if wanted != mask:
                    selector.modify(sock, wanted)
                    mask = wanted
                buffered = client.reads_ahead or (tls is not None and tls.pending() > 0)
                wait_s = 0.0 if buffered or wrote else min(TICK_S, capped_until - now or TICK_S)
                ready = {key.fileobj: events for key, events in selector.select(wait_s)}
                if self._wake.reader in ready:
                    self._wake.drain()
                events = ready.get(sock, 0)
                if events & selectors.EVENT_READ or buffered:
                    client.read_packets()
                if events & selectors.EVENT_WRITE:
                    client.loop_write()
                client.loop_misc()

    def _write_now(self) -> bool:
        """Write what paho holds as far as there is room, and mostly there is: no need to ask the selector.

        Returns:
            Whether there was something: then more may wait for its turn.
        """
        if not self._client.want_write():
            return False
        self._client.loop_write()
        return not self._client.want_write()

    def _say_goodbye(self) -> None:
        """Send DISCONNECT once everything said before it has been acknowledged."""
        # The last words may have come since the queue was last looked into.
        if self._queue.control_waits or self._unacked_qos1 or self._client.want_write():
            return
        properties = None
        if self._version == MQTT_5:
            properties = _properties(PacketTypes.DISCONNECT, SessionExpiryInterval=0)
        self._client.disconnect(properties=properties)

    def _feed(self, *, capped: bool) -> None:
        """Hand to paho what may go now."""
        while self._up_since is not None and self._client.socket() is not None and not capped:
            idle = not self._client.want_write()
            if self._meter.cap is not None and not idle:
                return  # what is charged is what was written, so one at a time; acknowledgements and pings go past us
            job = self._queue.take(acks_free=self._unacked_qos1 < self._window, idle=idle)
            match job:
                case None:
                    return
                case Publish():
                    mid = self._client.publish(job.topic, job.payload, job.qos, job.retain).mid
                    self._unacked[mid] = job
                    self._unacked_qos1 += job.qos
                case Subscribe(filters):
                    self._filters.update(name for name, _ in filters)
                    _, asked = self._client.subscribe(list(filters))
                    if asked is not None:
                        self._asked[asked] = tuple(filters)
                case Unsubscribe(filters):
                    self._filters.difference_update(filters)
                    self._confirmed.difference_update(filters)
                    self._client.unsubscribe(list(filters))

    def _on_socket_open(self, _client: Client, _userdata: object, sock: Any) -> None:
        # Nagle holds small grants back for 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux and macOS
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def _on_connect(
        self,
        client: Client,
        _userdata: object,
        flags: ConnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            self._failure = reasons.of_connack(self._address, code.value, str(code))
            return
        if flags.session_present and self._filters:
            stale = sorted(self._filters)
            for start in range(0, len(stale), FILTERS_PER_PACKET):
                client.unsubscribe(stale[start : start + FILTERS_PER_PACKET])
        self._filters.clear()
        receive_maximum = getattr(properties, "ReceiveMaximum", UNLIMITED_RECEIVE_MAXIMUM)
        announced = getattr(properties, "MaximumPacketSize", LARGEST_PACKET)
        limits = Limits(
            max_packet_bytes=min(announced, self._address.max_packet_bytes or LARGEST_PACKET),
            receive_maximum=receive_maximum,
            protocol=self._version,
        )
        self._window = min(UNACKED_QOS1, receive_maximum)
        self._up_since = monotonic()
        self._opened(limits)

    def _on_disconnect(
        self,
        _client: Client,
        _userdata: object,
        flags: DisconnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if self._failure is not None:
            return
        if self._up_since is None:
            self._failure = reasons.of_silence(self._address, self._errors.text)
            return
        by_broker = flags.is_disconnect_packet_from_server
        self._failure = reasons.of_disconnect(
            code.value, str(code), by_broker=by_broker, detail=self._errors.text
        )

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self._emit(LinkFailed(_NOT_UTF8))
            return
        self._received(topic, bytes(message.payload), message.retain)

    def _on_plain(self, topic: bytes, payload: bytes, retain: bool) -> None:
        try:
            text = topic.decode()
        except UnicodeDecodeError:
            self._emit(LinkFailed(_NOT_UTF8))
            return
        self._received(text, payload, retain)

    def _received(self, topic: str, payload: bytes, retain: bool) -> None:
        self._meter.received_payload(len(payload))
        self._emit(Message(topic, payload, retain))

    def _on_publish(
        self, _client: Client, _userdata: object, mid: int, code: ReasonCode, _properties: Properties | None
    ) -> None:
        job = self._unacked.pop(mid, None)
        if job is None:
            return
        self._unacked_qos1 -= job.qos
        self._meter.sent_payload(len(job.payload))
        if job.bulk:
            self._queue.settled(refused=code.is_failure)
        if code.is_failure and str(code) not in self._refusals_told:
            self._refusals_told.add(str(code))
            self._emit(
                LinkFailed(f"the broker refused a publish to {job.topic}: {str(code).lower()}; check its ACL")
            )

    def _on_subscribe(
        self,
        _client: Client,
        _userdata: object,
        mid: int,
        codes: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        again = []
        for (name, qos), code in zip(self._asked.pop(mid, ()), codes, strict=False):
            if code.is_failure:
                self._filters.discard(name)
                self._emit(
                    LinkFailed(
                        f"the broker refused the subscription to {name}: {str(code).lower()}; check its ACL"
                    )
                )
            elif qos and name in self._filters and name not in self._confirmed:
                self._confirmed.add(name)
                again.append((name, qos))
        if again:
            # A retained message that is replaced while the subscription is being set up may reach nobody: nats-server
            # delivers the old one alone, or last. From here on nothing is lost, so what is retained now is the truth.
            # QoS 0 is left out: its subscribers ask again for what does not come.
            self._client.subscribe(again)


def _properties(packet: int, **values: int) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


__all__ = ["FILTERS_PER_PACKET", "Connection", "Meter", "Outcome", "Will"]
