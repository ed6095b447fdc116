"""How a device follows releases, as a state table: events and two clocks in, commands out, no I/O.

::

    IDLE --a manifest names another release--> FETCHING --whole, in a slot--> TESTING --passed--> READY --> ACTIVATING
     ^                                            |  ^                           |                              |
     |                                            v  |                           |                              v
     +-- refused ------------------------------ WAITING (for another try) -------+                         PROBATION
     +---------------------------------------------------------------------------------------- kept, or rolled back

Probation runs beside the rest: a newer release may be fetched and tested meanwhile. Two things always hold: what runs
has passed its self-test, and what a rollback leads to has passed its probation.
"""

from collections.abc import Callable
from typing import Final

from edge_agent.inference.health import Health
from edge_agent.releases.channels import Channels, Known
from edge_agent.releases.rollout_events import (
    Activate,
    Activated,
    Adopt,
    Command,
    Confirm,
    Event,
    Failed,
    Fetched,
    HealthSeen,
    ManifestArrived,
    ManifestRefused,
    NotLoaded,
    Offer,
    Passed,
    Pin,
    Pinned,
    Quarantine,
    Report,
    RollBack,
    RolledBack,
    SelfTest,
    ShowState,
    Started,
    StopWork,
    Tick,
)
from edge_agent.releases.rollout_work import Settings, Stage, Trial, Work
from federation.errors import ReleaseFault
from federation.release import SignedManifest
from federation.wire.release import Channel, Manifest, ReleaseReport, Requirements, RolloutState

WRONG_HASHES: Final = 3
"""Downloads that are not what was signed, though their chunks are, after which the release is refused: one may be due
to a bad disk."""

SLOW_TESTS: Final = 3
"""Self-tests that a release may fail for slowness alone: the device may have been busy with training."""

_DETAIL_CHARS: Final = 900
"""Of a text for people; the wire takes 1000."""


