"""Why a broker cannot be reached or says no, in words that end with what to do about it."""

import socket
import ssl
from dataclasses import dataclass

from federation.wire.address import BrokerAddress

UNSUPPORTED_VERSION = frozenset({0x81, 0x82, 0x84})
"""MQTT 5 CONNACK codes of a broker that may well speak 3.1.1: malformed packet, protocol error, version."""

TAKEN_OVER = 0x8E

_CREDENTIALS = frozenset({0x86, 0x87, 0x8C})
_REFUSALS = _CREDENTIALS | {0x84, 0x85, 0x8A}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no connection.

    Attributes:
        reason: For people.
        refused: The broker answered and said no.
        hopeless: Trying again changes nothing until somebody acts: report it without waiting.
        try_older: A broker without MQTT 5 may answer like this.
    """

    reason: str
    refused: bool = False
    hopeless: bool = False
    try_older: bool = False


def of_connack(address: BrokerAddress, code: int, name: str) -> Failure:
    """What the broker's refusal means (MQTT 5 reason codes; paho translates those of 3.1.1)."""
    who = f"user {address.username!r}" if address.username else "a client without a user name"
    if code in _CREDENTIALS:
        remedy = "check user name and password, and that the broker knows this account"
    elif code == 0x8A:  # noqa: PLR2004 -- MQTT 5, section 3.2.2.2: Banned
        remedy = "the broker has banned this client; ask who runs it"
    elif code == 0x85:  # noqa: PLR2004 -- Client Identifier not valid
        remedy = "the broker does not accept the client id; check its rules for ids"
    elif code in UNSUPPORTED_VERSION:
        remedy = "it does not speak this version of MQTT; leave ?version out of the address to find out which it does"
    else:
        remedy = "it may be overloaded or starting; retrying"
    return Failure(
        f"the broker {address} refused {who}: {name.lower()}; {remedy}",
        refused=code in _REFUSALS,
        hopeless=code in _REFUSALS,
        try_older=code in UNSUPPORTED_VERSION,
    )


def of_error(address: BrokerAddress, error: OSError) -> Failure:
    """What a failed connect means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Failure(
            f"the TLS certificate of {address} is not trusted: {error.verify_message}; give the CA that signed "
            "it, and use the host name that it was made for",
            hopeless=True,
        )
    if isinstance(error, ssl.SSLError | ConnectionResetError) and address.tls:
        what = error.reason if isinstance(error, ssl.SSLError) else None
        return Failure(
            f"TLS with {address} failed: {what or error}; if the broker speaks plain MQTT on port {address.port}, "
            "write mqtt://"
        )
    if isinstance(error, socket.gaierror):
        return Failure(
            f"unknown host {address.host!r}: {error.strerror}; check the address and the name server"
        )
    if isinstance(error, ConnectionRefusedError):
        return Failure(
            f"connection refused by {address}: no broker listens there; check that it runs, and the port"
        )
    if isinstance(error, TimeoutError):
        return Failure(f"timeout: {address} does not answer; check the address, the network and the firewall")
    return Failure(f"cannot reach {address}: {error.strerror or error}; check the network")


def of_silence(address: BrokerAddress, detail: str) -> Failure:
    """The connection ended before the broker answered."""
    hints = "is it an MQTT port" + (
        ", and does it want a client certificate?" if address.tls else ", or one for mqtts://?"
    )
    what = f" ({detail})" if detail else ""
    return Failure(f"{address} closed the connection before it answered{what}: {hints}", try_older=True)


def of_mute(address: BrokerAddress, waited_s: float) -> Failure:
    """The broker took the connection and never answered."""
    return Failure(
        f"timeout: {address} took the connection but did not answer within {waited_s:g} s; is it an MQTT port, "
        f"{'and for mqtts://' if address.tls else 'or one for mqtts://'}?"
    )


def of_disconnect(code: int, name: str, *, by_broker: bool, detail: str) -> Failure:
    """Why an established connection ended."""
    if code == TAKEN_OVER and by_broker:
        # Back at once, the two would throw each other out in turns.
        return Failure("session taken over by another client with this id", hopeless=True)
    if by_broker:
        return Failure(f"the broker ended the connection: {name.lower()}")
    if name == "Keep alive timeout":
        return Failure("the broker did not answer a ping within the keepalive")
    if name == "Protocol error":
        return Failure("the broker sent something that is not MQTT; is there a proxy in between?")
    return Failure(f"connection lost: {detail or 'closed by the broker'}")
