"""The agent's part in a round as a state table: events and a clock in, commands out, no I/O.

::

    IDLE --plan with me in the cohort--> FETCHING --base model on disk--> TRAINING --delta on disk--> DELIVERING
     ^                                      |                                |                            |
     +------ round closed, or declined -----+--------------------------------+----- receipt --------------+

A newer plan ends whatever an older round was doing. The link may come and go in any state: training goes on without
it, and what could not be sent is sent after the next connect.
"""

from dataclasses import dataclass
from enum import StrEnum

from federation.wire.messages import Credit, IdlePlan, ObjectRef, Plan, Receipt, RoundPlan, UpdateOffer
from federation.wire.transfer import Upload


class Phase(StrEnum):
    """What the agent is doing."""

    IDLE = "idle"
    FETCHING = "fetching"
    TRAINING = "training"
    DELIVERING = "delivering"


# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanArrived:
    """The aggregator's signed plan, verified."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class BaseReady:
    """The base model is on disk, its hash checked."""

    sha256: str


@dataclass(frozen=True, slots=True)
class UpdateReady:
    """The update of this round is on disk and signed."""

    offer: UpdateOffer


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """Fetching or training failed for a reason on this device.

    Attributes:
        round: In which it failed.
        reason: For people; it is sent to the aggregator.
    """

    round: int
    reason: str


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


Event = PlanArrived | BaseReady | UpdateReady | WorkFailed | CreditArrived | ReceiptArrived | LinkUp | Tick

# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the base model to disk."""

    ref: ObjectRef


@dataclass(frozen=True, slots=True)
class Train:
    """Train on the base model, and put the encoded, signed update on disk."""

    plan: RoundPlan


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop fetching or training: the round is over."""

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
    """Keep on disk that this round of this run was seen: an older plan is a replay."""

    run: str
    round: int


Command = Fetch | Train | Abandon | SendOffer | SendChunks | SendDecline | ForgetUpdate | Remember


class Session:
    """One agent's dealings with one aggregator.

    Args:
        agent: This agent's name.
        seen: Run and round of the newest plan that an earlier process saw; ("", 0) for none.
        pending: An update that an earlier process left in the outbox, not yet receipted.
    """

    def __init__(
        self, agent: str, *, seen: tuple[str, int] = ("", 0), pending: UpdateOffer | None = None
    ) -> None:
        self.agent = agent
        self.phase = Phase.IDLE
        self.plan: RoundPlan | None = None
        self._run, self._round = seen
        self._done: tuple[str, int] = ("", 0)
        self._pending = pending
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
            case BaseReady(sha256) if self._busy(Phase.FETCHING) and self._plan_now.base.sha256 == sha256:
                self.phase = Phase.TRAINING
                return [Train(self._plan_now)]
            case UpdateReady(offer) if self._busy(Phase.TRAINING) and offer.round == self._plan_now.round:
                return self._deliver(offer, now)
            case WorkFailed(number, reason) if self.plan is not None and number == self.plan.round:
                plan = self._plan_now
                self._done = plan.run, plan.round
                self._rest()
                return [SendDecline(plan.run, plan.round, reason)]
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
    def round(self) -> int:
        """The newest round that was seen; 0 before the first."""
        return self._round

    @property
    def _plan_now(self) -> RoundPlan:
        assert self.plan is not None
        return self.plan

    def _busy(self, phase: Phase) -> bool:
        return self.phase is phase and self.plan is not None

    def _plan_arrived(self, plan: Plan, now: float) -> list[Command]:
        if plan.run == self._run and plan.round < self._round:
            return []  # a replay, or a plan that overtook another
        commands: list[Command] = []
        if (plan.run, plan.round) != (self._run, self._round):
            self._run, self._round = plan.run, plan.round
            commands.append(Remember(plan.run, plan.round))
        if isinstance(plan, IdlePlan):
            return commands + self._end(plan.run, plan.round + 1, "the round is closed")
        commands += self._end(plan.run, plan.round, "a newer round is open")
        if self.agent not in plan.cohort or self._done == (plan.run, plan.round):
            return commands
        if self.plan is not None:  # a later attempt of the round that this agent is working on
            self.plan = plan
            return commands
        self.plan = plan
        if self._pending is not None:
            return commands + self._deliver(self._pending, now)
        self.phase = Phase.FETCHING
        return [*commands, Fetch(plan.base)]

    def _end(self, run: str, first_valid: int, reason: str) -> list[Command]:
        """End all work that is not for ``run`` at round ``first_valid`` or later."""
        commands: list[Command] = []
        if self.plan is not None and (self.plan.run != run or self.plan.round < first_valid):
            if self.phase in (Phase.FETCHING, Phase.TRAINING):
                commands.append(Abandon(reason))
            self._rest()
        if self._pending is not None and (self._pending.run != run or self._pending.round < first_valid):
            self._pending = None
            commands.append(ForgetUpdate(accepted=False, reason=reason))
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
        if pending is None or receipt.sha256 != pending.object.sha256 or receipt.round != pending.round:
            return []
        self._done = receipt.run, receipt.round
        self._pending = None
        self._rest()
        reason = (
            "accepted"
            if receipt.accepted
            else f"{receipt.code.value if receipt.code else 'refused'}: {receipt.detail}"
        )
        return [ForgetUpdate(accepted=receipt.accepted, reason=reason)]

    def _rest(self) -> None:
        self.phase = Phase.IDLE
        self.plan = None
        self._upload = None
