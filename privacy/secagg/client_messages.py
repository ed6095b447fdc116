"""What goes into a device's machine of secure aggregation, and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from privacy.secagg.agreement import PublicKeys
from privacy.secagg.masks import MaskPlan


class ClientPhase(StrEnum):
    """What a device waits for."""

    ROSTER = "roster"
    SHARES = "shares"
    SURVIVORS = "survivors"
    AGREEMENTS = "agreements"
    REVEALED = "revealed"
    ABORTED = "aborted"


# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RosterArrived:
    """The aggregator, whose signature was verified, said who takes part.

    Attributes:
        names: All of them, sorted.
        keys: Those of this device and of its neighbours, by name, **each signed by its owner, which the caller has
            verified** against identities that the aggregator cannot invent, for this very context.
    """

    names: tuple[str, ...]
    keys: Mapping[str, PublicKeys]


@dataclass(frozen=True, slots=True)
class SharesArrived:
    """The aggregator passed on what the neighbours sealed for this device.

    Attributes:
        sealed: Sender to ciphertext. A neighbour that is missing here takes no part.
    """

    sealed: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class VectorMasked:
    """The vector was masked as :class:`ApplyMasks` said, and is on its way."""


@dataclass(frozen=True, slots=True)
class SurvivorsArrived:
    """The aggregator, whose signature was verified, said whose masked vectors it has.

    Attributes:
        names: Sorted.
    """

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AgreementsArrived:
    """Neighbours signed whom they know as survivors.

    Attributes:
        digests: Signer to the digest that it signed; **the caller has verified the signatures**, for this context.
    """

    digests: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The round is over for this device, for whatever reason: forget all secrets.

    Attributes:
        reason: For people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


ClientEvent = (
    RosterArrived | SharesArrived | VectorMasked | SurvivorsArrived | AgreementsArrived | Cancelled | Tick
)

# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendKeys:
    """Sign these keys and the context with the device's identity, and send them."""

    keys: PublicKeys


@dataclass(frozen=True, slots=True)
class SendShares:
    """Send this.

    Attributes:
        sealed: Receiver to ciphertext of ``sealing.SEALED_BYTES``. The aggregator cannot read them.
    """

    sealed: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ApplyMasks:
    """Mask the vector as soon as it is there: ``plan.apply(vector)``, in a worker, feed :class:`VectorMasked`, upload.

    Given once. A second use of the plan raises, since two vectors under the same masks show their difference.

    Attributes:
        plan: The masks.
    """

    plan: MaskPlan = field(repr=False)


@dataclass(frozen=True, slots=True)
class SendAgreement:
    """Sign this digest and the context with the device's identity, and send it."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class SendReveal:
    """Send this: shares of what takes off the masks.

    From now on this vector must never be masked again, nor one that differs little from it: no further attempt of the same
    round may use it, since the difference of two sums would show it. See ``Client.revealed``.

    Attributes:
        seeds: Survivor to this device's share of the seed of its own mask.
        keys: Vanished neighbour to this device's share of its private mask key.
    """

    seeds: Mapping[str, bytes] = field(repr=False)
    keys: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ignored:
    """A message came that means nothing, or that nobody honest sends; log it.

    Attributes:
        reason: For people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Abort:
    """The device takes no further part in this context; its secrets are gone. Tell the aggregator, so that it need not wait.

    Attributes:
        reason: For people.
    """

    reason: str


ClientCommand = SendKeys | SendShares | ApplyMasks | SendAgreement | SendReveal | Ignored | Abort
