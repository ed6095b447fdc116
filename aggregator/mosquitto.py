"""Files for a mosquitto that the operator runs: password file, access list, and a configuration to start from."""

from collections.abc import Iterable
from pathlib import Path

from aggregator.accounts import Account, rights
from federation.wire.topics import Topics

MAX_PACKET_BYTES = 1 << 20
"""Ten times the default chunk; a larger packet would only hold up the pings of slow devices."""

_MAX_INFLIGHT = 64
"""As many as an agent may be asked for at once, so that credit and not the broker paces an upload."""

_MAX_QUEUED = 4000
"""Messages for one slow subscriber before mosquitto drops in silence; fedge asks for far fewer than that."""

_AUTOSAVE_S = 60
"""Retained chunks that were published since the last save are lost with the broker; its default is half an hour."""


def password_file(accounts: Iterable[Account]) -> bytes:
    """One ``user:hash`` a line, as ``mosquitto_passwd`` writes them."""
    return "".join(f"{account.name}:{account.mosquitto_hash}\n" for account in accounts).encode()


def access_list(accounts: Iterable[Account], topics: Topics) -> bytes:
    """Explicit rights for each enrolled user, so that other users of a shared broker have none."""
    lines = []
    for account in accounts:
        granted = rights(account, topics)
        lines.append(f"user {account.name}")
        lines += [f"topic write {filter_}" for filter_ in granted.publish]
        lines += [f"topic read {filter_}" for filter_ in granted.subscribe]
        lines.append("")
    return "\n".join(lines).encode()


def mosquitto_conf(
    folder: Path,
    *,
    data: Path,
    host: str = "0.0.0.0",  # noqa: S104  # devices connect from elsewhere; accounts and TLS guard it
    port: int = 1883,
    certificate: Path | None = None,
    key: Path | None = None,
    max_packet_bytes: int = MAX_PACKET_BYTES,
) -> str:
    """A ready ``mosquitto.conf`` for mosquitto 2.0 or newer.

    Args:
        folder: ``STATE/broker/mosquitto``, where :class:`~aggregator.enrolment.Enrolment` keeps the two files.
        data: Folder in which mosquitto keeps retained messages; it must be able to write there.
        host: Address to listen on.
        port: Port to listen on.
        certificate: PEM chain of the server; with ``key``, serves TLS.
        key: PEM private key of the server.
        max_packet_bytes: Larger packets are refused.

    Returns:
        The text of the file.
    """
    lines = [
        "# mosquitto reads the two files below when it starts, and again at SIGHUP: send one after each enrolment.",
        f"# Its user must be able to read them: chgrp -R mosquitto {folder}",
        "per_listener_settings false",
        "allow_anonymous false",
        f"password_file {folder / 'passwd'}",
        f"acl_file {folder / 'acl'}",
        "",
        f"listener {port} {host}",
        *([f"certfile {certificate}", f"keyfile {key}"] if certificate and key else []),
        "",
        "# Small answers must not wait for Nagle's timer.",
        "set_tcp_nodelay true",
        f"max_packet_size {max_packet_bytes}",
        f"max_inflight_messages {_MAX_INFLIGHT}",
        f"max_queued_messages {_MAX_QUEUED}",
        "",
        "# Retained models survive a restart; after a crash the aggregator publishes what is missing.",
        "persistence true",
        f"persistence_location {data}/",
        f"autosave_interval {_AUTOSAVE_S}",
    ]
    return "\n".join(lines) + "\n"
