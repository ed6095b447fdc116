"""Ed25519 envelopes (RFC 8032). What is signed names its purpose, its federation and its sender.

The round and the run stand in the signed body itself, so a message cannot be replayed into another round, and
the purpose keeps a signature made for one kind of message from being used for another.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from federation.errors import ConfigError, PeerError, Rejection
from federation.wire.fields import Name, Wire
from federation.wire.messages import decode_msgpack, encode_msgpack

AGGREGATOR = "aggregator"
"""The sender name under which the aggregator signs; no agent may be called this."""

_DOMAIN = b"fedge/1 signed message"

T = TypeVar("T")


class Purpose(StrEnum):
    """What a signature is for. A value is never reused with another meaning."""

    PLAN = "plan"
    AGENT = "agent-message"
    RECEIPT = "receipt"
    MASKING = "masking"
    MASKING_KEYS = "masking-keys"
    MASKING_AGREEMENT = "masking-agreement"
    MASKING_DOWN = "masking-down"
    RELEASE = "release"
    RELEASE_REPORT = "release-report"


class Envelope(Wire, frozen=True):
    """A signed message.

    Attributes:
        purpose: What the signature is for.
        federation: For which federation.
        sender: ``aggregator`` or an agent's name.
        body: The msgpack of the message.
        signature: 64 bytes over :func:`signed_bytes`.
    """

    purpose: Purpose
    federation: Name
    sender: Name
    body: Annotated[bytes, Meta(max_length=1 << 20)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


def signed_bytes(purpose: str, federation: str, sender: str, body: bytes) -> bytes:
    """What is signed: the domain and each field, every one preceded by its length (4 bytes, big-endian).

    The lengths make the encoding injective: no two different tuples give the same bytes.
    """
    fields = (_DOMAIN, purpose.encode(), federation.encode(), sender.encode(), body)
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def seal(message: Wire, *, purpose: Purpose, federation: str, sender: str, key: Ed25519PrivateKey) -> bytes:
    """Sign ``message`` and return the bytes to publish."""
    body = encode_msgpack(message)
    signature = key.sign(signed_bytes(purpose, federation, sender, body))
    return encode_msgpack(
        Envelope(purpose=purpose, federation=federation, sender=sender, body=body, signature=signature)
    )


def unseal(
    data: bytes, kind: type[T], *, purpose: Purpose, federation: str, sender: str, key: Ed25519PublicKey
) -> T:
    """Verify an envelope against what the receiver expects, and parse its body.

    Args:
        data: The envelope's bytes, from anywhere.
        kind: Struct, or union of tagged structs, that the body must be.
        purpose: Expected purpose.
        federation: Expected federation.
        sender: Expected sender: the owner of the topic it came on.
        key: The sender's pinned public key.

    Returns:
        The body.

    Raises:
        PeerError: ``malformed``, ``wrong_federation``, ``wrong_sender`` or ``bad_signature``.
    """
    envelope = decode_msgpack(data, Envelope)
    if envelope.federation != federation:
        raise PeerError(
            Rejection.WRONG_FEDERATION, f"made for {envelope.federation!r}, this is {federation!r}"
        )
    if envelope.sender != sender:
        raise PeerError(Rejection.WRONG_SENDER, f"signed as {envelope.sender!r} on the topic of {sender!r}")
    if envelope.purpose is not purpose:
        raise PeerError(
            Rejection.BAD_SIGNATURE, f"signed for {envelope.purpose.value!r}, not {purpose.value!r}"
        )
    try:
        key.verify(envelope.signature, signed_bytes(purpose, federation, sender, envelope.body))
    except InvalidSignature:
        raise PeerError(Rejection.BAD_SIGNATURE, f"not signed with the key known for {sender!r}") from None
    return decode_msgpack(envelope.body, kind)


def private_key_bytes(key: Ed25519PrivateKey) -> bytes:
    """The raw 32-byte seed."""
    return key.private_bytes_raw()


def public_key_hex(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """The raw 32-byte public key in hex: how keys are written in bundles and in the store."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes_raw().hex()


def public_key(hex_text: str) -> Ed25519PublicKey:
    """Parse a public key from hex.

    Raises:
        ConfigError: If it is not 64 hex digits of a valid key.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(hex_text))
    except ValueError as error:
        raise ConfigError(f"public key {hex_text[:80]!r} is not 64 hex digits: {error}") from error


def private_key(hex_text: str) -> Ed25519PrivateKey:
    """Parse a private key from the hex of its seed.

    Raises:
        ConfigError: If it is not 64 hex digits. The text is not shown: it is a secret.
    """
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(hex_text))
    except ValueError:
        raise ConfigError("the private key is not 64 hex digits; enrol the device again") from None


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key that was written as hex.

    Raises:
        ConfigError: If the file is missing or broken.
    """
    try:
        return private_key(path.read_text().strip())
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error


__all__ = [
    "AGGREGATOR",
    "Envelope",
    "Purpose",
    "load_private_key",
    "private_key",
    "private_key_bytes",
    "public_key",
    "public_key_hex",
    "seal",
    "signed_bytes",
    "unseal",
]
