"""The daemon: one loop between the link, the session's state table and the training thread.

The network thread only fills the inbox; training, encoding and signing run in one worker thread, so that pings go out
while torch computes. Every decision is taken in the loop.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from edge_agent.config import PrivacyLimits
from edge_agent.fetching import ModelCache
from edge_agent.guard import Guard, owner_of
from edge_agent.identities import Identities
from edge_agent.kept_training import KeptTraining
from edge_agent.metering import RoundMeter, UploadShare
from edge_agent.outbox import Outbox
from edge_agent.progress import Progress, read_progress, write_progress
from edge_agent.secure_update import SecureUpdate
from edge_agent.session import (
    Abandon,
    BaseReady,
    BaseUnusable,
    Command,
    CreditArrived,
    Event,
    Fetch,
    ForgetUpdate,
    IgnorePlan,
    JoinSum,
    LinkUp,
    Mask,
    Phase,
    PlanArrived,
    ReceiptArrived,
    Remember,
    SendChunks,
    SendDecline,
    SendOffer,
    Session,
    Tick,
    Train,
    TrainingKept,
    UpdateReady,
    WorkFailed,
)
from edge_agent.telemetry import Health
from edge_agent.terms import Requirement, objection
from edge_agent.watchdog import Notifier
from edge_agent.worker import Trainer, Worker
from federation.bundle import Bundle, address
from federation.errors import (
    BrokerRefusedError,
    ConfigError,
    PeerError,
    TransportError,
    VerificationError,
)
from federation.logs import Sparingly
from federation.wire.link import (
    Connected,
    Disconnected,
    Inbox,
    Link,
    LinkFailed,
    MakeLink,
    Message,
    Overflow,
    Will,
)
from federation.wire.messages import (
    AgentState,
    Capabilities,
    Credit,
    Decline,
    IdlePlan,
    Plan,
    Receipt,
    RoundPlan,
    UpdateOffer,
    decode_json,
    decode_msgpack,
    encode_json,
)
from federation.wire.rate import TokenBucket, upload_chunk_bytes
from federation.wire.signing import AGGREGATOR, Purpose, private_key, public_key, seal, unseal
from federation.wire.topics import AgentTopic, Topics

T = TypeVar("T")

log = structlog.get_logger()

UNANSWERED_WARNING = 3
"""Offers without an answer after which the operator is told."""


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of the daemon.

    Attributes:
        state_dir: Identity-independent state: outbox, base model, progress.
        telemetry_s: Seconds between health reports; 0 sends none.
        give_up_after_s: Seconds after which the first connect fails for good; 0 tries for ever.
        plugins: Plug-in models (``package.module:factory``) that a plan may name.
        max_rate: Cap on the bandwidth of each direction, bytes a second (:mod:`federation.wire.rate`); None for none.
        required: Terms that a plan must state.
        limits: What no plan can exceed.
        data: What the device's data is called; it stays in the privacy ledger.
    """

    state_dir: Path
    telemetry_s: float = 60.0
    give_up_after_s: float = 0.0
    plugins: frozenset[str] = frozenset()
    max_rate: float | None = None
    required: tuple[Requirement, ...] = ()
    limits: PrivacyLimits = field(default_factory=PrivacyLimits)
    data: str = ""


