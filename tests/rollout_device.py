"""A device's state table of releases with a disk of attributes: commands are carried out at once, as far as a test lets them."""

from dataclasses import dataclass, field

from release_authority import Authority

from edge_agent.inference.health import Health
from edge_agent.releases.channels import Known
from edge_agent.releases.rollout import Rollout
from edge_agent.releases.rollout_events import (
    Activate,
    Activated,
    Command,
    Event,
    Failed,
    Fetch,
    Fetched,
    HealthSeen,
    ManifestArrived,
    Offer,
    Passed,
    Pin,
    Pinned,
    Report,
    RollBack,
    RolledBack,
    SelfTest,
    ShowState,
    Started,
)
from edge_agent.releases.rollout_work import Settings
from federation.errors import ReleaseFault
from federation.release import SignedManifest
from federation.wire.release import Channel, Manifest, Release, ReleaseReport, Requirements, RolloutState

AGENT = "pi1"
SETTINGS = Settings(Channel.STABLE, max_latency_ms=100.0, probation_s=60.0, probation_frames=20, retry_s=30.0)
GOOD = Health(frames=1000, p50_ms=5.0, p99_ms=9.0)


@dataclass
class Device:
    """One device.

    Attributes:
        authority: Who signs.
        settings: Of its operator.
        lacks: What it says of every release's requirements.
        wall: Its clock, Unix seconds.
    """

    authority: Authority = field(default_factory=Authority)
    settings: Settings = SETTINGS
    lacks: str = ""
    wall: float = 1_900_000_000.0
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.commands: list[Command] = []
        self.begin(Known(self.authority.keys))

    def begin(self, known: Known) -> None:
        self.table = Rollout("garden", AGENT, "ab" * 8, self.settings, known, objection=self.objection)

    def objection(self, requirements: Requirements) -> str:
        assert isinstance(requirements, Requirements)
        return self.lacks

    def feed(self, event: Event) -> list[Command]:
        """Only decide."""
        commands = self.table.handle(event, self.now, self.wall)
        self.commands += commands
        return commands

    def arrives(self, manifest: Manifest, signer: int = 0) -> list[Command]:
        """A manifest, its signature verified."""
        signed = SignedManifest(manifest, signer, f"envelope {manifest.version}".encode())
        return self.feed(ManifestArrived(signed, manifest.channel))

    def goes_well(self, commands: list[Command]) -> None:
        """Carry out these commands and all that follow from them, without a fault."""
        pending = list(commands)
        while pending:
            match pending.pop(0):
                case Pin(keys):
                    pending += self.feed(Pinned(keys))
                case Fetch(offer):
                    pending += self.feed(Fetched(offer.sha256))
                case SelfTest(offer):
                    pending += self.feed(Passed(offer.sha256))
                case Activate(offer):
                    pending += self.feed(Activated(offer.sha256))
                case RollBack():
                    pending += self.feed(RolledBack(self.table.previous))

    def fails(self, release: Release, fault: ReleaseFault | None, detail: str = "it is so") -> list[Command]:
        return self.feed(Failed(release.model.sha256, fault, detail))

    def takes(self, release: Release, channel: Channel = Channel.STABLE) -> None:
        """A release comes, is activated and passes its probation."""
        self.goes_well(self.arrives(self.authority.manifest(release, channel)))
        assert self.running == release.number
        self.passes_probation()

    def passes_probation(self) -> None:
        self.now += self.settings.probation_s
        self.goes_well(self.seen(GOOD))
        assert not self.table.on_probation

    def seen(self, health: Health) -> list[Command]:
        return self.feed(HealthSeen(health))

    def restarts(
        self, known: Known, current: Offer | None, previous: Offer | None, **more: bool
    ) -> list[Command]:
        self.begin(known)
        return self.feed(Started(current, previous, **more))

    @property
    def running(self) -> int | None:
        """Number of the release that runs."""
        return None if self.table.current is None else self.table.current.release.number

    @property
    def reports(self) -> list[ReleaseReport]:
        return [command.report for command in self.commands if isinstance(command, Report)]

    @property
    def last(self) -> tuple[int, RolloutState, ReleaseFault | None]:
        """The gist of the last report."""
        report = self.reports[-1]
        return report.number, report.state, report.fault

    @property
    def shown(self) -> ShowState:
        return [command for command in self.commands if isinstance(command, ShowState)][-1]


def kinds(commands: list[Command]) -> list[type[Command]]:
    """What is done, without what is only told."""
    return [type(command) for command in commands if not isinstance(command, Report | ShowState)]
