"""Masks: keystreams that are added to a vector mod 2^8, 2^16 or 2^32, and that cancel, or are taken off, in the sum.

Device u masks its vector x_u as (Bonawitz et al. 2017, section 4.0.1)

    y_u = x_u + PRG(b_u) + sum of PRG(s_uv) over neighbours v > u - sum of PRG(s_uv) over neighbours v < u    mod 2^bits

where b_u comes from a seed of its own, s_uv = s_vu is what only u and v can derive, and u < v is the order of names. PRG
is the keystream of ChaCha20 (which is fast on devices without AES instructions), read as little-endian integers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privacy.secagg.agreement import DIGEST_BYTES, KEY_BYTES, SEED_BYTES
from privacy.secagg.errors import RefusedError

MaskedVector: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]
"""Shape ``(d,)``, contiguous. Arithmetic wraps around: it is taken mod 2^8, 2^16 or 2^32."""

_DTYPES: Final[dict[int, np.dtype[Any]]] = {8: np.dtype("<u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4")}
_BLOCK_BYTES: Final = 1 << 18
"""Of keystream at a time: it stays in a core's second-level cache between its making and its adding."""

_ZEROS: Final = bytes(_BLOCK_BYTES)
_NONCE: Final = bytes(16)
"""Each key is used for one keystream only."""

_PAIR: Final = b"fedge/secagg/1/pair"
_OWN: Final = b"fedge/secagg/1/own"


@dataclass(frozen=True, slots=True)
class Mask:
    """One keystream.

    Attributes:
        key: 32 bytes, of ChaCha20.
        subtract: Whether it is subtracted instead of added.
    """

    key: bytes = field(repr=False)
    subtract: bool = False

    def inverted(self) -> "Mask":
        """What takes this one off."""
        return Mask(self.key, not self.subtract)


class MaskPlan:
    """The masks of one vector, good for one use.

    Args:
        masks: To apply.
    """

    def __init__(self, masks: Iterable[Mask]) -> None:
        self._masks: tuple[Mask, ...] | None = tuple(masks)

    def __len__(self) -> int:
        return len(self._masks or ())

    def apply(self, vector: MaskedVector) -> None:
        """Mask a vector in place; O(d) per mask, 256 KiB of memory besides the vector.

        Args:
            vector: Shape ``(d,)``, of :func:`dtype_of`.

        Raises:
            RefusedError: At the second use, or after :meth:`wipe`: two vectors under the same masks show their difference.
        """
        if self._masks is None:
            raise RefusedError(
                "these masks were used before or are wiped; take part in the next round instead"
            )
        masks, self._masks = self._masks, None
        for mask in masks:
            apply_mask(vector, mask)

    def wipe(self) -> None:
        """Forget the masks."""
        self._masks = None


def dtype_of(modulus_bits: int) -> np.dtype[Any]:
    """The little-endian type whose arithmetic is mod 2^modulus_bits.

    Raises:
        ValueError: If it is not 8, 16 or 32.
    """
    if modulus_bits not in _DTYPES:
        raise ValueError(f"modulus_bits is {modulus_bits}, not one of {sorted(_DTYPES)}")
    return _DTYPES[modulus_bits]


def apply_mask(vector: MaskedVector, mask: Mask) -> None:
    """Add or subtract one keystream, in place.

    Args:
        vector: Shape ``(d,)``, of :func:`dtype_of`.
        mask: The keystream.

    Raises:
        ValueError: If the vector is of another type, has more dimensions or gaps.
    """
    if vector.dtype not in _DTYPES.values() or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError(
            f"cannot mask {vector.dtype} of shape {vector.shape}: give one contiguous row of u1, u2 or u4"
        )
    stream = Cipher(ChaCha20(mask.key, _NONCE), mode=None).encryptor()
    keystream = np.empty(min(_BLOCK_BYTES, vector.nbytes), np.uint8)
    integers = keystream.view(vector.dtype)
    operation = np.subtract if mask.subtract else np.add
    for start in range(0, vector.size, max(1, integers.size)):
        part = vector[start : start + integers.size]
        stream.update_into(memoryview(_ZEROS)[: part.nbytes], keystream.data)
        operation(part, integers[: part.size], out=part)


def own_mask(seed: bytes, roster: bytes) -> Mask:
    """A device's mask of its own.

    Args:
        seed: 32 bytes, which the device shares with its neighbours.
        roster: The roster's digest.

    Returns:
        The mask that the device adds.
    """
    return Mask(_derive(seed, SEED_BYTES, _OWN, roster, ()))


def pair_mask(private: X25519PrivateKey, public: bytes, roster: bytes, me: str, neighbour: str) -> Mask:
    """The mask that two neighbours share.

    Args:
        private: Mask key of ``me``.
        public: Mask key of ``neighbour``, 32 bytes.
        roster: The roster's digest.
        me: Whose vector is masked.
        neighbour: Who applies the inverse.

    Returns:
        The mask that ``me`` applies: added if its name is the smaller one.

    Raises:
        RefusedError: If the public key is of low order, so that the secret would be known to all.
    """
    return Mask(pair_key(private, public, _PAIR, roster, (me, neighbour)), subtract=me > neighbour)


def check_public_key(public: bytes) -> None:
    """Refuse what no honest device publishes.

    Args:
        public: X25519 key.

    Raises:
        RefusedError: If it has another length than 32 bytes, or is of low order: then what follows from it is known to all.
    """
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise RefusedError(f"not a public key of X25519: {error}") from error


def pair_key(
    private: X25519PrivateKey, public: bytes, purpose: bytes, roster: bytes, names: tuple[str, str]
) -> bytes:
    """HKDF-SHA256 of the X25519 secret of two devices; the same on both sides.

    Args:
        private: Of one of them.
        public: Of the other, 32 bytes.
        purpose: Keys for different purposes are independent.
        roster: The roster's digest.
        names: Of both, in any order.

    Returns:
        32 bytes.

    Raises:
        RefusedError: If the public key is of low order or has another length.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise RefusedError(f"the public key of one of {names} is not one of X25519: {error}") from error
    return _derive(secret, KEY_BYTES, purpose, roster, tuple(sorted(names)))


def _derive(secret: bytes, length: int, purpose: bytes, roster: bytes, names: tuple[str, ...]) -> bytes:
    """HKDF-SHA256 (RFC 5869) without salt; info = purpose, roster's digest, names with their lengths."""
    assert len(roster) == DIGEST_BYTES
    encoded = [name.encode() for name in names]
    info = purpose + roster + b"".join(len(name).to_bytes(2, "big") + name for name in encoded)
    return HKDF(SHA256(), length, salt=None, info=info).derive(secret)
