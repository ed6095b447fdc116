"""What goes into the aggregator's machine of secure aggregation, and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from privacy.secagg.agreement import PublicKeys
from privacy.secagg.unmask import UnmaskPlan


class ServerPhase(StrEnum):
    """What the aggregator collects."""

    KEYS = "keys"
    SHARES = "shares"
    MASKED = "masked"
    AGREEMENTS = "agreements"
    REVEALS = "reveals"
    DONE = "done"
    ABORTED = "aborted"


# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeysArrived:
    """A device's keys, whose signature was verified."""

    agent: str
    keys: PublicKeys


@dataclass(frozen=True, slots=True)
class SharesArrived:
    """A device's sealed shares: receiver to ciphertext."""

    agent: str
    sealed: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class MaskedStored:
    """A device's masked vector is on disk."""

    agent: str


@dataclass(frozen=True, slots=True)
class AgreementArrived:
    """A device's signature on the survivors was verified."""

    agent: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class RevealArrived:
    """A device's shares: of the seeds of survivors, and of the mask keys of those that vanished."""

    agent: str
    seeds: Mapping[str, bytes] = field(repr=False)
    keys: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class AgentGone:
    """A device vanished, declined or aborted: nobody waits for it, but what it still sends counts."""

    agent: str


@dataclass(frozen=True, slots=True)
class CloseMasking:
    """The round's deadline has come: go on with the masked vectors that are there."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


ServerEvent = (
    KeysArrived
    | SharesArrived
    | MaskedStored
    | AgreementArrived
    | RevealArrived
    | AgentGone
    | CloseMasking
    | Tick
)

# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendRoster:
    """Send a device who takes part, with the signed keys of its neighbours and its own.

    Attributes:
        to: The device.
        names: All that take part, sorted.
        neighbours: Whose signed keys to attach: sorted, the device itself among them.
    """

    to: str
    names: tuple[str, ...]
    neighbours: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendShares:
    """Pass on to a device what its neighbours sealed for it.

    Attributes:
        to: The device.
        sealed: Sender to ciphertext.
    """

    to: str
    sealed: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class SendSurvivors:
    """Tell a device whose masked vectors are there.

    Attributes:
        to: The device.
        names: Sorted.
    """

    to: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendAgreements:
    """Send a device the signed agreements of these neighbours.

    Attributes:
        to: The device.
        signers: Sorted.
    """

    to: str
    signers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unmask:
    """Sum up the masked vectors of the survivors and take off the masks; see ``unmask.py``."""

    plan: UnmaskPlan = field(repr=False)


@dataclass(frozen=True, slots=True)
class Abort:
    """This context gives no sum. Another attempt needs a new context.

    Attributes:
        reason: For people.
        missing: Who did not answer in time, sorted.
    """

    reason: str
    missing: tuple[str, ...]


ServerCommand = SendRoster | SendShares | SendSurvivors | SendAgreements | Unmask | Abort
