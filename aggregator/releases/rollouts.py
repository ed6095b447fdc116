"""How a release reaches the devices, as a state machine: events and a clock in, commands out, no I/O.

::

    released as a canary --> a share of the devices --step went well--> a larger share --> ... --> all --> stable
                                   |                                         |
                                   +-- too many devices refuse or go back ---+--> halted: the channel is emptied, and
                                                                                  devices go back to the stable release

Who is in a step: the devices that are known to run models and whose ``federation.wire.release.draw`` is below the share, and
whoever has reported on the release. A step went well when it lasted ``step_s``, enough devices have confirmed it, and nobody
who is online still owes an answer. A device that began to test or to run the release and went offline is waited for, and
counts as failed when it stays away for ``give_up_s``: a model that takes its device down leaves nobody to report it. One
that never began is only not waited for.

Nothing is widened while the link to the broker is down, nor right after it is up: reports are retained, and those that came
meanwhile must be heard first. Time is monotonic seconds. What must survive a restart is :class:`CanaryRecord` and the
reports, which the store keeps; :meth:`Rollouts.start` goes on from them.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from aggregator.config import ReleaseConfig
from aggregator.releases.records import ReleaseState
from aggregator.releases.rollout_events import (
    Announce,
    CanaryRecord,
    Command,
    Event,
    FollowerGone,
    FollowerSeen,
    LinkDown,
    LinkUp,
    Mark,
    Note,
    Released,
    Reported,
    RolledBack,
    Tally,
    Tick,
)
from federation.wire.release import Channel, RolloutState, draw

HEAR_S = 10.0
"""How long reports that the broker has kept may take to come, once the link is up."""

SLACK = 1e-9
"""0.29 * 100 is a little below 29 in floating point; nobody means that."""

FAILED = frozenset({RolloutState.REFUSED, RolloutState.ROLLED_BACK})
BEGUN = frozenset({RolloutState.TESTING, RolloutState.PROBATION})
"""A device that falls silent here may have been taken down by the model."""


@dataclass(slots=True)
class _Canary:
    number: int
    share: float
    first_manifest: int
    began: float
    standings: dict[str, Reported] = field(default_factory=dict)
    draws: dict[str, float] = field(default_factory=dict)
    noted: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Rollouts:
    """The rollout of releases. Feed it with :meth:`handle`; carry out what it returns, all or nothing, in order.

    Args:
        federation: Its name, which is part of each device's draw.
        config: Settings of releases.
        stable: Number of the stable release; None before the first.
    """

    federation: str
    config: ReleaseConfig
    stable: int | None = None
    followers: set[str] = field(default_factory=set)
    _canary: _Canary | None = None
    _offline_since: dict[str, float] = field(default_factory=dict)
    _heard_at: float = inf
    _now: float = 0.0

    @property
    def canary(self) -> int | None:
        """Number of the release that is on its way; None if none is."""
        return None if self._canary is None else self._canary.number

    @property
    def share(self) -> float:
        """Of the devices that are to take the canary; 0 if there is none."""
        return 0.0 if self._canary is None else self._canary.share

    def start(
        self,
        now: float,
        followers: Iterable[str],
        record: CanaryRecord | None = None,
        reports: Iterable[Reported] = (),
    ) -> list[Command]:
        """Begin, or go on with the canary that was under way.

        Args:
            now: Monotonic seconds.
            followers: Devices that are known to run models.
            record: The canary, if there is one.
            reports: The last word of each device about its release.

        Returns:
            The first commands: an earlier process may have died between a report and what followed from it.
        """
        self._now = now
        self.followers = set(followers)
        # Nobody has shown itself to this process yet.
        self._offline_since = dict.fromkeys(self.followers, now)
        if record is None:
            return []
        # While the server was down perhaps nobody could answer: only the least duration of a step counts that time.
        elapsed = min(max(record.elapsed_s, 0.0), self.config.step_s)
        self._canary = _Canary(record.number, record.share, record.first_manifest, now - elapsed)
        for report in reports:
            self._keep(report)
        return self._halt_if_needed(self.tally(now), complete=False)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event.

        Args:
            event: What happened.
            now: Monotonic seconds.

        Returns:
            What to do. Events that change nothing return nothing.
        """
        self._now = now
        may_halt = True
        match event:
            case Released():
                return self._released(event, now)
            case RolledBack(number):
                return self._rolled_back(number)
            case Reported():
                self._keep(event)
                may_halt = event.state in FAILED
            case FollowerSeen(agent, online):
                self._seen(agent, now, online=online)
                may_halt = False
            case FollowerGone(agent):
                self.followers.discard(agent)
                self._offline_since.pop(agent, None)
                if self._canary is not None:
                    self._canary.standings.pop(agent, None)
            case LinkUp():
                self._heard_at = now + min(HEAR_S, self.config.step_s)
                if self._canary is not None:  # nobody could answer while the link was down
                    self._canary.began = max(self._canary.began, now - self.config.step_s)
                self._offline_since = dict.fromkeys(self.followers, now)
            case LinkDown():
                self._heard_at = inf
            case Tick():
                pass
        return self._settle(now, may_halt=may_halt)

    def next_wakeup(self) -> float | None:
        """When :class:`Tick` can next matter, monotonic seconds; None when only an event can."""
        canary = self._canary
        if canary is None or self._heard_at == inf:
            return None
        lost = (
            since + self.config.give_up_s
            for agent, since in self._offline_since.items()
            if agent in canary.standings and canary.standings[agent].state in BEGUN
        )
        lasted = max(canary.began + self.config.step_s, self._heard_at)
        moments = (lasted, canary.began + self.config.give_up_s, *lost)
        return min((at for at in moments if at > self._now), default=None)

    def in_step(self) -> set[str]:
        """The devices that are to take the canary now."""
        canary = self._canary
        if canary is None:
            return set()
        return {
            agent
            for agent in self.followers
            if agent in canary.standings or self._draw(canary, agent) < canary.share
        }

    def tally(self, now: float) -> Tally:
        """Where the devices of the present step stand."""
        counts: Counter[str] = Counter()
        faults: Counter[str] = Counter()
        agents = self.in_step()
        for agent in agents:
            standing = None if self._canary is None else self._canary.standings.get(agent)
            state = None if standing is None else standing.state
            offline_since = self._offline_since.get(agent)
            if state is RolloutState.CONFIRMED:
                counts["confirmed"] += 1
            elif standing is not None and state in FAILED:
                counts["failed"] += 1
                faults[standing.fault.value if standing.fault else standing.state.value] += 1
            elif offline_since is None:
                counts["waiting"] += 1
            elif state not in BEGUN:
                counts["away"] += 1
            elif now < offline_since + self.config.give_up_s:
                counts["vanished"] += 1
            else:
                counts["failed"] += 1
                faults["lost"] += 1
        return Tally(devices=len(agents), faults=dict(faults), **counts)

    # --- what happens -----------------------------------------------------------------------------------------------

    def _released(self, event: Released, now: float) -> list[Command]:
        canary = self._canary
        if event.channel is Channel.STABLE or event.share >= 1:
            return self._to_all(event.number, "released to all devices at once", event.first_manifest)
        if canary is not None and canary.number == event.number:
            canary.share = max(canary.share, event.share)
            canary.began, canary.noted = now, set()
            return [self._announced(canary), self._note("canary_widened", Tally())]
        commands: list[Command] = []
        if canary is not None:
            commands.append(
                Mark(canary.number, ReleaseState.RETIRED, f"release {event.number} took its place")
            )
        self._canary = _Canary(event.number, event.share, event.first_manifest, now)
        return [
            *commands,
            self._announced(self._canary),
            Mark(event.number, ReleaseState.CANARY, "released as a canary"),
            self._note("canary_begun", self.tally(now)),
        ]

    def _to_all(self, number: int, reason: str, first_manifest: int) -> list[Command]:
        replaced = f"release {number} took its place"
        commands: list[Command] = [Announce(Channel.STABLE, number, 1.0, first_manifest)]
        if self._canary is not None and self._canary.number == number:
            commands.append(Announce(Channel.CANARY, None, 0.0, first_manifest))
            self._canary = None
        commands += self._drop_canary(ReleaseState.RETIRED, replaced)
        commands.append(Mark(number, ReleaseState.STABLE, reason))
        if self.stable is not None and self.stable != number:
            commands.append(Mark(self.stable, ReleaseState.RETIRED, replaced))
        self.stable = number
        return commands

    def _rolled_back(self, number: int | None) -> list[Command]:
        commands = self._drop_canary(ReleaseState.WITHDRAWN, "the operator took it back")
        if number is None or number == self.stable:
            return commands
        commands.append(Announce(Channel.STABLE, number, 1.0, 0))
        if self.stable is not None:
            commands.append(
                Mark(self.stable, ReleaseState.WITHDRAWN, f"the operator went back to release {number}")
            )
        commands.append(Mark(number, ReleaseState.STABLE, "the operator went back to it"))
        self.stable = number
        return commands

    def _drop_canary(self, state: ReleaseState, reason: str) -> list[Command]:
        canary, self._canary = self._canary, None
        if canary is None:
            return []
        return [
            Announce(Channel.CANARY, None, 0.0, canary.first_manifest),
            Mark(canary.number, state, reason),
        ]

    def _keep(self, report: Reported) -> None:
        if report.agent not in self.followers:  # it has not said yet that it is there
            self._seen(report.agent, self._now, online=False)
        canary = self._canary
        if canary is None or report.number != canary.number or report.manifest < canary.first_manifest:
            return
        canary.standings[report.agent] = report

    def _seen(self, agent: str, now: float, *, online: bool) -> None:
        self.followers.add(agent)
        if online:
            self._offline_since.pop(agent, None)
        else:
            self._offline_since.setdefault(agent, now)

    # --- what is decided --------------------------------------------------------------------------------------------

    def _settle(self, now: float, *, may_halt: bool) -> list[Command]:
        """Decide whether the present step went well, or the canary is over."""
        canary = self._canary
        if canary is None or self._heard_at == inf:
            return []
        lasted = now >= max(canary.began + self.config.step_s, self._heard_at)
        if not lasted and not may_halt:
            return []  # a thousand devices that show themselves at once are not counted a thousand times
        tally = self.tally(now)
        given_up = now >= canary.began + self.config.give_up_s
        complete = lasted and not tally.vanished and (given_up or not tally.waiting)
        halted = self._halt_if_needed(tally, complete=complete)
        if halted or not complete:
            return halted
        needed = min(self.config.min_reports, tally.answered if given_up else tally.devices)
        if tally.confirmed < needed:
            return self._hold(canary, tally) if given_up else []
        if canary.share < 1:
            return self._widen(canary, tally, now)
        if tally.devices and not tally.confirmed:
            return self._hold(canary, tally)
        confirmed = f"{tally.confirmed} of {tally.devices} devices confirmed it"
        note = self._note("canary_promoted", tally)
        return [*self._to_all(canary.number, confirmed, canary.first_manifest), note]

    def _halt_if_needed(self, tally: Tally, *, complete: bool) -> list[Command]:
        """Halt above ``max_failures`` of the devices of the step, or at its end of those that have answered."""
        of = tally.answered if complete else tally.devices
        if tally.failed <= self.config.max_failures * of + SLACK:
            return []
        note = self._note("canary_halted", tally)
        reason = f"{tally.failed} of {of} devices refused it, went back or were lost: {tally.causes}"
        return [*self._drop_canary(ReleaseState.HALTED, reason), note]

    def _widen(self, canary: _Canary, tally: Tally, now: float) -> list[Command]:
        canary.share = min(1.0, canary.share * self.config.widen)
        canary.began, canary.noted = now, set()
        return [self._announced(canary), self._note("canary_widened", tally)]

    def _hold(self, canary: _Canary, tally: Tally) -> list[Command]:
        if "held" in canary.noted:
            return []
        canary.noted.add("held")
        return [self._note("canary_held", tally)]

    def _announced(self, canary: _Canary) -> Announce:
        return Announce(Channel.CANARY, canary.number, canary.share, canary.first_manifest)

    def _note(self, event: str, tally: Tally) -> Note:
        return Note(event, self.canary or 0, self.share, tally)

    def _draw(self, canary: _Canary, agent: str) -> float:
        if agent not in canary.draws:
            canary.draws[agent] = draw(self.federation, agent, canary.number)
        return canary.draws[agent]
