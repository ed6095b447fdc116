"""What happens to a rollout, and what it asks for: the events and commands of ``aggregator.releases.rollouts``."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregator.releases.records import ReleaseState
from federation.errors import ReleaseFault
from federation.wire.release import Channel, RolloutState

# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Released:
    """The operator, or the end of a run, released something.

    Attributes:
        number: Of a release that is in the store.
        channel: Canary, or stable for all devices at once.
        share: Of the devices in a canary's first step; at 1 the release goes to all devices at once.
        first_manifest: The next manifest has at least this version: older reports are about an earlier attempt.
    """

    number: int
    channel: Channel
    share: float
    first_manifest: int


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The operator takes back the canary and, unless ``number`` is None, lets the stable channel go back to it."""

    number: int | None


@dataclass(frozen=True, slots=True)
class Reported:
    """A device said how far it is with a release; that is on disk.

    Attributes:
        agent: Its name.
        number: Of the release.
        manifest: Version of the manifest that brought it.
        state: How far.
        fault: Why it failed.
    """

    agent: str
    number: int
    manifest: int
    state: RolloutState
    fault: ReleaseFault | None = None


@dataclass(frozen=True, slots=True)
class FollowerSeen:
    """A device that runs models came or went."""

    agent: str
    online: bool


@dataclass(frozen=True, slots=True)
class FollowerGone:
    """A device is not enrolled any more: what it said does not count."""

    agent: str


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The link to the broker is up: what it has kept comes now."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link is down: silence means nothing."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Released | RolledBack | Reported | FollowerSeen | FollowerGone | LinkUp | LinkDown | Tick

# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tally:
    """Where the devices of a step stand.

    Attributes:
        devices: In the step.
        confirmed: Run it for good.
        failed: Refused it, went back, or were lost with it.
        waiting: Are online and have not said either.
        vanished: Went offline while they tested the release or were on probation with it.
        away: Are offline and had not begun.
        faults: Why devices failed: how many for each code; ``lost`` for those that never came back.
    """

    devices: int = 0
    confirmed: int = 0
    failed: int = 0
    waiting: int = 0
    vanished: int = 0
    away: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Devices whose answer is final."""
        return self.confirmed + self.failed

    @property
    def causes(self) -> str:
        """The faults, for people."""
        return ", ".join(f"{code} {count}" for code, count in sorted(self.faults.items())) or "none"


@dataclass(frozen=True, slots=True)
class Announce:
    """Record what a channel says from now on, and publish it.

    Attributes:
        channel: Which.
        number: Of its release; None empties it.
        share: Of the devices.
        first_manifest: As in :class:`Released`.
    """

    channel: Channel
    number: int | None
    share: float
    first_manifest: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Record what has become of a release."""

    number: int
    state: ReleaseState
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Tell the operator.

    Attributes:
        event: Name of the log line (docs/operations.md).
        number: Of the release.
        share: That was reached.
        tally: On which that was decided.
    """

    event: str
    number: int
    share: float
    tally: Tally


Command = Announce | Mark | Note

# --- what the store keeps --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CanaryRecord:
    """What the store knows of a canary that is under way.

    Attributes:
        number: Of the release.
        share: Of the devices.
        first_manifest: As in :class:`Released`.
        elapsed_s: Seconds since the step began, by the wall clock, which may have been set since.
    """

    number: int
    share: float
    first_manifest: int
    elapsed_s: float


class ForReleases:
    """Base of what other threads post to the server's loop for ``aggregator.releases.service``."""

    __slots__ = ()
