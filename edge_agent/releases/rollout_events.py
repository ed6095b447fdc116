"""What happens to a device that follows releases, and what its state table (``rollout``) tells it to do."""

from dataclasses import dataclass, field

from edge_agent.inference.health import Health
from federation.errors import ReleaseFault
from federation.release import SignedManifest
from federation.wire.messages import ObjectRef
from federation.wire.release import Channel, Release, ReleaseDelta, ReleaseReport


@dataclass(frozen=True, slots=True)
class Offer:
    """A release and the manifest that brought it.

    Attributes:
        release: What to run.
        manifest: Its version.
        envelope: The signed manifest, as it came; empty for what was read from a slot.
    """

    release: Release
    manifest: int
    envelope: bytes = field(default=b"", repr=False, compare=False)

    @property
    def sha256(self) -> str:
        """Of the model: what a slot is called, and what is quarantined."""
        return self.release.model.sha256


# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The process began; what is on disk was checked.

    Attributes:
        current: What is to run; None for a device without a model.
        previous: Where a rollback would lead.
        trial: Whether the current one is on probation.
        crashes: It was started so often during its probation that it must be what crashes the process.
    """

    current: Offer | None
    previous: Offer | None
    trial: bool = False
    crashes: bool = False


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """The current release cannot be loaded, though it once was.

    Attributes:
        fault: What is wrong with it.
        detail: For people.
    """

    fault: ReleaseFault
    detail: str


@dataclass(frozen=True, slots=True)
class ManifestArrived:
    """A manifest whose signature was verified with a pinned key came on this channel."""

    signed: SignedManifest
    channel: Channel


@dataclass(frozen=True, slots=True)
class ManifestRefused:
    """Something came on a channel that no pinned key has signed for this federation."""

    channel: Channel
    fault: ReleaseFault
    detail: str


@dataclass(frozen=True, slots=True)
class Pinned:
    """The new keys are on disk."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fetched:
    """The release is whole in a slot, its hashes checked."""

    sha256: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Fetching, testing or activating a release did not work.

    Attributes:
        sha256: Of its model.
        fault: What is wrong with the release; None where the fault is this device's: it is tried again.
        detail: For people.
    """

    sha256: str
    fault: ReleaseFault | None
    detail: str


@dataclass(frozen=True, slots=True)
class Passed:
    """The release passed its self-test."""

    sha256: str


@dataclass(frozen=True, slots=True)
class Activated:
    """The release is the current one, on disk and in the loop over the frames."""

    sha256: str


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The previous release is the current one again, on disk and in the loop.

    Attributes:
        current: What runs now; None where there was nothing to go back to.
    """

    current: Offer | None


@dataclass(frozen=True, slots=True)
class HealthSeen:
    """How the current release does since it was installed."""

    health: Health


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Started
    | NotLoaded
    | ManifestArrived
    | ManifestRefused
    | Pinned
    | Fetched
    | Failed
    | Passed
    | Activated
    | RolledBack
    | HealthSeen
    | Tick
)

# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep these keys on disk in place of the former, forget there what was seen of manifests, then feed :class:`Pinned`.

    Nothing is obeyed before.
    """

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep on disk what protects from old manifests.

    Attributes:
        versions: Newest manifest version seen on each channel.
        newest: The highest of all, and
        issued_at: its time, Unix seconds.
        proven: SHA-256 of the models that passed their probation here, the newest last.
    """

    versions: dict[Channel, int]
    newest: int
    issued_at: float
    proven: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring a release into a slot; at once where one holds it already.

    Attributes:
        offer: What to bring.
        delta: The shorter way to its model; None for the whole file.
    """

    offer: Offer
    delta: ReleaseDelta | None

    @property
    def objects(self) -> tuple[ObjectRef, ...]:
        """What is downloaded, in this order: the small golden set first."""
        release = self.offer.release
        return release.golden, release.model if self.delta is None else self.delta.object


@dataclass(frozen=True, slots=True)
class StopWork:
    """Stop fetching or testing: nobody wants that release any more. What has arrived stays on disk."""

    sha256: str


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Run the self-test of the slot."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class Activate:
    """Make the release the current one.

    Attributes:
        offer: Which.
        trial: Whether probation begins; not for one that passed it before.
    """

    offer: Offer
    trial: bool


@dataclass(frozen=True, slots=True)
class Adopt:
    """The current model has been released again under another number: note the number."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class RollBack:
    """Make the previous release the current one, then feed :class:`RolledBack`."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Never run this model again on this device."""

    sha256: str
    fault: ReleaseFault
    detail: str


@dataclass(frozen=True, slots=True)
class Confirm:
    """Probation is over: the current release is kept."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the aggregator."""

    report: ReleaseReport


@dataclass(frozen=True, slots=True)
class ShowState:
    """Tell people and Home Assistant.

    Attributes:
        installed: Number of the current release; None without.
        latest: Number of the one that this device was told to run.
        busy: Whether that is being fetched or tested.
        text: What happened last.
    """

    installed: int | None
    latest: int | None
    busy: bool
    text: str


Command = (
    Pin
    | Remember
    | Fetch
    | StopWork
    | SelfTest
    | Activate
    | Adopt
    | RollBack
    | Quarantine
    | Confirm
    | Report
    | ShowState
)
