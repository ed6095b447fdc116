"""The life of a run as a state table: events and a clock in, commands out, no I/O.

::

    WAITING --enough agents--> OPEN --delivered, or deadline with a quorum--> FOLDING --folded--> EVALUATING
       ^                        | ^                                                                  |
       |                        +-+ deadline without a quorum: extended, nobody's work is lost       |
       +---------------------------------- more rounds to go ----------------------------------------+--> FINISHED

Under secure aggregation UNMASKING stands between OPEN and FOLDING. If it fails before any device was asked to open the
sum, the round is extended, and all mask anew; after that, nobody would open another sum of the round: it is skipped.

Time is monotonic seconds. Everything that must survive a restart is in :class:`RoundRecord`, which the store keeps;
:meth:`Rounds.start` goes on from one.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from aggregator.cohort import invitations, quorum_of, sample_cohort
from aggregator.config import RoundsConfig
from federation.wire.fields import MAX_COHORT


class Phase(StrEnum):
    """Where a run stands."""

    WAITING = "waiting"
    OPEN = "open"
    UNMASKING = "unmasking"
    FOLDING = "folding"
    EVALUATING = "evaluating"
    FINISHED = "finished"


# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AgentOnline:
    """An eligible agent announced itself."""

    agent: str


@dataclass(frozen=True, slots=True)
class AgentOffline:
    """An agent's last will fired, or it said goodbye."""

    agent: str


@dataclass(frozen=True, slots=True)
class UpdateStored:
    """An agent's update passed the door and is on disk."""

    agent: str


@dataclass(frozen=True, slots=True)
class AgentOut:
    """An agent declined this round, or its update was refused for good: nobody waits for it."""

    agent: str


@dataclass(frozen=True, slots=True)
class Unmasked:
    """All that it takes to read the sum of the masked updates is on disk."""


@dataclass(frozen=True, slots=True)
class SumFailed:
    """The present attempt at a masked sum came to nothing.

    Attributes:
        asked: Whether devices were asked to open it. Each opens one sum of a round at most.
    """

    asked: bool


@dataclass(frozen=True, slots=True)
class Folded:
    """The new global model is on disk."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The hold-out evaluation of the round is done.

    Attributes:
        accuracy: Top-1 in [0, 1]; None when there is no hold-out set.
    """

    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    AgentOnline | AgentOffline | UpdateStored | AgentOut | Unmasked | SumFailed | Folded | Evaluated | Tick
)

# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Record and announce a round, or its next attempt.

    Attributes:
        round: Number.
        attempt: 1, or higher when the round was extended.
        cohort: Sorted names; a later attempt only adds to it.
        deadline_s: Seconds from now.
    """

    round: int
    attempt: int
    cohort: tuple[str, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Unmask:
    """Have the sum of these agents' masked updates opened."""

    round: int
    agents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Skip:
    """Close the round with the model as it was: its sum cannot be had any more."""

    round: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Average these agents' updates, in this order, into the next global model."""

    round: int
    agents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate the round's model on the hold-out set."""

    round: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Tell the federation that no round is open.

    Attributes:
        round: The last closed one.
        missing: Agents that are still missing.
    """

    round: int
    missing: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over.

    Attributes:
        round: The last closed one.
        reason: For people.
    """

    round: int
    reason: str


Command = OpenRound | Unmask | Skip | Fold | Evaluate | Wait | Finish

# --- the machine ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Masked:
    """What secure aggregation asks of the rounds.

    Attributes:
        min_agents: Least devices whose sum may be learned.
        dropouts: Share of a cohort that may vanish.
    """

    min_agents: int
    dropouts: float


@dataclass(frozen=True, slots=True)
class Budget:
    """What the privacy budget of the run pays for.

    Attributes:
        last_round: The run ends with it, however many rounds are wanted.
        reason: For people.
    """

    last_round: int
    reason: str


LAST_DRAWN_ATTEMPT = 2
"""A cohort of a secret draw has no replacements: after a second deadline the round is closed with what has come, be it
nothing, and those that are missing count as updates of zero."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What the store knows of a round that was in progress when the aggregator stopped.

    Attributes:
        round: Number.
        attempt: The last announced.
        cohort: Invited agents.
        delivered: Agents whose update is on disk.
        phase: OPEN, or UNMASKING or FOLDING when the round had already been closed to further updates.
        remaining_s: Seconds to its deadline; at least a grace is given.
    """

    round: int
    attempt: int
    cohort: tuple[str, ...]
    delivered: tuple[str, ...]
    phase: Phase
    remaining_s: float


