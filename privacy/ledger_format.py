"""The ledger's two records: a chain of entries, and a head that says how far the chain reaches.

Each line is ``MAC SPACE JSON NEWLINE``. With the device's ledger key k and the line before it::

    mac[0] = HMAC-SHA256(k, "fedge/1 ledger line" | 0^32   | json[0])        the opening: whose ledger it is
    mac[i] = HMAC-SHA256(k, "fedge/1 ledger line" | mac[i-1] | json[i])      entry i
    head   = HMAC-SHA256(k, "fedge/1 ledger head" | json)                    entries, bytes and mac of the last line

So no line can be changed, moved, left out or added without k, and no line that the head counts can be cut off.
"""

import hmac
from hashlib import sha256
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.accounting import Spend
from privacy.errors import LedgerError

T = TypeVar("T")

VERSION = 1
DP_SGD = "dp-sgd"
"""The only kind of entry so far: a round of local training."""

MAX_LINE_BYTES = 4096
"""An entry takes 500; nothing is read into memory on the word of a file."""

_LINE, _HEAD = b"fedge/1 ledger line", b"fedge/1 ledger head"
_KEY_BYTES = 32
_MAC_CHARACTERS = 64
_BEFORE_FIRST = "0" * _MAC_CHARACTERS


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first line: whose ledger it is.

    Attributes:
        version: Of the format.
        federation: Whose plans are paid from it.
        device: Whose data is protected.
        identity: Tells keys apart without telling them: hex, from the ledger key.
        time: Unix seconds.
    """

    version: int
    federation: str
    device: str
    identity: str
    time: float


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was paid before a round's first step.

    Attributes:
        number: Counted from 1.
        time: Unix seconds.
        kind: Of what was paid for: :data:`DP_SGD`.
        run: Of the plan.
        round: Of the plan.
        attempt: Of the plan.
        model: Digest of the model that the round starts from.
        noise_multiplier: Of each step.
        clip_norm: Of each step.
        sample_rate: Of each step.
        steps: Paid for, whether they were taken or not.
        delta: Of the plan.
        data: What the data was called. All entries count against one budget, whatever it says.
    """

    number: int
    time: float
    kind: str
    run: str
    round: int
    attempt: int
    model: str
    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    steps: int
    delta: float
    data: str

    @property
    def spend(self) -> Spend:
        """What it costs."""
        return Spend(self.noise_multiplier, self.sample_rate, self.steps)


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far the chain reaches.

    Attributes:
        entries: That were paid.
        length: Bytes of all lines.
        last: MAC of the last line.
    """

    entries: int
    length: int
    last: str


def ledger_key(secret: bytes, federation: str, device: str) -> bytes:
    """The key of a device's ledger in a federation (HKDF-SHA256, RFC 5869).

    Args:
        secret: The device's private signing key, raw.
        federation: Its name.
        device: Its name.

    Returns:
        32 bytes that tell nothing about ``secret``.
    """
    info = b"fedge/1 ledger key\0" + federation.encode() + b"\0" + device.encode()
    return HKDF(SHA256(), _KEY_BYTES, salt=None, info=info).derive(secret)


def identity_of(key: bytes) -> str:
    """A name for a ledger key."""
    return sha256(b"fedge/1 ledger identity" + key).hexdigest()[:16]


class Chain:
    """Makes and checks lines in order.

    Args:
        key: From :func:`ledger_key`.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.last = _BEFORE_FIRST
        self.length = 0

    def line(self, record: Opening | Entry) -> bytes:
        """The line of the next record; it counts only after :meth:`accept`."""
        body = msgspec.json.encode(record)
        return f"{self._mac(body)} ".encode() + body + b"\n"

    def accept(self, line: bytes) -> bytes | None:
        """Take a line as the next one.

        Args:
            line: With its newline.

        Returns:
            Its JSON; None if it is not the next line under this key.
        """
        mac, space, rest = line[:_MAC_CHARACTERS], line[_MAC_CHARACTERS:][:1], line[_MAC_CHARACTERS + 1 :]
        body, newline = rest[:-1], rest[-1:]
        expected = self._mac(body)
        if space != b" " or newline != b"\n" or not hmac.compare_digest(mac, expected.encode()):
            return None
        self.last = expected
        self.length += len(line)
        return body

    def head(self, entries: int) -> Head:
        """The head after the lines that were accepted."""
        return Head(entries=entries, length=self.length, last=self.last)

    def _mac(self, body: bytes) -> str:
        return hmac.new(self._key, _LINE + bytes.fromhex(self.last) + body, "sha256").hexdigest()


def seal_head(key: bytes, head: Head) -> bytes:
    """The head as it is on disk."""
    body = msgspec.json.encode(head)
    return f"{_head_mac(key, body)} ".encode() + body + b"\n"


def unseal_head(key: bytes, data: bytes) -> Head | None:
    """Check a head; None if it was not written under this key, or is damaged."""
    mac, body = data[:_MAC_CHARACTERS], data[_MAC_CHARACTERS + 1 : -1]
    expected = _head_mac(key, body)
    if data != f"{expected} ".encode() + body + b"\n" or not hmac.compare_digest(mac, expected.encode()):
        return None
    return msgspec.json.decode(body, type=Head)


def decode(body: bytes, kind: type[T]) -> T:
    """Parse the JSON of a line that was accepted.

    Raises:
        LedgerError: If another version of the software wrote it.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise LedgerError(
            f"the ledger holds a line that this version cannot read ({error}). Nothing is lost: run the version that wrote it"
        ) from error


def _head_mac(key: bytes, body: bytes) -> str:
    return hmac.new(key, _HEAD + body, "sha256").hexdigest()
