"""The paho client of one connection: it counts what passes its socket, and reads it in large pieces.

paho takes a packet apart with one system call for each byte of its header and copies a payload four times. For what
moves most here, chunks at QoS 0 without properties, both are cut short; everything else goes paho's own way. The four
methods that this takes are paho's private ones: there is no public hook. ``tests/unit/wire/test_connection.py`` holds
them to what paho itself would make of the same bytes.
"""

import struct
from collections.abc import Callable
from time import monotonic
from typing import Final, cast

from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion

from federation.wire.messages import Traffic
from federation.wire.rate import TokenBucket

READ_BYTES: Final = 256 * 1024
"""Asked of the kernel at once: two of the usual chunks and a half. Less costs calls, more would not stay in the cache."""

PACKETS_PER_TURN: Final = 16
"""Taken apart at once, if they have been read: then the loop looks after what is to be sent."""

_QOS_BITS: Final = 0x06
_RETAIN_BIT: Final = 0x01
_TOPIC_LENGTH: Final = struct.Struct("!H")


class Meter:
    """Counts what passes through the sockets of a link. Written by its network thread, read by any.

    Args:
        cap: Charged for all that is sent; None for no cap.
    """

    def __init__(self, cap: TokenBucket | None = None) -> None:
        self.cap = cap
        self._sent = self._received = self._sent_payload = self._received_payload = 0

    @property
    def traffic(self) -> Traffic:
        """All that was counted; no counter ever falls."""
        # The payloads first: what is counted between the two readings must not make them more than the whole.
        sent_payload, received_payload = self._sent_payload, self._received_payload
        return Traffic(
            sent_bytes=self._sent,
            received_bytes=self._received,
            sent_payload_bytes=sent_payload,
            received_payload_bytes=received_payload,
        )

    def sent(self, size: int) -> None:
        """Bytes were written."""
        self._sent += size
        if self.cap is not None:
            self.cap.spend(size, monotonic())

    def received(self, size: int) -> None:
        """Bytes were read."""
        self._received += size

    def sent_payload(self, size: int) -> None:
        """A message with that payload is through."""
        self._sent_payload += size

    def received_payload(self, size: int) -> None:
        """A message with that payload has come."""
        self._received_payload += size


class MeteredClient(Client):
    """A paho client that reads ahead.

    Attributes:
        meter: Counts.
        on_plain: Called with topic (UTF-8, unchecked), payload and retain flag of a message at QoS 0 without
            properties, in place of ``on_message``.
    """

    meter: Meter
    on_plain: Callable[[bytes, bytes, bool], None]
    _ahead: memoryview = memoryview(b"")

    @property
    def reads_ahead(self) -> bool:
        """Whether bytes were read from the socket that are not taken apart yet: select() does not know of them."""
        return len(self._ahead) > 0

    def read_packets(self) -> None:
        """Take apart one packet, and more as far as they have been read."""
        self.loop_read()
        for _ in range(PACKETS_PER_TURN):
            if not self.reads_ahead or self.socket() is None:
                return
            self.loop_read()

    def _sock_send(self, buf: bytes | bytearray) -> int:
        size = super()._sock_send(buf)
        self.meter.sent(size)
        return size

    def _sock_recv(self, bufsize: int) -> bytes:
        if not self._ahead:
            data = super()._sock_recv(max(bufsize, READ_BYTES))
            self.meter.received(len(data))
            self._ahead = memoryview(data)
        piece, self._ahead = self._ahead[:bufsize], self._ahead[bufsize:]
        return cast("bytes", piece)  # paho asks for its length, its first byte, and appends it to a bytearray

    def _handle_publish(self) -> MQTTErrorCode:
        command, packet = self._in_packet["command"], self._in_packet["packet"]
        if command & _QOS_BITS or len(packet) <= _TOPIC_LENGTH.size:
            return super()._handle_publish()
        end = start = _TOPIC_LENGTH.size + _TOPIC_LENGTH.unpack_from(packet)[0]
        plain = _TOPIC_LENGTH.size < end <= len(packet)
        if plain and self._protocol == MQTTProtocolVersion.MQTTv5:
            plain, start = packet[end : end + 1] == b"\0", end + 1  # the length of its properties
        if not plain:
            return super()._handle_publish()
        with memoryview(packet) as view:
            topic, payload = bytes(view[_TOPIC_LENGTH.size : end]), bytes(view[start:])
        self.on_plain(topic, payload, bool(command & _RETAIN_BIT))
        return MQTTErrorCode.MQTT_ERR_SUCCESS
