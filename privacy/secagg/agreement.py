"""What both sides of secure aggregation must compute alike: the terms, the roster, and the digests that bind to them."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

DIGEST_BYTES = 32
KEY_BYTES = 32
"""A raw X25519 key, public or private."""

SEED_BYTES = 32
LEAST_AGENTS = 2
MOST_DROPOUTS = 0.5
_DOMAIN = b"fedge/secagg/1/"


@dataclass(frozen=True, slots=True)
class Terms:
    """What the signed plan says, so that each side can compute the rest.

    Attributes:
        min_agents: Least devices whose sum may be learned; at least 2.
        dropouts: Share of the cohort, 0 to 0.5, that may vanish at any step.
        colluders: Share of the cohort that may conspire with the aggregator; counts where the cohort is too large for
            everybody to be everybody's neighbour (``graph.py``).

    Raises:
        ValueError: If one of them is out of its range.
    """

    min_agents: int
    dropouts: float
    colluders: float = 0.05

    def __post_init__(self) -> None:
        if self.min_agents < LEAST_AGENTS:
            raise ValueError(
                f"min_agents is {self.min_agents}: the sum of one device is that device's vector"
            )
        if not 0 <= self.dropouts <= MOST_DROPOUTS:
            raise ValueError(
                f"dropouts is {self.dropouts}, not between 0 and {MOST_DROPOUTS}: more than half must stay"
            )
        if not 0 <= self.colluders < 1:
            raise ValueError(f"colluders is {self.colluders}, not between 0 and 1")


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """What a device publishes in the first message, signed with its identity.

    Attributes:
        mask: X25519 public key, 32 bytes, of which the masks with each neighbour are derived.
        seal: X25519 public key, 32 bytes, under which shares are sealed to and from each neighbour.
        seed_commitment: 32 bytes: SHA-256 of the seed of the mask that is its own, so that forged shares are found out.
    """

    mask: bytes
    seal: bytes
    seed_commitment: bytes


def context_of(*parts: bytes | str | int) -> bytes:
    """The digest to which all keys, masks, shares and signatures of one run of the protocol are bound.

    Args:
        parts: Federation, run, round, attempt, digest of the base model, encoding...: whatever must not be confused.

    Returns:
        32 bytes.
    """
    return _digest("context", (part if isinstance(part, bytes) else str(part).encode() for part in parts))


def roster_digest(context: bytes, names: Iterable[str]) -> bytes:
    """The digest of who takes part, to which masks and shares are bound: two rosters do not mix.

    Args:
        context: See :func:`context_of`.
        names: Sorted.

    Returns:
        32 bytes.
    """
    return _digest("roster", (context, *(name.encode() for name in names)))


def survivors_digest(roster: bytes, names: Iterable[str]) -> bytes:
    """What a device signs in its agreement: whose vectors are in the sum.

    Args:
        roster: See :func:`roster_digest`.
        names: Of the survivors, sorted.

    Returns:
        32 bytes.
    """
    return _digest("survivors", (roster, *(name.encode() for name in names)))


def seed_commitment(context: bytes, name: str, seed: bytes) -> bytes:
    """Hides the seed, which has 256 bits of entropy, and binds its owner to it.

    Args:
        context: See :func:`context_of`.
        name: Of the owner.
        seed: 32 bytes.

    Returns:
        32 bytes.
    """
    return _digest("seed", (context, name.encode(), seed))


def _digest(purpose: str, parts: Iterable[bytes]) -> bytes:
    """SHA-256 of the parts, each with its length in front: no two lists of parts are the same bytes."""
    digest = sha256(_DOMAIN + purpose.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