class Rollout:
    """One device's dealings with the releases of its federation.

    Args:
        federation: Whose releases.
        agent: This device.
        session: One life of its inference process.
        settings: Of the operator.
        known: From the disk.
        objection: What the device lacks to run a release; empty if nothing.

    Attributes:
        current: What runs; None if nothing does.
        previous: What a rollback leads to.
    """

    def __init__(
        self,
        federation: str,
        agent: str,
        session: str,
        settings: Settings,
        known: Known,
        *,
        objection: Callable[[Requirements], str] = lambda _: "",
    ) -> None:
        self._session, self._settings, self._objection = session, settings, objection
        eager = settings.channel is Channel.CANARY
        self._channels = Channels(federation, agent, eager=eager, known=known)
        self._unpinned: dict[Channel, SignedManifest] = {}
        self._pin_at = 0.0
        self._told: dict[Channel, tuple[int, ReleaseFault]] = {}
        self._work: Work | None = None
        self._trial: Trial | None = None
        self._rolling = self._withdrawn = False
        self._text = ""
        self._clock = 0.0
        self.current: Offer | None = None
        self.previous: Offer | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Hex release keys that count now, the present one first."""
        return self._channels.keys

    @property
    def on_probation(self) -> bool:
        """Whether :class:`HealthSeen` is wanted."""
        return self._trial is not None

    @property
    def stage(self) -> Stage | None:
        """How far the work on another release is; None when there is none."""
        return None if self._work is None else self._work.stage

    @property
    def target(self) -> Offer | None:
        """The release that is worked on."""
        return None if self._work is None else self._work.offer

    def next_wakeup(self) -> float | None:
        """When :class:`Tick` can next matter, monotonic seconds; expiry is no such time."""
        times = [self._pin_at] if self._unpinned else []
        if self._work is not None and self._work.stage is Stage.WAITING:
            times.append(self._work.retry_at)
        return min(times, default=None)

    def handle(self, event: Event, now: float, wall: float) -> list[Command]:
        """Take one event.

        Args:
            event: What happened.
            now: Monotonic seconds.
            wall: Unix seconds by the device's clock, which may be wrong.

        Returns:
            What to do, in order.
        """
        self._clock, wall = wall, self._channels.time(now, wall)
        match event:
            case Started():
                return self._started(event, now, wall)
            case NotLoaded(fault, detail) if self.current is not None:
                return self._not_loaded(self.current, fault, detail, wall)
            case ManifestArrived(signed, channel):
                return self._manifest_arrived(signed, channel, now, wall)
            case ManifestRefused(channel, fault, detail):
                return self._show(f"{channel.value} manifest refused, {fault.value}: {detail}", wall)
            case Pinned(keys):
                return self._pinned(keys, now)
            case Fetched() | Passed() | Activated() | Failed():
                return self._work_went(event, now, wall)
            case RolledBack(current) if self._rolling:
                return self._rolled_back(current, wall)
            case HealthSeen(health) if self._trial is not None and not self._rolling:
                return self._judge(self._trial, health, now, wall)
            case Tick():
                return self._tick(now, wall)
            case _:
                return []

    def _work_went(
        self, event: Fetched | Passed | Activated | Failed, now: float, wall: float
    ) -> list[Command]:
        work = self._work
        if work is None or work.offer.sha256 != event.sha256:
            return []  # of what is not wanted any more
        match event:
            case Fetched() if work.stage is Stage.FETCHING:
                work.stage = Stage.TESTING
                return [*self._report(work.offer, RolloutState.TESTING, wall), SelfTest(work.offer)]
            case Passed() if work.stage is Stage.TESTING:
                work.stage = Stage.READY
                return self._activate_when_free()
            case Activated() if work.stage is Stage.ACTIVATING:
                return self._activated(work.offer, now, wall)
            case Failed(fault=fault, detail=detail) if work.stage not in (Stage.WAITING, Stage.READY):
                return self._failed(work, fault, detail, now, wall)
        return []

    # --- what a manifest says -------------------------------------------------------------------------------------

    def _manifest_arrived(
        self, signed: SignedManifest, channel: Channel, now: float, wall: float
    ) -> list[Command]:
        manifest = signed.manifest
        if signed.signer:  # the successor: the present key is retired, before anything else is believed
            held = self._unpinned.get(channel)
            if held is None or held.manifest.version < manifest.version:
                self._unpinned[channel] = signed
            return self._pin(now)
        if manifest.version < self._channels.seen(channel):
            running = [] if self.current is None else [self.current.release]
            if manifest.release in (*running, *self._channels.releases()):
                return []  # a broker that delivers out of order must not make this device speak ill of a good release
            detail = (
                f"manifest {manifest.version}, this device has seen {self._channels.seen(channel)}: somebody plays "
                "an old one, or the aggregator was restored from an old backup"
            )
            return self._refuse(manifest, ReleaseFault.DOWNGRADE, detail, wall)
        if not self._channels.is_news(signed):
            return []
        return self._accept(signed, now)

    def _pin(self, now: float) -> list[Command]:
        signed = next(iter(self._unpinned.values()))
        self._pin_at = now + self._settings.retry_s  # if the disk does not take them
        return [Pin((self.keys[signed.signer], signed.manifest.next_key.hex()))]

    def _pinned(self, keys: tuple[str, ...], now: float) -> list[Command]:
        self._channels.rotate(keys)
        waiting, self._unpinned = self._unpinned, {}
        return [command for signed in waiting.values() for command in self._accept(signed, now)]

    def _accept(self, signed: SignedManifest, now: float) -> list[Command]:
        manifest = signed.manifest
        self._channels.accept(signed, now)
        wall = self._channels.time(now, self._clock)
        commands: list[Command] = [*self._channels.remember()]
        release, quarantine = manifest.release, self._channels.quarantine
        if release is None or (self.current is not None and release == self.current.release):
            return commands + self._settle(wall)
        if manifest.expires_at <= wall:
            over = f"it expired {wall - manifest.expires_at:.0f} s ago; is this device's clock right?"
            commands += self._refuse(manifest, ReleaseFault.EXPIRED, over, wall)
        elif release.model.sha256 in quarantine and self._channels.is_meant(manifest):
            commands += self._refuse(
                manifest, ReleaseFault.QUARANTINED, quarantine[release.model.sha256], wall
            )
        return commands + self._settle(wall)

    def _refuse(self, manifest: Manifest, fault: ReleaseFault, detail: str, wall: float) -> list[Command]:
        """Tell why a manifest is not followed, once."""
        told = (manifest.version, fault)
        if self._told.get(manifest.channel) == told:
            return []
        self._told[manifest.channel] = told
        if manifest.release is None:
            return self._show(f"{manifest.channel.value} manifest refused, {fault.value}: {detail}", wall)
        offer = Offer(manifest.release, manifest.version)
        return self._report(offer, RolloutState.REFUSED, wall, fault, detail)

    # --- which release, and how to get there ----------------------------------------------------------------------

    def _settle(self, wall: float) -> list[Command]:
        """Work towards what the manifests say now, and towards nothing else."""
        if self._rolling:
            return []  # once it is over
        offer = self._channels.desired(self.current, wall)
        commands: list[Command] = []
        work = self._work
        if work is not None:
            if offer is not None and offer.release == work.offer.release:
                work.offer = offer
                return []
            commands.append(StopWork(work.offer.sha256))
            self._work = None
        if offer is None:
            return [*commands, *self._show(self._text, wall)]
        if self.current is not None and offer.sha256 == self.current.sha256:
            renamed = offer.release != self.current.release
            self.current = offer
            told = [Adopt(offer), *self._running(wall)] if renamed else self._show(self._text, wall)
            return [*commands, *told]
        if self._trial is not None and self.previous is not None and offer.sha256 == self.previous.sha256:
            return [*commands, *self._roll_back(withdrawn=True)]
        lacking = self._objection(offer.release.requirements)
        if lacking:
            commands += self._decline(offer, ReleaseFault.INCOMPATIBLE, lacking, wall)
            return commands + self._settle(wall)
        delta = offer.release.delta
        held = {one.sha256 for one in (self.current, self.previous) if one is not None}
        self._work = Work(offer, delta is not None and delta.base in held)
        return [*commands, *self._report(offer, RolloutState.FETCHING, wall), self._work.fetch()]

    def _activate_when_free(self) -> list[Command]:
        work = self._work
        if work is None or work.stage is not Stage.READY:
            return []
        if self._trial is not None:
            # What has not passed its probation must not become what a rollback leads to: with something proven to go
            # back to, the trial is cut short; without, it is waited for.
            return self._roll_back(withdrawn=True) if self.previous is not None else []
        work.stage = Stage.ACTIVATING
        return [Activate(work.offer, trial=not self._channels.is_proven(work.offer))]

    def _activated(self, offer: Offer, now: float, wall: float) -> list[Command]:
        self.previous, self.current, self._work = self.current, offer, None
        self._trial = None if self._channels.is_proven(offer) else Trial(now)
        return self._running(wall)

    def _running(self, wall: float) -> list[Command]:
        assert self.current is not None
        state = RolloutState.CONFIRMED if self._trial is None else RolloutState.PROBATION
        return self._report(self.current, state, wall)

    # --- what goes wrong on the way -------------------------------------------------------------------------------

    def _failed(
        self, work: Work, fault: ReleaseFault | None, detail: str, now: float, wall: float
    ) -> list[Command]:
        if fault is ReleaseFault.WRONG_HASH:
            work.wrong_hashes += 1
            if work.delta or work.wrong_hashes < WRONG_HASHES:
                work.delta = False
                return [work.fetch()]
            self._work = None
            return [*self._decline(work.offer, fault, detail, wall), *self._settle(wall)]
        work.slow_tests += fault is ReleaseFault.TOO_SLOW
        slow_again = fault is ReleaseFault.TOO_SLOW and work.slow_tests < SLOW_TESTS
        if fault is None or fault is ReleaseFault.NO_SPACE or slow_again:
            return self._wait(work, fault, detail, now, wall)
        self._work = None
        return [
            *self._condemn(work.offer, fault, detail),
            *self._report(work.offer, RolloutState.REFUSED, wall, fault, detail),
            *self._settle(wall),
        ]

    def _wait(
        self, work: Work, fault: ReleaseFault | None, detail: str, now: float, wall: float
    ) -> list[Command]:
        wait_s = work.wait(self._settings.retry_s, now)
        text = f"{detail}; tried again in {wait_s:.0f} s"
        if fault is ReleaseFault.NO_SPACE and work.failures == 1:
            return self._report(work.offer, RolloutState.REFUSED, wall, fault, text)
        return self._show(text, wall)

    def _decline(self, offer: Offer, fault: ReleaseFault, detail: str, wall: float) -> list[Command]:
        self._channels.decline(offer)
        return self._report(offer, RolloutState.REFUSED, wall, fault, detail)

    def _condemn(self, offer: Offer, fault: ReleaseFault, detail: str) -> list[Command]:
        self._channels.condemn(offer, fault, detail)
        return [Quarantine(offer.sha256, fault, detail[:_DETAIL_CHARS])]

    def _tick(self, now: float, wall: float) -> list[Command]:
        if self._unpinned and now >= self._pin_at:
            return self._pin(now)
        work = self._work
        if work is None or self._rolling:
            return []
        desired = self._channels.desired(self.current, wall)
        if desired is None or desired.release != work.offer.release:
            over = "its manifest expired before it was taken up"
            told = self._report(work.offer, RolloutState.REFUSED, wall, ReleaseFault.EXPIRED, over)
            return [*told, *self._settle(wall)]
        return [work.fetch()] if work.stage is Stage.WAITING and now >= work.retry_at else []

    # --- probation ------------------------------------------------------------------------------------------------

    def _started(self, event: Started, now: float, wall: float) -> list[Command]:
        self.current, self.previous = event.current, event.previous
        if event.current is None:
            return self._show("no model yet: waiting for the first release", wall)
        self._trial = Trial(now) if event.trial else None
        if event.crashes and event.trial:
            detail = "the process ended again and again since it was activated"
            return self._give_up(event.current, ReleaseFault.CRASHED, detail, wall)
        return self._running(wall)

    def _not_loaded(self, current: Offer, fault: ReleaseFault, detail: str, wall: float) -> list[Command]:
        if fault is not ReleaseFault.WRONG_HASH:
            return self._give_up(current, fault, detail, wall)
        # The disk has changed it: the release is innocent, and is fetched again when a manifest names it.
        told = self._report(current, RolloutState.ROLLED_BACK, wall, fault, detail)
        return [*told, *self._roll_back(withdrawn=False)]

    def _judge(self, trial: Trial, health: Health, now: float, wall: float) -> list[Command]:
        assert self.current is not None
        trial.health = health
        found = trial.fault(self._settings, now)
        if found is not None:
            return self._give_up(self.current, *found, wall)
        return self._confirm(self.current, wall) if trial.over(self._settings, now) else []

    def _confirm(self, offer: Offer, wall: float) -> list[Command]:
        told = self._report(offer, RolloutState.CONFIRMED, wall)
        self._trial = None
        self._channels.prove(offer)
        return [Confirm(offer), *self._channels.remember(), *told, *self._activate_when_free()]

    def _give_up(self, offer: Offer, fault: ReleaseFault, detail: str, wall: float) -> list[Command]:
        """Take the current release away for good."""
        if self.previous is None:
            detail = (
                f"{detail}; there is no earlier release on this device: nothing is labelled until one comes"
            )
        return [
            *self._condemn(offer, fault, detail),
            *self._report(offer, RolloutState.ROLLED_BACK, wall, fault, detail),
            *self._roll_back(withdrawn=False),
        ]

    def _roll_back(self, *, withdrawn: bool) -> list[Command]:
        self._rolling, self._withdrawn = True, withdrawn
        return [RollBack()]

    def _rolled_back(self, current: Offer | None, wall: float) -> list[Command]:
        self._rolling, self._trial, self.previous = False, None, None
        self.current = current
        settled = [*self._activate_when_free(), *self._settle(wall)]
        if settled and isinstance(settled[0], Activate):
            return settled
        # After a fault the report of it stands; a release that was only taken back needs a word about what runs now.
        told = self._running(wall) if self._withdrawn and current is not None else []
        return [*told, *settled]

    # --- what others are told -------------------------------------------------------------------------------------

    def _report(
        self,
        offer: Offer,
        state: RolloutState,
        wall: float,
        fault: ReleaseFault | None = None,
        detail: str = "",
    ) -> list[Command]:
        runs = self.previous if state is RolloutState.ROLLED_BACK else self.current
        about_current = self.current is not None and self.current.sha256 == offer.sha256
        health = self._trial.health if self._trial is not None and about_current else None
        number = offer.release.number
        report = ReleaseReport(
            session=self._session,
            number=number,
            sha256=offer.sha256,
            manifest=offer.manifest,
            state=state,
            time=wall,
            fault=fault,
            detail=detail[:_DETAIL_CHARS],
            running=None if runs is None else runs.release.number,
            frames=0 if health is None else health.frames,
            p50_ms=None if health is None else health.p50_ms,
            p99_ms=None if health is None else health.p99_ms,
        )
        because = "" if fault is None else f", {fault.value}: {detail}"
        return [
            Report(report),
            *self._show(f"release {number} {state.value.replace('_', ' ')}{because}", wall),
        ]

    def _show(self, text: str, wall: float) -> list[Command]:
        self._text = text[:_DETAIL_CHARS]
        latest = self._channels.desired(self.current, wall) or self.current
        installed = None if self.current is None else self.current.release.number
        return [
            ShowState(
                installed,
                None if latest is None else latest.release.number,
                self._work is not None,
                self._text,
            )
        ]