@dataclass(slots=True)
class Rounds:
    """The run. Feed it with :meth:`handle`; carry out what it returns, in order.

    Args:
        config: Round settings.
        seed: Of the cohort draws.
        round: The last closed round; 0 for a new run.
        accuracies: Hold-out accuracies of the closed rounds so far, for the stopping rules.
        masked: Set under secure aggregation.
        draw: Makes a cohort of those who are online, perhaps an empty one, instead of the settings: client-level privacy
            amplified by sampling (``aggregator.cohort.draw_secretly``).
        budget: None where no privacy budget ends the run.
    """

    config: RoundsConfig
    seed: int = 0
    round: int = 0
    accuracies: list[float] = field(default_factory=list)
    masked: Masked | None = None
    draw: Callable[[Collection[str]], tuple[str, ...]] | None = None
    budget: Budget | None = None
    phase: Phase = Phase.WAITING
    attempt: int = 0
    cohort: tuple[str, ...] = ()
    delivered: set[str] = field(default_factory=set)
    out: set[str] = field(default_factory=set)
    excused: set[str] = field(default_factory=set)
    online: set[str] = field(default_factory=set)
    _offline_since: dict[str, float] = field(default_factory=dict)
    _deadline: float = 0.0
    _enough_since: float | None = None
    _now: float = 0.0

    def start(
        self, now: float, record: RoundRecord | None = None, *, evaluate_first: bool = False
    ) -> list[Command]:
        """Begin, or go on with the round that was in progress.

        Args:
            now: Monotonic seconds.
            record: The interrupted round, if any.
            evaluate_first: The last closed round was never evaluated, and the stopping rules need it.

        Returns:
            The first commands.
        """
        self._now = now
        if record is None and evaluate_first:
            self.phase = Phase.EVALUATING
            return [Evaluate(self.round)]
        if record is None:
            return self._next(now)
        self.round, self.attempt, self.cohort = record.round, record.attempt, record.cohort
        self.delivered = set(record.delivered)
        # The deadline may have passed while nobody could deliver.
        remaining = max(record.remaining_s, min(self.config.grace_s, self.config.deadline_s))
        self._deadline = now + remaining
        # Nobody has announced itself to this process yet: each member gets its grace from now.
        self._offline_since = dict.fromkeys(record.cohort, now)
        if record.phase is Phase.FOLDING:
            return self._fold()
        self.phase = Phase.OPEN
        reopened = OpenRound(self.round, self.attempt, self.cohort, remaining)
        return [reopened, *(self._close() if record.phase is Phase.UNMASKING else self._settle(now))]

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event.

        Args:
            event: What happened.
            now: Monotonic seconds.

        Returns:
            What to do, in order. Events that mean nothing in the present phase return nothing.
        """
        self._now = now
        match event:
            case AgentOnline(agent):
                self.online.add(agent)
                self.excused.discard(agent)
                self._offline_since.pop(agent, None)
            case AgentOffline(agent):
                if agent in self.online or agent not in self._offline_since:
                    self._offline_since[agent] = now
                self.online.discard(agent)
            case UpdateStored(agent) if self.phase is Phase.OPEN and agent in self.cohort:
                self.delivered.add(agent)
            case AgentOut(agent) if self.phase is Phase.OPEN and agent in self.cohort:
                self.out.add(agent)
            case Unmasked() | SumFailed() | Folded() | Evaluated():
                return self._worked(event, now)
            case _:
                pass
        match self.phase:
            case Phase.WAITING:
                return self._gather(now)
            case Phase.OPEN:
                return self._settle(now)
            case _:
                return []

    def next_wakeup(self) -> float | None:
        """When :class:`Tick` can next matter, monotonic seconds; None when only an event can."""
        if self.phase is Phase.WAITING:
            return None if self._enough_since is None else self._enough_since + self.config.gather_s
        if self.phase is Phase.OPEN:
            graces = (
                self._offline_since[agent] + self.config.grace_s
                for agent in self._pending()
                if agent in self._offline_since
            )
            # A grace that is over was acted upon when it ended.
            return min([self._deadline, *(grace for grace in graces if grace > self._now)])
        return None

    @property
    def wanted(self) -> int:
        """Updates with which the open round is complete; an extension does not count on members that had vanished."""
        expected = len(self.cohort) - len(self.excused)
        return min(self.config.cohort_size or expected, expected)

    @property
    def quorum(self) -> int:
        """Updates without which the open round is not closed."""
        if self.draw is not None:
            return min(len(self.cohort), quorum_of(self.wanted, self.config.quorum, 1))
        least = quorum_of(self.wanted, self.config.quorum, self.config.min_agents)
        if self.masked is None:
            return least
        return max(least, self.masked.min_agents, quorum_of(len(self.cohort), 1 - self.masked.dropouts, 1))

    @property
    def over(self) -> bool:
        """Whether the closed rounds so far end the run."""
        return bool(self._finished())

    def _pending(self) -> Iterable[str]:
        return (agent for agent in self.cohort if agent not in self.delivered and agent not in self.out)

    def _gone(self, agent: str, now: float) -> bool:
        since = self._offline_since.get(agent)
        return since is not None and now >= since + self.config.grace_s

    def _worked(self, event: Unmasked | SumFailed | Folded | Evaluated, now: float) -> list[Command]:
        """Go on after what the server does by itself, if that is what this phase waits for."""
        match event:
            case Unmasked() if self.phase is Phase.UNMASKING:
                return self._fold()
            case SumFailed(asked) if self.phase in (Phase.OPEN, Phase.UNMASKING):
                return self._sum_failed(now, asked=asked)
            case Folded() if self.phase is Phase.FOLDING:
                self.phase = Phase.EVALUATING
                return [Evaluate(self.round)]
            case Evaluated(accuracy) if self.phase is Phase.EVALUATING:
                if accuracy is not None:
                    self.accuracies.append(accuracy)
                return self._next(now)
            case _:
                return []

    def _gather(self, now: float) -> list[Command]:
        if len(self.online) < self.config.min_agents:
            self._enough_since = None
            return []
        if self._enough_since is None:
            self._enough_since = now
        full = invitations(self.config.cohort_size, self.config.over_selection)
        if now < self._enough_since + self.config.gather_s and not (full and len(self.online) >= full):
            return []
        return self._open(now)

    def _open(self, now: float) -> list[Command]:
        self.round += 1
        self.attempt = 1
        self.delivered, self.out, self.excused = set(), set(), set()
        size = invitations(self.config.cohort_size, self.config.over_selection) or len(self.online)
        draw = self.draw or partial(sample_cohort, size=size, seed=self.seed, round_number=self.round)
        self.cohort = draw(self.online)
        self.phase = Phase.OPEN
        self._deadline = now + self.config.deadline_s
        opened = OpenRound(self.round, self.attempt, self.cohort, self.config.deadline_s)
        return [opened] if self.cohort else [opened, *self._close()]

    def _settle(self, now: float) -> list[Command]:
        """Decide whether the open round is complete, over, or to be extended."""
        if len(self.delivered) >= max(self.wanted, self.quorum):
            return self._close()
        waiting = any(not self._gone(agent, now) for agent in self._pending())
        if waiting and now < self._deadline:
            return []
        if len(self.delivered) >= self.quorum:
            return self._close()
        if now < self._deadline and not self._replacements():
            return []
        if self.draw is not None and self.attempt >= LAST_DRAWN_ATTEMPT:
            return self._close()
        return self._extend(now)

    def _replacements(self) -> Collection[str]:
        return self.online - set(self.cohort) if self.draw is None else ()

    def _extend(self, now: float) -> list[Command]:
        """Give the round another deadline, replace who has vanished, and give those who were out a new chance.

        Vanished members stay in the cohort, so that one that comes back still counts; but as long as enough others
        are left, the round is not held up for them any more. Masked updates of an attempt are of no use in another.
        """
        self.attempt += 1
        self.out = set()
        if self.masked is not None:
            self.delivered = set()
        gone = {agent for agent in self._pending() if self._gone(agent, now)}
        size = invitations(self.config.cohort_size, self.config.over_selection) or MAX_COHORT
        room = min(size - (len(self.cohort) - len(gone)), MAX_COHORT - len(self.cohort))
        invited = sample_cohort(
            self._replacements(), max(0, room), seed=self.seed + self.attempt, round_number=self.round
        )
        self.cohort = tuple(sorted({*self.cohort, *invited}))
        enough = self.draw is None and len(self.cohort) - len(gone) >= self.config.min_agents
        self.excused = gone if enough else set()
        if (
            self.masked is not None and self.excused
        ):  # nothing of theirs is left: the sum is that of the others
            self.cohort, self.excused = tuple(sorted(set(self.cohort) - gone)), set()
        self._deadline = now + self.config.deadline_s
        again = OpenRound(self.round, self.attempt, self.cohort, self.config.deadline_s)
        return self._close() if len(self.delivered) >= max(self.wanted, self.quorum) else [again]

    def _sum_failed(self, now: float, *, asked: bool) -> list[Command]:
        if asked:
            self.phase = Phase.FOLDING
            return [Skip(self.round)]
        if self.phase is Phase.UNMASKING:
            self.phase = Phase.OPEN
            return self._extend(now)
        # Those who were silent get a grace before all begin anew.
        self.out = set(self.cohort)
        self._deadline = min(self._deadline, now + self.config.grace_s)
        return []

    def _close(self) -> list[Command]:
        if self.masked is None:
            return self._fold()
        self.phase = Phase.UNMASKING
        return [Unmask(self.round, tuple(sorted(self.delivered)))]

    def _fold(self) -> list[Command]:
        self.phase = Phase.FOLDING
        return [Fold(self.round, tuple(sorted(self.delivered)))]

    def _next(self, now: float) -> list[Command]:
        reason = self._finished()
        if reason:
            self.phase = Phase.FINISHED
            return [Finish(self.round, reason)]
        self.phase = Phase.WAITING
        return self._gather(now) or [Wait(self.round, max(0, self.config.min_agents - len(self.online)))]

    def _finished(self) -> str:
        best = max(self.accuracies, default=0.0)
        target, patience = self.config.target_accuracy, self.config.patience
        if target and best >= target:
            return f"reached the target accuracy: {best:.2%} of {target:.2%}"
        if (
            patience
            and self.accuracies
            and len(self.accuracies) - 1 - self.accuracies.index(best) >= patience
        ):
            return f"no better accuracy than {best:.2%} in {patience} rounds"
        if self.round >= self.config.count:
            return f"all {self.config.count} rounds done"
        if self.budget is not None and self.round >= self.budget.last_round:
            return self.budget.reason
        return ""
