"""The messages of secure aggregation (``docs/protocol.md``, section Secure aggregation), all of them in envelopes.

What a device must know to be another device's own word is signed for a purpose of its own and passed on as it was
signed: keys and agreements. The rest is between a device and the aggregator.
"""

from typing import Annotated, TypeVar, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta

from federation.errors import ConfigError, PeerError, Rejection
from federation.wire.codec import Schema
from federation.wire.fields import MAX_COHORT, Attempt, Name, RoundNumber, RunId, Sha256, Wire
from federation.wire.messages import RoundPlan, decode_msgpack
from federation.wire.shared_scale import SharedScale
from federation.wire.signing import Envelope, Purpose, unseal
from federation.wire.terms import SecAggTerms

MASKED = "masked"
"""The family of encodings of masked updates, as devices announce it."""

MAX_ENVELOPE_BYTES = 2048
"""Of a message that is passed on: keys and agreements have some 400."""

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Share = Annotated[bytes, Meta(min_length=1, max_length=64)]
Sealed = Annotated[bytes, Meta(min_length=1, max_length=512)]
Signed = Annotated[bytes, Meta(min_length=1, max_length=MAX_ENVELOPE_BYTES)]
Names = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MAX_COHORT)]

S = TypeVar("S")
SharesByName = Annotated[dict[Name, Share], Meta(max_length=MAX_COHORT)]
SealedByName = Annotated[dict[Name, Sealed], Meta(max_length=MAX_COHORT)]


class MaskingMessage(Wire, frozen=True):
    """Where it belongs: nothing of one attempt is of use in another.

    Attributes:
        run: As in the plan.
        round: As in the plan.
        attempt: As in the plan.
    """

    run: RunId
    round: RoundNumber
    attempt: Attempt

    def is_of(self, plan: RoundPlan) -> bool:
        """Whether it belongs to this very plan."""
        return (self.run, self.round, self.attempt) == (plan.run, plan.round, plan.attempt)


class MaskingKeys(MaskingMessage, frozen=True, tag="keys"):
    """A device's public keys for one attempt, passed on to its neighbours. Purpose ``masking-keys``.

    Attributes:
        base: As in the plan.
        mask: X25519 public key, from which the masks with each neighbour are derived.
        seal: X25519 public key, under which shares are sealed.
        seed_commitment: Binds the device to the seed of the mask that is its own.
    """

    base: Sha256
    mask: Bytes32
    seal: Bytes32
    seed_commitment: Bytes32


class SealedShares(MaskingMessage, frozen=True, tag="shares"):
    """Shares of a device's secrets, sealed. Up by receiver, down by sender.

    Attributes:
        sealed: Name to ciphertext.
    """

    sealed: SealedByName


class Agreement(MaskingMessage, frozen=True, tag="agreement"):
    """A device's word on whose updates are in the sum, passed on to its neighbours. Purpose ``masking-agreement``.

    Attributes:
        digest: Of the roster and the survivors (``privacy.secagg.agreement``).
    """

    digest: Bytes32


class Reveal(MaskingMessage, frozen=True, tag="reveal"):
    """A device's shares of what must be known to read the sum. Never of both secrets of one device.

    Attributes:
        seeds: Survivor to a share of the seed of its own mask.
        keys: Vanished neighbour to a share of its private mask key.
    """

    seeds: SharesByName
    keys: SharesByName


class Member(Wire, frozen=True):
    """One device of a roster.

    Attributes:
        identity: Its Ed25519 public key.
        keys: Its :class:`MaskingKeys`, as it has signed them.
    """

    identity: Bytes32
    keys: Signed


class Roster(MaskingMessage, frozen=True, tag="roster"):
    """Who takes part in the attempt.

    Attributes:
        names: All, sorted.
        members: The receiver and its neighbours, by name.
    """

    names: Names
    members: Annotated[dict[Name, Member], Meta(min_length=1, max_length=MAX_COHORT)]


class Survivors(MaskingMessage, frozen=True, tag="survivors"):
    """Whose masked updates are in the sum.

    Attributes:
        names: Sorted.
    """

    names: Names


class Agreements(MaskingMessage, frozen=True, tag="agreements"):
    """What neighbours have signed.

    Attributes:
        signed: Name to its :class:`Agreement`, as it has signed it.
    """

    signed: Annotated[dict[Name, Signed], Meta(max_length=MAX_COHORT)]


UpMessage = MaskingKeys | SealedShares | Agreement | Reveal
DownMessage = Roster | SealedShares | Survivors | Agreements

_KINDS_UP: dict[Purpose, object] = {
    Purpose.MASKING_KEYS: MaskingKeys,
    Purpose.MASKING_AGREEMENT: Agreement,
    Purpose.MASKING: SealedShares | Reveal,
}


def unseal_up(data: bytes, *, federation: str, sender: str, key: Ed25519PublicKey) -> UpMessage:
    """Verify a device's message. The purpose stands in the envelope and decides what the body may be.

    Args:
        data: From anywhere.
        federation: Expected.
        sender: Owner of the topic that it came on.
        key: Its pinned key.

    Raises:
        PeerError: As :func:`federation.wire.signing.unseal`.
    """
    purpose = decode_msgpack(data, Envelope).purpose
    kind = _KINDS_UP.get(purpose)
    if kind is None:
        raise PeerError(Rejection.BAD_SIGNATURE, f"signed for {purpose.value!r}, which is none of masking")
    return unseal(
        data,
        cast("type[UpMessage]", kind),
        purpose=purpose,
        federation=federation,
        sender=sender,
        key=key,
    )


def body_up(data: bytes) -> UpMessage:
    """Parse a device's message that was verified before.

    Args:
        data: The envelope.

    Raises:
        PeerError: ``malformed``.
    """
    envelope = decode_msgpack(data, Envelope)
    return decode_msgpack(envelope.body, cast("type[UpMessage]", _KINDS_UP[envelope.purpose]))


def masking_context(federation: str, plan: RoundPlan) -> tuple[str | int, ...]:
    """What all keys, masks, shares and signatures of one attempt are bound to, in this order."""
    return federation, plan.run, plan.round, plan.attempt, plan.base, plan.up_encoding


def masked_encoding(modulus_bits: int) -> str:
    """What a plan names for masked updates: each value a little-endian integer of so many bits, and nothing else."""
    return f"{MASKED}:{modulus_bits}"


def scale_of(plan: RoundPlan, schema: Schema) -> SharedScale:
    """The scale on which all devices of a plan write their updates.

    Args:
        plan: With terms of secure aggregation.
        schema: Of the model.

    Raises:
        ConfigError: If the modulus is too small for the cohort.
    """
    terms = plan.privacy.secagg
    if terms is None:
        raise ConfigError("the plan has no terms of secure aggregation: there is no common scale")
    return scale_of_terms(terms, schema, len(plan.cohort))


def scale_of_terms(terms: SecAggTerms, schema: Schema, cohort: int) -> SharedScale:
    """The same, from the terms and the size of the cohort."""
    return SharedScale.of(
        schema,
        clip_norm=terms.clip_norm,
        modulus_bits=terms.modulus_bits,
        agents=cohort,
        noise_multiplier=terms.noise_multiplier,
        dropouts=terms.dropouts,
    )
