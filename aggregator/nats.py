"""The configuration of nats-server as an MQTT broker. Its format is a superset of JSON, so JSON is what is written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aggregator.accounts import Account, rights
from federation.wire.topics import Topics

MAX_PACKET_BYTES = 1 << 20
"""Largest MQTT packet. Ten times the default chunk; nats-server's own default."""

_PAYLOAD_MARGIN_BYTES = 4096
"""nats-server counts headers of its own (24 bytes and more) into the payload that it limits. Without a margin a packet
of the full size on a short topic would cut the connection, and the client would send it again for ever."""

_MAX_ACK_PENDING = 512
"""Unacknowledged messages that each QoS 1 subscription reserves of a session's 65,535: 127 subscriptions instead of
the 63 of the default, and still far more than the 256 chunks that are ever outstanding."""

_WRITE_DEADLINE = "120s"
"""How long one write to a client may block. The default of 10 s throws devices on slow links out in mid-transfer; a
dead one is noticed by its keepalive long before."""

_MAX_STORE_BYTES = 8 << 30
"""Retained messages and queues on disk: two generations of the largest object several times over, and a bound on what
a misbehaving device can fill."""

_LOG_BYTES = 8 << 20
_LOG_FILES = 3


def accounts_conf(accounts: Iterable[Account], topics: Topics) -> bytes:
    """The included file with all users, rewritten at each enrolment.

    A user may log in over MQTT only. nats-server grants its MQTT side the internal ``$MQTT.`` subjects by itself and
    refuses them to clients, so the rights are the topics and nothing else.
    """
    users = []
    for account in accounts:
        granted = rights(account, topics)
        users.append(
            {
                "user": account.name,
                "password": account.bcrypt_hash,
                "allowed_connection_types": ["MQTT"],
                "permissions": {
                    "publish": [subject for filter_ in granted.publish for subject in subjects(filter_)],
                    "subscribe": [subject for filter_ in granted.subscribe for subject in subjects(filter_)],
                },
            }
        )
    return f"authorization: {_value({'users': users})}\n".encode()


def subjects(filter_: str) -> list[str]:
    """The NATS subjects of an MQTT filter; ``#`` also matches its parent, so it becomes two."""
    subject = filter_.replace("/", ".").replace("+", "*")
    return [subject.removesuffix(".#"), subject[:-1] + ">"] if subject.endswith(".#") else [subject]


def server_conf(
    folder: Path,
    *,
    accounts: str,
    log: Path,
    host: str,
    port: int,
    certificate: Path | None = None,
    key: Path | None = None,
    max_packet_bytes: int = MAX_PACKET_BYTES,
) -> bytes:
    """The main configuration file.

    nats-server cannot do without the port of its own protocol: it is a free one on the loopback, where no account may
    log in. Monitoring and clustering stay off.

    Args:
        folder: Where JetStream makes its folder ``jetstream``.
        accounts: Name of the file with the users, beside this one.
        log: Log file.
        host: Address of the MQTT listener.
        port: Port of the MQTT listener.
        certificate: PEM chain of the server; with ``key``, serves TLS.
        key: PEM private key of the server.
        max_packet_bytes: Larger MQTT packets cut the connection.

    Returns:
        The content of the file.
    """
    mqtt: dict[str, Any] = {"host": host, "port": port, "max_ack_pending": _MAX_ACK_PENDING}
    if certificate and key:
        mqtt["tls"] = {"cert_file": str(certificate.resolve()), "key_file": str(key.resolve())}
    settings = {
        "server_name": "fedge",
        "host": "127.0.0.1",
        "port": -1,
        "log_file": str(log),
        "logfile_size_limit": _LOG_BYTES,
        "logfile_max_num": _LOG_FILES,
        "max_payload": max_packet_bytes + _PAYLOAD_MARGIN_BYTES,
        "write_deadline": _WRITE_DEADLINE,
        "jetstream": {"store_dir": str(folder), "max_file_store": _MAX_STORE_BYTES},
        "mqtt": mqtt,
    }
    lines = [f'include "{accounts}"', *(f"{name}: {_value(value)}" for name, value in settings.items())]
    return ("\n".join(lines) + "\n").encode()


def _value(value: object) -> str:
    # nats-server's strings know \n, \t, \" and \\ but no \u escapes.
    return json.dumps(value, indent=1, ensure_ascii=False)