class Agent:
    """One device in one federation.

    Args:
        bundle: Identity and broker account.
        capabilities: What goes into the birth.
        trainer: Trains.
        options: Settings.
        make_link: Makes the link to the broker.
        notifier: Hears that the loop turns. Training may take hours and is not watched.
    """

    def __init__(
        self,
        bundle: Bundle,
        capabilities: Capabilities,
        trainer: Trainer,
        options: Options,
        *,
        make_link: MakeLink = Link,
        notifier: Notifier | None = None,
    ) -> None:
        self._bundle, self._options = bundle, options
        self._notifier = notifier or Notifier()
        self._topics = Topics(bundle.federation)
        self._name = bundle.agent
        self._key = private_key(bundle.private_key)
        self._aggregator_key = public_key(bundle.aggregator_key)
        self._session_id = secrets.token_hex(8)
        options.state_dir.mkdir(parents=True, exist_ok=True)
        self._progress_path = options.state_dir / "progress.json"
        self._birth = encode_json(
            AgentState(state="online", session=self._session_id, capabilities=capabilities)
        )
        self._death = encode_json(AgentState(state="offline", session=self._session_id))
        self._inbox = Inbox()
        self._link = make_link(
            address(bundle),
            f"{bundle.federation}-{self._name}-{self._session_id}",
            on_event=self._inbox.put,
            will=Will(self._topics.state(self._name), self._death),
            max_rate=options.max_rate,
        )
        self._down_cap = None if options.max_rate is None else TokenBucket(options.max_rate)
        self._cache = ModelCache(
            options.state_dir / "objects",
            self._link,
            self._topics,
            lambda version: self._inbox.post(BaseReady(version)),
            self._down_cap,
        )
        self._outbox = Outbox(
            options.state_dir / "outbox",
            federation=bundle.federation,
            agent=self._name,
            key=self._key,
            preferred_chunk_bytes=None if options.max_rate is None else upload_chunk_bytes(options.max_rate),
        )
        masking = options.state_dir / "secagg"
        masking.mkdir(exist_ok=True)
        self._kept = KeptTraining(masking / "trained")
        self._secure = SecureUpdate(
            masking,
            federation=bundle.federation,
            agent=self._name,
            key=self._key,
            aggregator_key=self._aggregator_key,
            identities=Identities(
                bundle.federation,
                seen=options.state_dir / "roster",
                pinned=Path(options.limits.roster) if options.limits.roster else None,
            ),
            publish=lambda sealed: self._publish(self._topics.masking_up(self._name), sealed, qos=1),
        )
        self._worker = Worker(
            trainer,
            self._outbox,
            Guard(options.state_dir / "ledger", owner_of(bundle), options.limits, data=options.data),
            self._kept,
            federation=bundle.federation,
            agent=self._name,
            plugins=options.plugins,
            post=self._inbox.post,
        )
        progress = read_progress(self._progress_path)
        self._session = Session(
            self._name,
            seen=(progress.run, progress.round),
            done=progress.done,
            pending=self._outbox.pending(),
            kept=self._kept.key(),
            retired=progress.retired,
            objection=lambda plan: objection(plan.privacy, options.required, options.limits.max_epsilon),
        )
        self._health = Health(self._session_id, options.state_dir)
        self._health_due = time.monotonic()
        self._meter, self._upload, self._telling = RoundMeter(), UploadShare(), Sparingly()
        self._stopping = False
        self._ever_connected = False

    def run(self) -> None:
        """Serve until :meth:`stop`.

        Raises:
            TransportError: If the broker refuses, or cannot be reached within ``give_up_after_s``.
            ConfigError: If another process runs under this identity, or the disk is full.
        """
        self._link.start()
        goodbye = [(self._topics.state(self._name), self._death, 1, True)]
        try:
            if self._options.give_up_after_s:
                self._link.wait_connected(self._options.give_up_after_s)
            while not self._stopping:
                self._turn()
        except _TakenOverError:
            goodbye = []  # the state topic belongs to the other process now
            raise
        finally:
            self._notifier.stopping()
            self._worker.stop()
            self._link.stop(goodbye)

    def stop(self) -> None:
        """Make :meth:`run` say goodbye and return. From any thread, or from a signal handler."""
        log.info("stop_requested")
        self._stopping = True
        self._inbox.wake()

    # --- the loop -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._notifier.alive(self._doing)
        now = time.monotonic()
        period_s = self._notifier.period_s
        wakeups = (
            None if period_s is None else now + period_s,
            self._session.next_wakeup(),
            self._cache.next_wakeup(),
            self._secure.next_wakeup(),
            self._health_wakeup(),
        )
        due = [at for at in wakeups if at is not None]
        item = self._inbox.get(max(0.0, min(due) - now) if due else None)
        now = time.monotonic()
        if item is not None:
            self._take(item, now)
        if item is None or (due and now >= min(due)):  # an inbox that is never empty must not stop the clock
            self._cache.tick(now)
            self._feed_all(self._secure.tick(now), now)
            self._feed(Tick(), now)
        wakeup = self._health_wakeup()
        if wakeup is not None and now >= wakeup:
            self._health_due = now + self._options.telemetry_s
            self._report()

    def _health_wakeup(self) -> float | None:
        return self._health_due if self._options.telemetry_s and self._link.connected else None

    def _doing(self) -> str:
        if not self._link.connected:
            return "waiting for the broker"
        phase = self._session.phase
        return (
            "no round to take part in"
            if phase is Phase.IDLE
            else f"round {self._session.round}: {phase.value}"
        )

    def _report(self) -> None:
        phase = self._session.phase
        delivering = phase is Phase.DELIVERING
        share = self._upload.share(self._link.waiting) if delivering else self._cache.share
        report = self._health.report(
            phase.value, progress=share, total=self._link.traffic, traffic=self._meter.last
        )
        self._link.publish(self._topics.telemetry(self._name), encode_json(report), qos=0)

    def _take(self, item: object, now: float) -> None:
        match item:
            case Message():
                self._message(item, now)
            case BaseUnusable():
                self._base_unusable(item, now)
            case UpdateReady(offer):
                self._secure.masked(offer.attempt, now)
                self._feed(item, now)
            case BaseReady() | TrainingKept() | WorkFailed():
                self._feed(item, now)
            case Connected():
                self._ever_connected = True
                self._subscribe()
                self._cache.reconnected(now)
                self._feed_all(self._secure.reconnected(now), now)
                self._feed(LinkUp(), now)
            case Disconnected(reason, refused):
                if refused and not self._ever_connected:
                    raise BrokerRefusedError(reason)
            case Overflow(dropped):
                log.warning("inbox_overflowed", dropped=dropped, remedy="what was lost is asked for again")
                self._subscribe()
            case LinkFailed(error):
                log.error("link_fault", error=error)
            case BaseException():
                raise item
            case _:
                raise AssertionError(f"nobody posts {type(item).__name__}")

    def _subscribe(self) -> None:
        state = self._topics.state(self._name)
        self._link.publish(state, self._birth, qos=1, retain=True)
        # The state after the birth, so that what comes back is the birth itself or the word of a later process.
        self._link.subscribe([(self._topics.down(self._name), 1), (state, 1), (self._topics.plan, 1)])

    def _message(self, message: Message, now: float) -> None:
        chunk = self._topics.parse_object_chunk(message.topic)
        if chunk is not None:
            self._fetching(lambda: self._cache.chunk(*chunk, message.payload, now), now)
            return
        if self._down_cap is not None:
            self._down_cap.spend(len(message.topic) + len(message.payload), now)  # it came unasked; pull less
        try:
            if self._topics.parse_agent(message.topic) == AgentTopic(self._name, "masking down"):
                self._feed_all(self._secure.message(message.payload, now), now)
                return
            event = self._read(message)
            if event is not None:
                self._feed(event, now)
        except PeerError as error:
            log.warning(
                "message_refused",
                topic=message.topic[:200],
                code=error.code.value,
                detail=error.detail,
                remedy="if the aggregator was set up anew, enrol this device again",
            )

    def _read(self, message: Message) -> Event | None:
        if message.topic == self._topics.plan:
            plan: Plan = self._unseal(message.payload, RoundPlan | IdlePlan, Purpose.PLAN)  # type: ignore[arg-type]
            return PlanArrived(plan)
        match self._topics.parse_agent(message.topic):
            case AgentTopic(self._name, "credit"):
                return CreditArrived(decode_msgpack(message.payload, Credit))
            case AgentTopic(self._name, "receipt"):
                receipt = self._unseal(message.payload, Receipt, Purpose.RECEIPT)
                self._outbox.settle(receipt)
                return ReceiptArrived(receipt)
            case AgentTopic(self._name, "state") if message.payload:
                self._own_state(decode_json(message.payload, AgentState), retained=message.retain)
        return None

    def _unseal(self, payload: bytes, kind: type[T], purpose: Purpose) -> T:
        return unseal(
            payload,
            kind,
            purpose=purpose,
            federation=self._bundle.federation,
            sender=AGGREGATOR,
            key=self._aggregator_key,
        )

    def _own_state(self, state: AgentState, *, retained: bool) -> None:
        if state.state == "offline":
            # The will of a lost connection, or of an earlier life, came after the birth.
            self._link.publish(self._topics.state(self._name), self._birth, qos=1, retain=True)
        elif state.session != self._session_id and not retained:
            # A retained one may be the birth of an earlier life: nats-server can still deliver it after ours was sent.
            raise _TakenOverError(
                f"another process runs as {self._name!r} in federation {self._bundle.federation!r}: this one stops. "
                "Enrol every device under a name of its own, and start one agent per bundle"
            )

    # --- carrying out ---------------------------------------------------------------------------------------------

    def _feed_all(self, events: list[Event], now: float) -> None:
        for event in events:
            self._feed(event, now)

    def _feed(self, event: Event, now: float) -> None:
        moved = self._link.traffic  # read before a fetch begins, or its first chunks would count for no round
        for command in self._session.handle(event, now):
            self._carry_out(command, now)
        plan = self._session.plan
        if plan is None:
            self._secure.leave()
        here = None if plan is None else (plan.run, plan.round)
        if self._meter.observe(here, moved) and self._options.telemetry_s:
            self._report()
        if self._session.phase is Phase.DELIVERING and self._upload.total and self._telling.due(now):
            sent = self._upload.sent(self._link.waiting)
            log.info("update_sending", round=self._session.round, sent=sent, total=self._upload.total)

    def _carry_out(self, command: Command, now: float) -> None:
        match command:
            case Fetch(plan):
                self._fetching(lambda: self._cache.fetch(plan, now), now)
            case Train(plan):
                self._upload = UploadShare()
                self._worker.start(plan, self._cache.recipe(), self._link.limits.largest_chunk)
            case JoinSum(plan) | Mask(plan):
                self._masking(plan, now, mask=isinstance(command, Mask))
            case Abandon(reason):
                log.info("round_abandoned", reason=reason)
                self._worker.cancel()
                self._cache.abandon()
            case SendOffer(unanswered):
                self._send_offer(unanswered)
            case SendChunks(offer, indices):
                self._send_chunks(offer, indices, now)
            case SendDecline(run, number, reason, code):
                log.error("round_declined", round=number, code=code.value, reason=reason)
                self._send_signed(Decline(run=run, round=number, reason=reason[:1000], code=code))
            case ForgetUpdate(accepted, reason):
                report = log.info if accepted else log.warning
                report("update_accepted" if accepted else "update_dropped", reason=reason)
                self._link.drop_waiting()
                self._outbox.clear()
            case Remember(run, number, done, retired):
                self._remember(Progress(run, number, done, retired))
                if done or self._kept.key() != (run, number):
                    self._kept.clear()
            case IgnorePlan(number, reason):
                log.warning(
                    "plan_ignored",
                    round=number,
                    reason=reason,
                    remedy="if the aggregator was restored from a backup, begin a new run (docs/operations.md)",
                )

    def _masking(self, plan: RoundPlan, now: float, *, mask: bool) -> None:
        if mask:
            self._worker.mask(plan, self._secure.take_masks(), self._link.limits.largest_chunk)
            return
        for event in self._secure.join(plan, now):
            self._inbox.post(event)

    def _fetching(self, step: Callable[[], None], now: float) -> None:
        try:
            step()
        except (ConfigError, PeerError) as error:  # a full disk, a model that is not what it was said to be
            self._cache.abandon()
            self._feed(WorkFailed(self._session.run, self._session.round, str(error)), now)

    def _base_unusable(self, event: BaseUnusable, now: float) -> None:
        plan = self._session.plan
        if plan is None or (plan.run, plan.round) != (event.run, event.round):
            return  # a newer plan has come, and its own fetch has begun
        other_way = self._cache.reject()
        log.warning("base_model_rejected", round=event.round, reason=event.reason, fetched_again=other_way)
        self._feed(event if other_way else WorkFailed(event.run, event.round, event.reason), now)

    def _remember(self, progress: Progress) -> None:
        try:
            write_progress(self._progress_path, progress)
        except ConfigError as error:
            log.error("progress_not_saved", reason=str(error), lost="nothing, unless the power fails now")

    def _send_offer(self, unanswered: int) -> None:
        if not unanswered:
            log.info("update_offered", round=self._session.round)
        if unanswered == UNANSWERED_WARNING:
            log.warning(
                "offer_unanswered",
                offers=unanswered,
                remedy="is the aggregator up, and this device still enrolled? the update stays on disk until it answers",
            )
        self._publish(self._topics.offer(self._name), self._outbox.sealed_offer(), qos=1)

    def _send_chunks(self, offer: UpdateOffer, indices: tuple[int, ...], now: float) -> None:
        if self._upload.begin(offer.object):
            self._telling.restart()
        self._upload.ask(indices)
        for index in indices:
            try:
                payload = self._outbox.chunk(offer, index)
            except (ConfigError, VerificationError) as error:  # the disk has lost it: train again, and stay
                self._feed(WorkFailed(offer.run, offer.round, str(error)), now)
                return
            topic = self._topics.upload_chunk(self._name, offer.object.sha256, index)
            self._publish(topic, payload, qos=0, yielding=True)

    def _send_signed(self, message: Decline) -> None:
        sealed = seal(
            message,
            purpose=Purpose.AGENT,
            federation=self._bundle.federation,
            sender=self._name,
            key=self._key,
        )
        self._publish(self._topics.offer(self._name), sealed, qos=1)

    def _publish(self, topic: str, payload: bytes, *, qos: int, yielding: bool = False) -> None:
        try:
            # Unsent while offline: it is offered again after the connect.
            self._link.publish(topic, payload, qos=qos, yielding=yielding)
        except TransportError as error:
            log.error("send_failed", topic=topic, reason=str(error))


class _TakenOverError(ConfigError):
    """Another process announced itself under this agent's name."""
