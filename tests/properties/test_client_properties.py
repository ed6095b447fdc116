"""What the client makes of a stream of packets is what paho makes of it, however the stream is cut."""

import socket
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from federation.wire.client import Meter, MeteredClient

Heard = tuple[bytes, bytes, bool]
VERSIONS = (MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv5)

bodies = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda topic, properties, payload: len(topic).to_bytes(2) + topic + properties + payload,
        st.binary(max_size=5),
        st.sampled_from([b"", b"\0", b"\x02\x01\x01", b"\x05\x02\0\0\0\x01", b"\x7f"]),
        st.binary(max_size=300),
    ),
)
publishes = st.tuples(st.sampled_from([0x30, 0x31, 0x32, 0x33, 0x38, 0x3D]), bodies)


def packet(command: int, body: bytes) -> bytes:
    length = len(body)
    return bytes([command, *([length] if length < 128 else [length % 128 | 128, length // 128])]) + body


def told(client: Client, stream: Sequence[bytes]) -> tuple[list[Heard], bool]:
    """All messages that a client hears, and whether it goes on listening."""
    heard: list[Heard] = []
    client.on_message = lambda _client, _userdata, m: heard.append(heard_of(m))
    if isinstance(client, MeteredClient):
        client.meter = Meter()
        client.on_plain = lambda topic, payload, retain: heard.append((topic, payload, retain))
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        client._sock = near
        for piece in stream:
            far.sendall(piece)
            for _ in range(20):
                if client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    return heard, False
    return heard, True


def heard_of(message: MQTTMessage) -> Heard:
    return message._topic, bytes(message.payload), bool(message.retain)


@pytest.mark.parametrize("version", VERSIONS)
@given(packets=st.lists(publishes, max_size=4), cuts=st.lists(st.integers(1, 50), max_size=6))
def test_it_hears_what_paho_hears(
    version: MQTTProtocolVersion, packets: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    whole = b"".join(packet(command, body) for command, body in packets)
    stream, at = [], 0
    for cut in cuts:
        stream.append(whole[at : at + cut])
        at += cut
    stream.append(whole[at:])
    plain = Client(CallbackAPIVersion.VERSION2, protocol=version)
    ours = MeteredClient(CallbackAPIVersion.VERSION2, protocol=version)
    assert told(ours, stream) == told(plain, stream)
