"""The agent's part in a round as a state table: events and a clock in, commands out, no I/O.

::

    IDLE --plan with me in the cohort--> FETCHING --base model on disk--> TRAINING --delta on disk--> DELIVERING
     ^                                      |                                |                            |
     +------ round closed, or declined -----+--------------------------------+----- receipt --------------+

Under secure aggregation the update waits in MASKING for what its masks are made of, and after its receipt the agent stays
in OPENING, so that the sum can be opened. A later attempt of the round takes it back to MASKING: it is masked anew, and not
trained again.

A newer plan ends whatever an older round was doing. The link may come and go in any state: training goes on without
it, and what could not be sent is sent after the next connect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from federation.wire.masking import MASKED
from federation.wire.messages import Credit, DeclineCode, IdlePlan, Plan, Receipt, RoundPlan, UpdateOffer
from federation.wire.transfer import Upload


class Phase(StrEnum):
    """What the agent is doing."""

    IDLE = "idle"
    FETCHING = "fetching"
    TRAINING = "training"
    MASKING = "masking"
    DELIVERING = "delivering"
    OPENING = "opening"


# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanArrived:
    """The aggregator's signed plan, verified."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class BaseReady:
    """All that leads to this version of the global model is on disk, every hash checked."""

    version: str


@dataclass(frozen=True, slots=True)
class BaseUnusable:
    """What was fetched did not give the base model, and has been forgotten: there is another way to it.

    Attributes:
        run: In which it failed.
        round: In which it failed.
        reason: For people.
    """

    run: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class TrainingKept:
    """What was trained in this round is on disk, to be masked.

    Attributes:
        run: In which it was trained.
        round: In which it was trained.
    """

    run: str
    round: int


@dataclass(frozen=True, slots=True)
class MasksReady:
    """All that the masks of an attempt are made of is there."""

    attempt: int


@dataclass(frozen=True, slots=True)
class UpdateReady:
    """The update of this round is on disk and signed."""

    offer: UpdateOffer


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """Fetching, training or sending failed for a reason on this device.

    Attributes:
        run: In which it failed.
        round: In which it failed.
        reason: For people; it is sent to the aggregator.
        code: The kind of reason.
    """

    run: str
    round: int
    reason: str
    code: DeclineCode = DeclineCode.FAULT


@dataclass(frozen=True, slots=True)
class CreditArrived:
    """The aggregator asks for chunks."""

    credit: Credit


@dataclass(frozen=True, slots=True)
class ReceiptArrived:
    """The aggregator's signed answer, verified."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected again."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    PlanArrived
    | BaseReady
    | BaseUnusable
    | TrainingKept
    | MasksReady
    | UpdateReady
    | WorkFailed
    | CreditArrived
    | ReceiptArrived
    | LinkUp
    | Tick
)

# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring all that leads to the plan's base model to disk."""

    plan: RoundPlan


@dataclass(frozen=True, slots=True)
class Train:
    """Train on the base model, and put the encoded, signed update on disk."""

    plan: RoundPlan


@dataclass(frozen=True, slots=True)
class JoinSum:
    """Agree with the neighbours on the masks of this attempt."""

    plan: RoundPlan


@dataclass(frozen=True, slots=True)
class Mask:
    """Mask what was trained, and put it on disk with its signed offer."""

    plan: RoundPlan


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop fetching, training or masking: the round is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Publish the signed offer.

    Attributes:
        unanswered: Offers before this one that nobody answered.
    """

    unanswered: int


@dataclass(frozen=True, slots=True)
class SendChunks:
    """Publish these chunks of the update."""

    offer: UpdateOffer
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendDecline:
    """Tell the aggregator not to wait."""

    run: str
    round: int
    reason: str
    code: DeclineCode = DeclineCode.FAULT


@dataclass(frozen=True, slots=True)
class ForgetUpdate:
    """Delete the update from disk: it is accepted, refused for good, or its round is over.

    Attributes:
        accepted: Whether it counts.
        reason: For people.
    """

    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep on disk how far this agent has come.

    Attributes:
        run: Of the newest plan.
        round: Of the newest plan; an older one of the same run is a replay.
        done: This agent has nothing left to do in that round: its update has a receipt, or the round is closed.
        retired: Earlier runs of this federation.
    """

    run: str
    round: int
    done: bool
    retired: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IgnorePlan:
    """A plan was not obeyed: it is older than one that was seen.

    Attributes:
        round: Of the plan.
        reason: For people.
    """

    round: int
    reason: str


