"""Releases, as the server sees them: carries out what operators ask and what the rollout decides, and tells the devices."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.config import ReleaseConfig
from aggregator.releases.after_run import AfterRun, Made, MakeRelease
from aggregator.releases.keys import ReleaseKeys
from aggregator.releases.manifests import ReleaseManifests
from aggregator.releases.reception import ReleaseReception
from aggregator.releases.records import RequestKind, StoredRelease, StoredRequest
from aggregator.releases.rollout_events import (
    CanaryRecord,
    Command,
    Event,
    FollowerGone,
    ForReleases,
    LinkDown,
    LinkUp,
    Note,
    Released,
    Reported,
    RolledBack,
    Tick,
)
from aggregator.releases.rollouts import Rollouts
from aggregator.releases.store import ReleaseStore
from aggregator.seeding import Seeder
from aggregator.store import Store
from federation.wire.link import LinkLike
from federation.wire.release import Channel, Release
from federation.wire.topics import Topics

log = structlog.get_logger()

POLL_S = 1.0
"""Between two looks for requests of other processes: one pragma, no read of any table while nothing has changed."""

FILES_KEPT = 20
"""Newest releases whose files stay on the server's disk."""

DRAIN_S = 30.0
"""How long the end of a run waits for a broker that is gone before what it has not heard is left to the next server."""

REMEDIES = {
    "canary_begun": "",
    "canary_widened": "",
    "canary_promoted": "",
    "canary_halted": "devices go back to the stable release by themselves; mend the model, then release it anew",
    "canary_held": "nobody who should have confirmed it did: look at `aggregator status`, then release it to all, or roll it back",
}
"""For each line that the rollout may write: what the operator can do."""


@dataclass(frozen=True, slots=True)
class ObjectsKept(ForReleases):
    """The broker holds all objects that were asked for under this name."""

    name: str


class Enrolled(Protocol):
    """What is asked of the enrolment."""

    def key_of(self, agent: str) -> Ed25519PublicKey | None:
        """As ``Enrolment.key_of``."""
        ...

    def agents(self) -> Mapping[str, str]:
        """As ``Enrolment.agents``."""
        ...


