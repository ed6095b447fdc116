"""Who has an account on the broker, and what each may publish and subscribe: the one table of rights."""

import base64
import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Literal

import bcrypt
from msgspec import Struct

from federation.wire.fields import Name
from federation.wire.signing import AGGREGATOR
from federation.wire.topics import Topics

_PASSWORD_BYTES = 32
"""256 random bits: no guessing reaches them, so the slow hashes below need not be slow."""

_BCRYPT_COST = 4
"""The lowest that there is. The broker hashes at each connect, and a fleet reconnects all at once."""

_PBKDF2_ROUNDS = 101
"""What mosquitto_passwd 2.0 writes; mosquitto hashes in the one thread that also moves the messages."""

_PBKDF2_SALT_BYTES = 12
"""mosquitto 2.0 refuses any other length."""


class Account(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One account. An agent's password is kept only as hashes: it stands in the device's bundle alone.

    Attributes:
        name: Of the agent, and of the user on the broker.
        role: ``agent``, or ``aggregator`` for the one account of the server itself.
        public_key: Hex Ed25519 public key.
        bcrypt_hash: Of the password, for nats-server.
        mosquitto_hash: Of the password, for a mosquitto password file.
        enrolled_at: Unix seconds.
        password: In clear for the aggregator's own account; empty for agents.
    """

    name: Name
    role: Literal["aggregator", "agent"]
    public_key: str
    bcrypt_hash: str
    mosquitto_hash: str
    enrolled_at: float
    password: str = ""

    def __repr__(self) -> str:
        return f"Account(name={self.name!r}, role={self.role!r})"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        """What ``rich`` prints: as little as ``repr``."""
        return [("name", self.name), ("role", self.role)]


def new_account(name: str, public_key: str) -> tuple[Account, str]:
    """Make an account with a fresh random password.

    Args:
        name: ``aggregator`` or the agent's name.
        public_key: Hex Ed25519 public key of its owner.

    Returns:
        The account, and the password in clear.
    """
    password = secrets.token_urlsafe(_PASSWORD_BYTES)
    server = name == AGGREGATOR
    account = Account(
        name=name,
        role="aggregator" if server else "agent",
        public_key=public_key,
        bcrypt_hash=bcrypt.hashpw(password.encode(), bcrypt.gensalt(_BCRYPT_COST)).decode(),
        mosquitto_hash=mosquitto_hash(password),
        enrolled_at=time.time(),
        password=password if server else "",
    )
    return account, password


def mosquitto_hash(password: str) -> str:
    """The second field of a line in a mosquitto 2 password file: ``$7$rounds$salt$hash``, PBKDF2-HMAC-SHA512."""
    salt = secrets.token_bytes(_PBKDF2_SALT_BYTES)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _PBKDF2_ROUNDS)
    return f"$7${_PBKDF2_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


@dataclass(frozen=True, slots=True)
class Rights:
    """What an account may do.

    Attributes:
        publish: MQTT filters of the topics that it may write.
        subscribe: MQTT filters of the topics that it may read.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def rights(account: Account, topics: Topics) -> Rights:
    """What ``account`` may do in the federation of ``topics``: a device is confined to its own branch.

    The aggregator reads everything below the prefix. It may write an agent's retained state, to clear that of a
    device which was revoked.
    """
    if account.role == "aggregator":
        return Rights(
            publish=(
                topics.aggregator,
                topics.plan,
                topics.releases,
                topics.objects,
                topics.down("+"),
                topics.state("+"),
            ),
            subscribe=(topics.everything,),
        )
    name = account.name
    return Rights(
        publish=(
            topics.state(name),
            topics.telemetry(name),
            topics.up(name),
            topics.predictions(name),
            topics.model(name),
            topics.discovery(name),
        ),
        subscribe=(
            topics.aggregator,
            topics.plan,
            topics.releases,
            topics.objects,
            topics.down(name),
            topics.state(name),
            topics.model(name),
        ),
    )
