"""Shares on their way through the aggregator, which cannot read them."""

from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from privacy.secagg.errors import RefusedError
from privacy.secagg.masks import pair_key
from privacy.secagg.shamir import SHARE_BYTES, check_share

_TAG_BYTES: Final = 16
SEALED_BYTES: Final = 2 * SHARE_BYTES + _TAG_BYTES
_PURPOSE: Final = b"fedge/secagg/1/seal"


@dataclass(frozen=True, slots=True)
class SharePair:
    """What a device holds of a neighbour.

    Attributes:
        seed: Share of the seed of the neighbour's own mask, 33 bytes.
        key: Share of its private mask key, 33 bytes.
    """

    seed: bytes = field(repr=False)
    key: bytes = field(repr=False)


class Sealer:
    """Seals shares to, and opens those from, one neighbour.

    Args:
        private: Sealing key of ``me``.
        public: Sealing key of ``neighbour``, 32 bytes.
        roster: The roster's digest, to which both are bound.
        me: This device.
        neighbour: The other one.

    Raises:
        RefusedError: If the public key is none of X25519, or of low order.
    """

    def __init__(
        self, private: X25519PrivateKey, public: bytes, roster: bytes, me: str, neighbour: str
    ) -> None:
        self._cipher = ChaCha20Poly1305(pair_key(private, public, _PURPOSE, roster, (me, neighbour)))
        self._roster, self._me, self._neighbour = roster, me, neighbour

    def seal(self, shares: SharePair) -> bytes:
        """Encrypt for the neighbour; once only.

        Args:
            shares: Of this device's secrets.

        Returns:
            :data:`SEALED_BYTES`.
        """
        return self._cipher.encrypt(
            _nonce(self._me, self._neighbour),
            shares.seed + shares.key,
            self._bound(self._me, self._neighbour),
        )

    def open(self, sealed: bytes) -> SharePair:
        """Decrypt what the neighbour sealed for this device.

        Args:
            sealed: Its ciphertext.

        Returns:
            Shares of the neighbour's secrets.

        Raises:
            RefusedError: If it has another length, was changed, comes from another device or roster, or holds no shares.
        """
        if len(sealed) != SEALED_BYTES:
            raise RefusedError(f"sealed shares have {len(sealed)} bytes, not {SEALED_BYTES}")
        try:
            opened = self._cipher.decrypt(
                _nonce(self._neighbour, self._me), sealed, self._bound(self._neighbour, self._me)
            )
        except InvalidTag:
            raise RefusedError(
                f"{self._neighbour!r} did not seal these shares for {self._me!r} here"
            ) from None
        shares = SharePair(opened[:SHARE_BYTES], opened[SHARE_BYTES:])
        check_share(shares.seed)
        check_share(shares.key)
        return shares

    def _bound(self, sender: str, receiver: str) -> bytes:
        """Associated data: roster (and with it the context), sender, receiver."""
        return self._roster + len(sender).to_bytes(2, "big") + sender.encode() + receiver.encode()


def _nonce(sender: str, receiver: str) -> bytes:
    """The key of a pair seals two messages, one in each direction."""
    return bytes(11) + (b"\x01" if sender < receiver else b"\x02")