class ReleaseService:
    """The server's part in releases. Single-threaded; knows nothing of rounds.

    Args:
        store: Of the state folder, locked by the caller.
        config: Settings of releases.
        topics: Of the federation.
        link: To publish on.
        keys: Sign manifests.
        enrolled: Who is enrolled.
        seeder: Brings objects to the broker; what it tells comes back to :meth:`take`.
        submit: Does work elsewhere and hands its result to :meth:`take`.
        make: Makes a release of a finished run's model; None where nothing is released by itself.
    """

    def __init__(
        self,
        *,
        store: Store,
        config: ReleaseConfig,
        topics: Topics,
        link: LinkLike,
        keys: ReleaseKeys,
        enrolled: Enrolled,
        seeder: Seeder,
        submit: Callable[[Callable[[], object]], None],
        make: MakeRelease | None = None,
    ) -> None:
        self._releases = ReleaseStore(store)
        self._config, self._link, self._enrolled, self._seeder = config, link, enrolled, seeder
        self._manifests = ReleaseManifests(self._releases, topics, keys, config.expiry_days, link)
        self._reception = ReleaseReception(store, self._releases, topics.federation, enrolled.key_of)
        stable = self._releases.current(Channel.STABLE)
        self._rollouts = Rollouts(topics.federation, config, stable=None if stable is None else stable.number)
        self._after_run = AfterRun(store, submit, make)
        self._poll_due = 0.0
        self._connected = False
        self._lost_at: float | None = None
        self._wanted: frozenset[int] = frozenset()
        self._present: frozenset[int] = frozenset()
        self._unfit: set[int] = set()

    # --- what the server tells it -------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Go on from what the store knows; to be called before anything is seeded for a round."""
        known = self._releases.followers()
        followers = [agent for agent in known if self._enrolled.key_of(agent) is not None]
        for agent in known.keys() - set(followers):  # revoked while no server ran
            self._reception.forget(agent)
        channel = self._releases.channel(Channel.CANARY)
        record, reports = None, []
        if channel is not None and channel.number is not None:
            record = CanaryRecord(
                channel.number, channel.share, channel.first_manifest, time.time() - channel.began_at
            )
            reports = [
                Reported(
                    row.agent, row.report.number, row.report.manifest, row.report.state, row.report.fault
                )
                for row in self._releases.reports(channel.number).values()
                if row.agent in followers
            ]
            log.info("canary_resumed", release=channel.number, share=channel.share, reports=len(reports))
        self._carry_out(self._rollouts.start(now, followers, record, reports))
        self._seed()

    def connected(self, now: float) -> None:
        """The link is up: say everything again, and hear what was said meanwhile."""
        self._connected, self._lost_at = True, None
        self._reception.connected()
        self._seed()  # the broker may take other chunks than the one before
        self._manifests.connected(now)
        self._feed(LinkUp(), now)

    def disconnected(self, now: float) -> None:
        """The link is down."""
        self._connected = False
        self._lost_at = now if self._lost_at is None else self._lost_at
        self._feed(LinkDown(), now)

    def message(self, agent: str, kind: str, payload: bytes, now: float, *, retained: bool) -> None:
        """Take what a device says: ``kind`` is ``release`` or ``model``."""
        event = self._reception.message(agent, kind, payload, now, retained=retained)
        if event is not None:
            self._feed(event, now)

    def take(self, item: ForReleases) -> None:
        """Take what another thread has done."""
        match item:
            case ObjectsKept(name) if name == _name(self._wanted):
                self._present = self._wanted
                self._manifests.changed()
            case Made():
                self._after_run.made(item)
                self._poll_due = 0.0  # it has left a request
            case _:
                pass  # objects that are not wanted any more

    def run_finished(self, number: int) -> None:
        """The run is over after round ``number``: release its model, if that is wanted and was not done."""
        self._after_run.finished(number)

    def tick(self, now: float) -> None:
        """Do what is due."""
        if now >= self._poll_due:
            self._poll_due = now + POLL_S
            self._revoke(now)
            if self._releases.changed():
                for request in self._releases.requests():
                    self._answer(request, now)
        for event in self._reception.tick(now):
            self._feed(event, now)
        self._feed(Tick(), now)
        if self._connected:
            self._manifests.refresh(now, self._is_present)

    def next_wakeup(self) -> float:
        """When :meth:`tick` has something to do, monotonic seconds."""
        wakeup = self._rollouts.next_wakeup()
        return min(
            self._poll_due,
            inf if wakeup is None else wakeup,
            self._manifests.due if self._connected else inf,
        )

    def pending(self, now: float) -> bool:
        """Whether something that was asked for has not been told to the devices yet, and still can be."""
        if self._after_run.busy:
            return True
        held = self._manifests.held - self._unfit
        if not self._releases.requests() and not held and self._manifests.settled:
            return False
        if self._lost_at is None or now < self._lost_at + DRAIN_S:
            return True
        remedy = "the next `aggregator serve` announces it"
        log.warning("releases_not_announced", reason="the broker is gone", remedy=remedy)
        return False

    @property
    def canary(self) -> int | None:
        """Number of the release that is on its way to stable."""
        return self._rollouts.canary

    # --- requests -----------------------------------------------------------------------------------------------

    def _answer(self, request: StoredRequest, now: float) -> None:
        """Carry out what an operator asks for. What it changes and that it is answered are one transaction."""
        event, outcome = self._understand(request)
        log.info(
            "release_requested",
            kind=request.kind.value,
            release=request.number,
            outcome=outcome,
        )
        commands = [] if event is None else self._rollouts.handle(event, now)
        self._carry_out(commands, request, outcome)

    def _understand(self, request: StoredRequest) -> tuple[Event | None, str]:
        """What a request means now, and the answer to it."""
        stable, canary, number = self._rollouts.stable, self._rollouts.canary, request.number
        if request.kind is RequestKind.ROLLBACK and number is None:
            if canary is not None:
                return RolledBack(None), f"release {canary} is taken back: devices keep release {stable}"
            before = None if stable is None else self._releases.before(stable)
            if before is None:
                return None, f"refused: there is no release before {stable} to go back to"
            number = before.number
        stored = None if number is None else self._releases.release(number)
        if number is None or stored is None:
            return None, f"refused: there is no release {number}"
        if not stored.on_disk:
            return None, f"refused: the files of release {number} are not on the server's disk any more"
        if request.kind is RequestKind.ROLLBACK:
            if number == stable and canary is None:
                return None, f"refused: release {number} is the stable one already"
            return RolledBack(number), f"all devices go back to release {number}"
        if number == stable:
            return None, f"refused: release {number} is the stable one already"
        channel = Channel.STABLE if request.kind is RequestKind.STABLE else Channel.CANARY
        share = self._config.canary if request.share is None else request.share
        event = Released(number, channel, share, self._releases.first_manifest())
        if channel is Channel.STABLE or share >= 1:
            return event, f"release {number} goes to all devices"
        return event, f"release {number} goes to {share:.4g} of the devices"

    # --- the rollout ----------------------------------------------------------------------------------------------

    def _feed(self, event: Event, now: float) -> None:
        self._carry_out(self._rollouts.handle(event, now))

    def _carry_out(
        self, commands: list[Command], request: StoredRequest | None = None, outcome: str = ""
    ) -> None:
        self._releases.carry_out(commands, request, outcome)
        for command in commands:
            if isinstance(command, Note):
                _tell(command)
        if any(not isinstance(command, Note) for command in commands):
            self._seed()
            self._manifests.changed()
            self._releases.prune(FILES_KEPT, self._wanted)

    def _revoke(self, now: float) -> None:
        enrolled = self._enrolled.agents()
        for agent in [agent for agent in self._rollouts.followers if agent not in enrolled]:
            self._reception.forget(agent)
            self._feed(FollowerGone(agent), now)

    # --- objects --------------------------------------------------------------------------------------------------

    def _seed(self) -> None:
        """Have the broker hold what devices may be told to run: the stable release, the canary, and the one to go back to."""
        rows = self._in_force()
        self._wanted = frozenset(row.number for row in rows)
        self._present &= self._wanted
        self._seeder.keep(_name(self._wanted), [pair for row in rows for pair in row.objects])

    def _in_force(self) -> list[StoredRelease]:
        stable, canary = self._rollouts.stable, self._rollouts.canary
        before = None if stable is None else self._releases.before(stable)
        numbers = [stable, canary, None if before is None else before.number]
        rows = [self._releases.release(number) for number in numbers if number is not None]
        return [row for row in rows if row is not None and self._fits(row)]

    def _fits(self, row: StoredRelease) -> bool:
        """Whether the broker can be given its objects. Their chunks are cut once and for all when the release is made."""
        largest, limit = max(ref.chunk_bytes for _, ref in row.objects), self._link.limits.largest_chunk
        if not row.on_disk:
            reason = f"its files are not all in {row.folder}"
        elif self._connected and largest > limit:
            reason = f"it is cut into chunks of {largest} bytes, the broker takes {limit}: lower broker.chunk_bytes"
        else:
            self._unfit.discard(row.number)
            return True
        if row.number not in self._unfit:
            self._unfit.add(row.number)
            log.error(
                "release_not_served",
                release=row.number,
                reason=reason,
                lost="devices that do not have it cannot fetch it",
                remedy="release the model anew",
            )
        return False

    def _is_present(self, release: Release) -> bool:
        return release.number in self._present


def _name(numbers: frozenset[int]) -> str:
    return "releases " + ",".join(map(str, sorted(numbers)))


def _tell(note: Note) -> None:
    tally = note.tally
    fields: dict[str, object] = {
        "release": note.number,
        "share": round(note.share, 4),
        "devices": tally.devices,
        "confirmed": tally.confirmed,
        "failed": tally.failed,
        "waiting": tally.waiting + tally.vanished + tally.away,
    }
    if tally.faults:
        fields["faults"] = tally.causes
    remedy = REMEDIES[note.event]
    if remedy:
        log.error(note.event, **fields, remedy=remedy)
    else:
        log.info(note.event, **fields)
