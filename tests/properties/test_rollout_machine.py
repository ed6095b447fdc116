"""edge_agent.releases.rollout under any order of manifests, faults, frames and power cuts."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from release_authority import Authority, key_of

from edge_agent.inference.health import Health
from edge_agent.releases.channels import Known
from edge_agent.releases.rollout import Rollout
from edge_agent.releases.rollout_events import (
    Activate,
    Activated,
    Adopt,
    Command,
    Confirm,
    Event,
    Failed,
    Fetch,
    Fetched,
    HealthSeen,
    ManifestArrived,
    ManifestRefused,
    Offer,
    Passed,
    Pin,
    Pinned,
    Quarantine,
    Remember,
    Report,
    RollBack,
    RolledBack,
    SelfTest,
    ShowState,
    Started,
    StopWork,
    Tick,
)
from edge_agent.releases.rollout_work import Settings, Stage
from federation.errors import ReleaseFault
from federation.release import SignedManifest
from federation.wire.release import Channel, Release, RolloutState

RELEASES = 5
PROBATION_S = 60.0
SETTINGS = Settings(
    Channel.CANARY, max_latency_ms=100.0, probation_s=PROBATION_S, probation_frames=5, retry_s=30.0
)

AUTHORITY = Authority()
MODELS = [AUTHORITY.release(number) for number in range(1, RELEASES + 1)]
NAMED_ANEW = AUTHORITY.release(RELEASES + 1, model=AUTHORITY.objects[MODELS[0].model.sha256])
"""The first model once more, under another number."""

releases = st.sampled_from([*MODELS, NAMED_ANEW])
channels = st.sampled_from(Channel)
faults = st.sampled_from(
    [ReleaseFault.BROKEN, ReleaseFault.NON_FINITE, ReleaseFault.TOO_SLOW, ReleaseFault.NO_SPACE, None]
)


class PowerCutError(Exception):
    """In the middle of what the device was doing."""


@dataclass
class Disk:
    """What survives."""

    known: Known
    current: Offer | None = None
    previous: Offer | None = None
    trial: bool = False
    starts: int = 0
    quarantine: dict[str, str] = field(default_factory=dict)


class Device(RuleBasedStateMachine):
    """A device whose disk is a few attributes, and an observer who knows what may run."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.wall = self.right = 0.0  # monotonic, the device's clock, and the aggregator's
        self.disk = Disk(Known(("a" * 64, "b" * 64)))
        self.version = 10
        self.fuse: int | None = None
        self.cuts = 0
        self.fetching: Offer | None = None
        self.testing: Offer | None = None
        self.events: list[Event] = []
        # what the observer knows
        self.named: set[tuple[int, str]] = set()
        self.passed: set[str] = set()
        self.proven: set[str] = set()
        self.failed: set[str] = set()
        self.start()

    # --- what comes over the broker -------------------------------------------------------------------------------

    @rule(channel=channels, release=st.none() | releases, lifetime_s=st.sampled_from([1e9, 1e9, 100.0, 0.0]))
    def a_manifest_comes(self, channel: Channel, release: Release | None, lifetime_s: float) -> None:
        self.version += 1
        self.arrives(channel, release, self.version, lifetime_s)

    @rule(channel=channels, release=releases, older=st.integers(1, 10))
    def an_old_manifest_is_played(self, channel: Channel, release: Release, older: int) -> None:
        version = max(1, self.version - older)
        seen = self.disk.known.versions.get(channel, 0)
        before = self.running, self.table.keys, self.table.stage
        self.arrives(channel, release, version, 1e9)
        if version < seen:
            assert (self.running, self.table.keys, self.table.stage) == before, "a downgrade"

    @rule(channel=channels, release=st.none() | releases)
    def the_successor_signs(self, channel: Channel, release: Release | None) -> None:
        self.version += 1
        keys, cuts = self.table.keys, self.cuts
        self.arrives(channel, release, self.version, 1e9, signer=1)
        if self.cuts == cuts:
            assert self.table.keys[0] == keys[1]

    @rule(channel=channels, fault=st.sampled_from([ReleaseFault.BAD_SIGNATURE, ReleaseFault.MALFORMED]))
    def a_stranger_signs(self, channel: Channel, fault: ReleaseFault) -> None:
        before = self.running, self.table.stage
        self.feed(ManifestRefused(channel, fault, "not signed"))
        assert (self.running, self.table.stage) == before

    def arrives(
        self, channel: Channel, release: Release | None, version: int, lifetime_s: float, signer: int = 0
    ) -> None:
        AUTHORITY.issued_at = self.right
        manifest = AUTHORITY.manifest(
            release, channel, version=version, lifetime_s=lifetime_s, next_key=key_of(f"{version}")
        )
        if release is not None and lifetime_s > 0:
            self.named.add((release.number, release.model.sha256))
        self.feed(ManifestArrived(SignedManifest(manifest, signer, b"sealed"), channel))

    # --- the device -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.fetching is not None)
    @rule(fault=st.just("") | faults | st.just(ReleaseFault.WRONG_HASH))
    def a_fetch_ends(self, fault: ReleaseFault | str | None) -> None:
        assert self.fetching is not None
        offer, self.fetching = self.fetching, None
        if isinstance(fault, ReleaseFault) or fault is None:
            self.feed(Failed(offer.sha256, fault, "it is so"))
        else:
            self.feed(Fetched(offer.sha256))

    @precondition(lambda self: self.testing is not None)
    @rule(fault=st.just("") | faults)
    def a_test_ends(self, fault: ReleaseFault | str | None) -> None:
        assert self.testing is not None
        offer, self.testing = self.testing, None
        cuts = self.cuts
        if isinstance(fault, ReleaseFault) or fault is None:
            self.feed(Failed(offer.sha256, fault, "it is so"))
            if fault in (ReleaseFault.BROKEN, ReleaseFault.NON_FINITE) and self.cuts == cuts:
                self.failed.add(offer.sha256)
        else:
            self.passed.add(offer.sha256)
            self.feed(Passed(offer.sha256))

    @precondition(lambda self: self.fetching is not None or self.testing is not None)
    @rule(kept=st.booleans())
    def the_release_is_good(self, kept: bool) -> None:
        """The usual case, which chance alone would seldom bring about."""
        if self.fetching is not None:
            self.a_fetch_ends("")
        if self.testing is not None:
            self.a_test_ends("")
        if kept:
            self.frames_are_labelled(Health(frames=1000, p50_ms=5.0, p99_ms=9.0), PROBATION_S)

    @rule(release=releases)
    def a_test_of_something_that_is_not_wanted_any_more_ends(self, release: Release) -> None:
        if self.testing is None or self.testing.sha256 != release.model.sha256:
            before = self.running
            self.feed(Passed(release.model.sha256))
            assert self.running == before

    @rule(
        health=st.sampled_from(
            [
                Health(frames=1000, p50_ms=5.0, p99_ms=9.0),
                Health(frames=3, p50_ms=5.0, p99_ms=9.0),
                Health(frames=10, errors=1),
                Health(frames=0, non_finite=1),
                Health(frames=1000, p50_ms=5.0, p99_ms=900.0),
                Health(frames=1000, p50_ms=500.0, p99_ms=900.0),
            ]
        ),
        seconds=st.sampled_from([0.0, PROBATION_S]),
    )
    def frames_are_labelled(self, health: Health, seconds: float) -> None:
        self.pass_time(seconds)
        judged, cuts = self.table.current if self.table.on_probation else None, self.cuts
        self.feed(HealthSeen(health))
        if judged is not None and (health.errors or health.non_finite) and self.cuts == cuts:
            self.failed.add(judged.sha256)

    @rule(seconds=st.sampled_from([1.0, 30.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        self.pass_time(seconds)
        self.feed(Tick())
        wakeup = self.table.next_wakeup()
        assert wakeup is None or wakeup > self.now, "a wakeup in the past would keep a processor busy"

    @rule()
    def the_clock_falls_back(self) -> None:
        self.wall = 0.0

    @rule(steps=st.integers(0, 6))
    def the_power_will_fail(self, steps: int) -> None:
        """After so many more steps on the disk."""
        self.fuse = steps

    @rule(orderly=st.booleans())
    def the_process_starts_anew(self, orderly: bool) -> None:
        if orderly and self.disk.starts:
            self.disk.starts -= 1
        self.start()

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def only_what_may_run_runs(self) -> None:
        current = self.table.current
        if current is None:
            assert not self.proven, "it had a good model once"
            return
        assert (current.release.number, current.sha256) in self.named, "named by a valid manifest"
        assert current.sha256 in self.passed, "tested"
        assert current.sha256 not in self.disk.quarantine, "not given up"
        assert current.sha256 not in self.failed, "never again"

    @invariant()
    def a_rollback_leads_to_what_is_proven(self) -> None:
        for previous in (self.table.previous, self.disk.previous):
            assert previous is None or previous.sha256 in self.proven

    @invariant()
    def the_disk_knows(self) -> None:
        for one, other in (
            (self.table.current, self.disk.current),
            (self.table.previous, self.disk.previous),
        ):
            # The manifest that named it last is not worth a write.
            assert (one and one.release) == (other and other.release)
        assert self.table.on_probation == self.disk.trial

    @invariant()
    def one_thing_at_a_time(self) -> None:
        assert (self.fetching is not None) == (self.table.stage is Stage.FETCHING)
        assert (self.testing is not None) == (self.table.stage is Stage.TESTING)

    # --- the disk and the loop ------------------------------------------------------------------------------------

    @property
    def running(self) -> str | None:
        return None if self.table.current is None else self.table.current.sha256

    def start(self) -> None:
        """As ``Slots`` and the follower do at the start of a process."""
        self.fuse = None
        self.fetching = self.testing = None
        self.events.clear()
        disk = self.disk
        if disk.current is not None and disk.current.sha256 in disk.quarantine:
            self.go_back()
        if disk.trial:
            disk.starts += 1
        known = disk.known
        known = Known(
            known.keys, known.versions, known.newest, known.issued_at, known.proven, dict(disk.quarantine)
        )
        self.table = Rollout("garden", "pi1", "ab" * 8, SETTINGS, known)
        self.feed(Started(disk.current, disk.previous, trial=disk.trial, crashes=disk.starts >= 3))

    def go_back(self) -> None:
        self.disk.current, self.disk.previous = self.disk.previous, None
        self.disk.trial, self.disk.starts = False, 0

    def pass_time(self, seconds: float) -> None:
        self.now, self.wall, self.right = self.now + seconds, self.wall + seconds, self.right + seconds

    def feed(self, event: Event) -> None:
        self.events.append(event)
        try:
            while self.events:
                for command in self.table.handle(self.events.pop(0), self.now, self.wall):
                    self.carry_out(command)
        except PowerCutError:
            self.cuts += 1
            self.start()

    def spend(self) -> None:
        if self.fuse is not None:
            if not self.fuse:
                raise PowerCutError
            self.fuse -= 1

    def carry_out(self, command: Command) -> None:
        disk = self.disk
        match command:
            case Report(report):
                self.check(report.state, report.sha256)
                return
            case ShowState():
                return
        self.spend()
        match command:
            case Pin(keys):
                assert keys[0] == self.table.keys[1], "the successor, and nobody else"
                disk.known = Known(keys, proven=disk.known.proven)
                self.events.append(Pinned(keys))
            case Remember(versions, newest, issued_at, proven):
                for channel, version in disk.known.versions.items():
                    assert versions[channel] >= version, "a version that has fallen"
                disk.known = Known(disk.known.keys, versions, newest, issued_at, proven)
            case Activate() | RollBack() | Quarantine() | Confirm() | Adopt():
                self.change(command)
            case Fetch(offer):
                assert offer.sha256 not in disk.quarantine
                self.fetching = offer
            case StopWork():
                self.fetching = self.testing = None
            case SelfTest(offer):
                self.testing = offer

    def change(self, command: Command) -> None:
        """What runs, or may run."""
        disk = self.disk
        match command:
            case Activate(offer, trial):
                assert offer.sha256 in self.passed
                assert trial is (offer.sha256 not in self.proven)
                assert not disk.trial, "a trial in a trial"
                disk.previous, disk.current = disk.current, offer
                disk.trial, disk.starts = trial, 0
                self.spend()
                self.events.append(Activated(offer.sha256))
            case Adopt(offer):
                assert disk.current is not None
                assert disk.current.sha256 == offer.sha256
                disk.current = offer
            case Quarantine(sha256, fault, detail):
                disk.quarantine[sha256] = f"{fault.value}: {detail}"
            case RollBack():
                before = disk.previous
                self.go_back()
                assert disk.current is before, "a rollback ends in the previous one"
                self.spend()
                self.events.append(RolledBack(disk.current))
            case Confirm(offer):
                assert disk.current is not None
                assert disk.current.sha256 == offer.sha256
                disk.trial = False
                self.proven.add(offer.sha256)

    def check(self, state: RolloutState, sha256: str) -> None:
        assert state is not RolloutState.CONFIRMED or sha256 in self.passed


TestDevice = Device.TestCase
TestDevice.settings = settings(deadline=None, max_examples=250, stateful_step_count=40)