Command = (
    Fetch
    | Train
    | JoinSum
    | Mask
    | Abandon
    | SendOffer
    | SendChunks
    | SendDecline
    | ForgetUpdate
    | Remember
    | IgnorePlan
)

RUNS_REMEMBERED = 64
"""Runs that are over, whose plans would be replays."""


class Session:
    """One agent's dealings with one aggregator.

    Args:
        agent: This agent's name.
        seen: Run and round of the newest plan that an earlier process saw; ("", 0) for none.
        done: Whether that process had nothing left to do in that round.
        pending: An update that an earlier process left in the outbox, not yet receipted.
        kept: Run and round of what an earlier process trained and kept for masking; ("", 0) for none.
        retired: Runs that were over before the one that was seen.
        objection: Says what a plan lacks of this device's terms; empty where it lacks nothing.
    """

    def __init__(
        self,
        agent: str,
        *,
        seen: tuple[str, int] = ("", 0),
        done: bool = False,
        pending: UpdateOffer | None = None,
        kept: tuple[str, int] = ("", 0),
        retired: tuple[str, ...] = (),
        objection: Callable[[RoundPlan], str] = lambda _: "",
    ) -> None:
        self.agent = agent
        self.phase = Phase.IDLE
        self.plan: RoundPlan | None = None
        if pending is not None and (not seen[0] or (seen[0] == pending.run and seen[1] < pending.round)):
            # Its plan was seen, even if the disk was too full to remember it.
            seen, done = (pending.run, pending.round), False
        self._run, self._round = seen
        self._retired = retired
        self._objection = objection
        self._done = seen if done else ("", 0)
        self._declined: SendDecline | None = None
        self._declined_attempt = 0
        self._pending = pending
        self._kept = kept
        self._masks_of = 0
        self._upload: Upload | None = None
        self._unanswered = 0

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event.

        Args:
            event: What happened.
            now: Monotonic seconds.

        Returns:
            What to do, in order.

        Raises:
            PeerError: ``malformed``, for a credit that asks for chunks that do not exist.
        """
        match event:
            case PlanArrived(plan):
                return self._plan_arrived(plan, now)
            case BaseReady(version) if self._busy(Phase.FETCHING) and self._plan_now.base == version:
                self.phase = Phase.TRAINING
                return [Train(self._plan_now)]
            case BaseUnusable(run, number) if self._busy(Phase.TRAINING) and self._is_for(run, number):
                self.phase = Phase.FETCHING
                return [Fetch(self._plan_now)]
            case UpdateReady(offer) if self._awaits(offer):
                return self._deliver(offer, now)
            case TrainingKept(run, number) if self._busy(Phase.TRAINING) and self._is_for(run, number):
                self.phase, self._kept = Phase.MASKING, (run, number)
                return self._mask_if_ready()
            case MasksReady(attempt) if self.plan is not None and attempt == self.plan.attempt:
                self._masks_of = attempt
                return self._mask_if_ready()
            case WorkFailed(run, number, reason, code) if self._is_for(run, number):
                return self._failed(reason, code)
            case CreditArrived(credit):
                return self._credit_arrived(credit)
            case ReceiptArrived(receipt):
                return self._receipt_arrived(receipt)
            case LinkUp() if self._upload is not None:
                self._upload.reconnected()
                return self._offer_if_due(now)
            case Tick():
                return self._offer_if_due(now)
            case _:
                return []

    def next_wakeup(self) -> float | None:
        """When :class:`Tick` can next matter, monotonic seconds."""
        return None if self._upload is None else self._upload.next_wakeup()

    @property
    def run(self) -> str:
        """The run of the newest plan that was seen; empty before the first."""
        return self._run

    @property
    def round(self) -> int:
        """The newest round that was seen; 0 before the first."""
        return self._round

    @property
    def _plan_now(self) -> RoundPlan:
        assert self.plan is not None
        return self.plan

    def _is_for(self, run: str, number: int) -> bool:
        return self.plan is not None and (self.plan.run, self.plan.round) == (run, number)

    def _busy(self, phase: Phase) -> bool:
        return self.phase is phase and self.plan is not None

    def _awaits(self, offer: UpdateOffer) -> bool:
        if self.plan is None or not self._is_for(offer.run, offer.round):
            return False
        if masked(self.plan):
            return self.phase is Phase.MASKING and offer.attempt == self.plan.attempt
        return self.phase is Phase.TRAINING

    def _mask_if_ready(self) -> list[Command]:
        if self.phase is not Phase.MASKING or self._masks_of != self._plan_now.attempt:
            return []
        self._masks_of = 0  # they are good for one update
        return [Mask(self._plan_now)]

    def _plan_arrived(self, plan: Plan, now: float) -> list[Command]:
        if plan.run in self._retired:
            return [IgnorePlan(plan.round, f"run {plan.run} is over, this device has seen run {self._run}")]
        if plan.run == self._run and plan.round < self._round:
            return [IgnorePlan(plan.round, f"this device has seen round {self._round} of the same run")]
        here = plan.run, plan.round
        if isinstance(plan, IdlePlan):
            return self._mark(*here, done=True) + self._end(plan.run, plan.round + 1, "the round is closed")
        done = self._done == here
        commands = self._mark(*here, done=done) + self._end(*here, "a newer round is open")
        if done:
            return commands + self._forget("it has its receipt")
        if self.agent not in plan.cohort:
            return commands
        if self._declined is not None and (self._declined.run, self._declined.round) == here:
            if plan.attempt <= self._declined_attempt:
                return [*commands, self._declined]  # the first one may be lost
            self._declined = None
        objection = self._objection(plan)
        if objection:  # also to a later attempt that promises less than the one that is being worked on
            working = self.phase in (Phase.FETCHING, Phase.TRAINING, Phase.MASKING)
            self.plan = plan
            return [
                *commands,
                *([Abandon(objection)] if working else []),
                *self._decline(objection, DeclineCode.TERMS),
            ]
        if (
            self.plan is not None
        ):  # announced again, or a later attempt of the round that this agent is working on
            return commands + self._go_on(plan)
        self.plan = plan
        if self._pending is not None and (not masked(plan) or self._pending.attempt == plan.attempt):
            return commands + self._deliver(self._pending, now)
        if masked(plan):
            commands += self._join()
            if self._kept == here:
                self.phase = Phase.MASKING
                return commands
        self.phase = Phase.FETCHING
        return [*commands, Fetch(plan)]

    def _go_on(self, plan: RoundPlan) -> list[Command]:
        offered, known = (plan.full, plan.deltas), (self._plan_now.full, self._plan_now.deltas)
        later = plan.attempt > self._plan_now.attempt
        self.plan = plan
        commands: list[Command] = self._join() if later and masked(plan) else []
        if self.phase is Phase.FETCHING and offered != known:
            commands.append(Fetch(plan))
        return commands

    def _join(self) -> list[Command]:
        """Begin the masking of this attempt; an update that was masked for an earlier one is of no use."""
        if self.phase in (Phase.DELIVERING, Phase.OPENING):
            self.phase = Phase.MASKING
        self._masks_of, self._upload = 0, None
        return [*self._forget("it was masked for an earlier attempt"), JoinSum(self._plan_now)]

    def _mark(self, run: str, number: int, *, done: bool) -> list[Command]:
        known = self._run, self._round, self._done == (run, number)
        if self._run and self._run != run:
            self._retired = (*self._retired, self._run)[-RUNS_REMEMBERED:]
        self._run, self._round = run, number
        if done:
            self._done = run, number
        return [] if known == (run, number, done) else [Remember(run, number, done, self._retired)]

    def _failed(self, reason: str, code: DeclineCode) -> list[Command]:
        # The terms are not judged by who is at work: that has to be stopped.
        working = code is DeclineCode.TERMS and self.phase in (Phase.FETCHING, Phase.TRAINING, Phase.MASKING)
        return [*([Abandon(reason)] if working else []), *self._decline(reason, code)]

    def _decline(self, reason: str, code: DeclineCode) -> list[Command]:
        """Sit out the present attempt of the round. A later one is a new chance: the fault may be mended by then."""
        self._declined = SendDecline(self._plan_now.run, self._plan_now.round, reason, code)
        self._declined_attempt = self._plan_now.attempt
        commands = self._forget(reason)
        self._rest()
        return [*commands, self._declined]

    def _forget(self, reason: str) -> list[Command]:
        if self._pending is None:
            return []
        self._pending = None
        return [ForgetUpdate(accepted=False, reason=reason)]

    def _end(self, run: str, first_valid: int, reason: str) -> list[Command]:
        """End all work that is not for ``run`` at round ``first_valid`` or later."""
        commands: list[Command] = []
        if self.plan is not None and (self.plan.run != run or self.plan.round < first_valid):
            if self.phase in (Phase.FETCHING, Phase.TRAINING, Phase.MASKING):
                commands.append(Abandon(reason))
            self._rest()
        if self._pending is not None and (self._pending.run != run or self._pending.round < first_valid):
            commands += self._forget(reason)
        return commands

    def _deliver(self, offer: UpdateOffer, now: float) -> list[Command]:
        self.phase = Phase.DELIVERING
        self._pending = offer
        self._upload = Upload(offer.object)
        self._unanswered = 0
        return self._offer_if_due(now)

    def _offer_if_due(self, now: float) -> list[Command]:
        if self._upload is None or not self._upload.due(now):
            return []
        command = SendOffer(self._unanswered)
        self._unanswered += 1
        return [command]

    def _credit_arrived(self, credit: Credit) -> list[Command]:
        if self._upload is None or self._pending is None or credit.sha256 != self._pending.object.sha256:
            return []  # for an update that was receipted or dropped meanwhile
        self._unanswered = 0
        return [SendChunks(self._pending, self._upload.credit(credit))]

    def _receipt_arrived(self, receipt: Receipt) -> list[Command]:
        pending = self._pending
        here = receipt.run, receipt.round
        if pending is None or receipt.sha256 != pending.object.sha256 or here != (pending.run, pending.round):
            return []
        self._pending = None
        if receipt.accepted and pending.encoding.partition(":")[0] == MASKED:
            self.phase = Phase.IDLE if self.plan is None else Phase.OPENING
            self._upload = None
            return [ForgetUpdate(accepted=True, reason="accepted")]
        self._rest()
        # Remembered before the update is deleted: with neither, a restart would train this round again.
        commands = self._mark(*here, done=True) if here == (self._run, self._round) else []
        if receipt.accepted:
            return [*commands, ForgetUpdate(accepted=True, reason="accepted")]
        reason = f"{receipt.code.value if receipt.code else 'refused'}: {receipt.detail}"
        return [*commands, ForgetUpdate(accepted=False, reason=reason)]

    def _rest(self) -> None:
        self.phase = Phase.IDLE
        self.plan = None
        self._upload = None
        self._masks_of = 0


def masked(plan: RoundPlan) -> bool:
    """Whether the updates of a plan are masked."""
    return plan.privacy.secagg is not None
