"""The server: one loop that turns the link's messages into the round machine's events and carries out its commands.

The network thread only fills the inbox; hashing, averaging and evaluation run in an executor and post their results
back. So every decision is taken in one thread, in one order.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from aggregator.admission import Limits, OpenRound
from aggregator.announcements import Announcements
from aggregator.averaging import Averaged, Averaging
from aggregator.central_noise import CentralNoise
from aggregator.config import AggregatorConfig
from aggregator.enrolment import Enrolment
from aggregator.evaluation import Evaluation, EvaluationDone
from aggregator.folding import Down, FoldResult
from aggregator.masked_noise import MaskedNoise
from aggregator.plans import Plans, log_opened
from aggregator.presence import Presence
from aggregator.reception import Checked, Reception
from aggregator.releases.after_run import MakeRelease
from aggregator.releases.keys import ReleaseKeys
from aggregator.releases.rollout_events import ForReleases
from aggregator.releases.service import ObjectsKept, ReleaseService
from aggregator.rounds import (
    AgentOffline,
    AgentOut,
    Command,
    Evaluate,
    Evaluated,
    Event,
    Finish,
    Folded,
    Phase,
    RoundRecord,
    Rounds,
    Skip,
    Tick,
    Unmask,
    UpdateStored,
    Wait,
)
from aggregator.rounds import Fold as FoldCommand
from aggregator.rounds import OpenRound as OpenCommand
from aggregator.secure_round import SecureRounds
from aggregator.seeding import Seeder
from aggregator.store import Store
from aggregator.strategies import FedAvg
from aggregator.traffic import TrafficLog, Watch
from aggregator.versions import Versions
from federation.errors import Rejection
from federation.task.checkpoint import CheckpointInfo
from federation.wire.address import BrokerAddress
from federation.wire.inbox import DEFAULT_INBOX_BYTES
from federation.wire.link import (
    Connected,
    Disconnected,
    Inbox,
    Link,
    LinkFailed,
    MakeLink,
    Message,
    Overflow,
)
from federation.wire.messages import (
    IdlePlan,
    TaskSpec,
)
from federation.wire.topics import Topics

log = structlog.get_logger()

CHECKERS = 2

ACCOUNTS_S = 5.0
"""How long the end of a run waits for the agents' traffic. Under the lowest cap a report waits 4 s behind a chunk."""


@dataclass(frozen=True, slots=True)
class _ModelPresent:
    version: str


class Service:
    """Serves one federation until its run is finished (with ``release.stay`` beyond that) or it is told to stop.

    Args:
        config: Settings.
        store: Locked by the caller; holds the initial checkpoint.
        enrolment: Keys and accounts.
        task: What is learned.
        address: Of the broker.
        make_link: Makes the link to it.
        make_release: Makes a release of a finished run's model; None where nothing is released by itself.
    """

    def __init__(
        self,
        config: AggregatorConfig,
        store: Store,
        enrolment: Enrolment,
        task: TaskSpec,
        address: BrokerAddress,
        *,
        make_link: MakeLink = Link,
        make_release: MakeRelease | None = None,
    ) -> None:
        self._config, self._store, self._enrolment, self._task = config, store, enrolment, task
        self._topics = Topics(config.federation)
        # What is asked for must fit, also when it comes twice after a lost link.
        self._inbox = Inbox(max(DEFAULT_INBOX_BYTES, 2 * config.broker.credit_bytes))
        self._announced = Announcements(self._topics, enrolment.aggregator_key(), store.run)
        self._link = make_link(
            address,
            f"{config.federation}-aggregator-{self._announced.session}",
            on_event=self._inbox.put,
            will=self._announced.will,
        )
        self._executor = ThreadPoolExecutor(CHECKERS, thread_name_prefix="worker")
        self._noise = CentralNoise(config, store)
        self._masked_noise = MaskedNoise(config, store)
        self._averaging = Averaging(
            store,
            task,
            self._noise,
            FedAvg(config.rounds.server_learning_rate),
            Down(config.down_encoding, config.max_noise, config.train.seed),
            self._inbox.post,
        )
        self._versions = Versions(store, config.keep_deltas)
        self._secure = SecureRounds(
            link=self._link,
            topics=self._topics,
            store=store,
            key=enrolment.aggregator_key(),
            key_of=enrolment.key_of,
            phase_s=config.privacy.secagg.phase_s,
        )
        self._plans = Plans(config, task, store, self._versions, self._secure, self._noise)
        self._reception = Reception(
            link=self._link,
            topics=self._topics,
            store=store,
            key=enrolment.aggregator_key(),
            key_of=enrolment.key_of,
            limits=Limits(max_samples=config.rounds.max_samples, max_norm=config.rounds.max_update_norm),
            executor=self._executor,
            post=self._inbox.post,
            members=lambda: self._secure.members,
            credit_bytes=config.broker.credit_bytes,
        )
        self._presence = Presence(
            store=store,
            enrolled=lambda agent: enrolment.key_of(agent) is not None,
            encoding=self._plans.encoding,
            on_gone=self._reception.gone,
            on_back=self._back,
        )
        self._seeder = Seeder(
            self._link,
            self._topics,
            store,
            lambda version: self._inbox.post(_ModelPresent(version)),
            lambda name: self._inbox.post(ObjectsKept(name)),
        )
        self._releases = ReleaseService(
            store=store,
            config=config.release,
            topics=self._topics,
            link=self._link,
            keys=ReleaseKeys(store.folder),
            enrolled=enrolment,
            seeder=self._seeder,
            submit=self._submit,
            make=make_release,
        )
        self._watch = Watch(TrafficLog(store), self._link, self._reception.progress)
        self._evaluation = Evaluation(store, self._submit)
        self._stopping = False
        past = store.rounds()
        closed = [row for row in past if row.phase == "closed"]
        self._rounds = Rounds(
            self._plans.rounds,
            seed=config.train.seed,
            round=closed[-1].round if closed else 0,
            accuracies=[row.accuracy for row in closed if row.accuracy is not None],
            masked=self._plans.masked,
            draw=self._noise.draw,
            budget=self._noise.budget() or self._masked_noise.budget(),
        )
        self._interrupted = past[-1] if past and past[-1].phase != "closed" else None
        self._encoding = self._plans.encoding
        self._unevaluated = bool(config.task.holdout and closed and closed[-1].accuracy is None)

    # --- life -----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Serve.

        Returns:
            True when the run is finished, False when it was told to stop.

        Raises:
            TransportError: If the broker cannot be reached at start, or refuses.
            ConfigError: For a fault that the operator must mend (full disk, broken hold-out set).
        """
        self._store.sweep()
        self._store.forget_presence()
        self._link.start()
        try:
            self._link.wait_connected(self._config.broker.connect_timeout_s)
            if self._config.task.holdout and (
                self._interrupted or self._unevaluated or not self._rounds.over
            ):
                info = CheckpointInfo(federation=self._config.federation, round=0, task=self._task)
                self._evaluation.prepare(self._config.task.holdout, info)
            self._releases.start(time.monotonic())
            start = self._rounds.start(time.monotonic(), self._record(), evaluate_first=self._unevaluated)
            self._feed(self._act(start, time.monotonic()), time.monotonic())
            while not self._stopping and self._wanted():
                self._turn()
            self._hear_accounts()
            return self._rounds.phase is Phase.FINISHED
        finally:
            self._seeder.stop()
            self._executor.shutdown(cancel_futures=True)
            self._averaging.stop()
            self._link.stop(self._announced.last_words())
            self._watch.closed()

    def stop(self) -> None:
        """Make :meth:`run` say goodbye and return. From any thread, or from a signal handler."""
        log.info("stop_requested")
        self._stopping = True
        self._inbox.wake()

    def _wanted(self) -> bool:
        """Whether there is anything left to do."""
        return (
            self._rounds.phase is not Phase.FINISHED
            or self._config.release.stay
            or self._releases.pending(time.monotonic())
        )

    def _record(self) -> RoundRecord | None:
        row = self._interrupted
        if row is None:
            return None
        delivered = tuple(self._store.updates(row.round))
        # The wall clock may have been set since: never wait longer than a whole deadline.
        remaining = min(row.deadline_at - time.time(), self._config.rounds.deadline_s)
        # Its updates, here and on the devices, are in the encoding that it was opened with.
        self._encoding = self._plans.resume(row)
        log.info(
            "round_resumed",
            round=row.round,
            attempt=row.attempt,
            delivered=len(delivered),
            cohort=len(row.cohort),
        )
        return RoundRecord(row.round, row.attempt, row.cohort, delivered, Phase(row.phase), remaining)

    # --- the loop -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        now = time.monotonic()
        due = [
            self._announced.due,
            self._watch.due,
            self._releases.next_wakeup(),
            *(
                at
                for room in (self._rounds, self._reception, self._secure)
                if (at := room.next_wakeup()) is not None
            ),
        ]
        item = self._inbox.get(max(0.0, min(due) - now))
        now = time.monotonic()
        if item is not None:
            self._feed(self._take(item, now), now)
        if item is None or now >= min(due):  # an inbox that is never empty must not stop the clock
            self._reception.tick(now)
            self._releases.tick(now)
            self._feed([*self._secure.tick(now), Tick()], now)
        if now >= self._announced.due:
            self._announced.refresh(self._link, now)
        if now >= self._watch.due:
            self._watch.look(now)

    def _hear_accounts(self) -> None:
        """Wait a little for what agents tell of the last round, which they do after its receipts."""
        number = self._store.newest_round()
        delivered = frozenset(self._store.updates(number))
        deadline = time.monotonic() + ACCOUNTS_S
        while not self._stopping and self._presence.owes_account(number, delivered):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            item = self._inbox.get(remaining)
            if isinstance(item, Message):
                self._message(item, time.monotonic())

    def _feed(self, events: Iterable[Event], now: float) -> None:
        queue = deque(events)
        while queue:
            event = queue.popleft()
            if isinstance(event, UpdateStored):
                self._averaging.add(self._rounds.round, event.agent, self._encoding)
            if isinstance(event, AgentOffline | AgentOut):
                queue.extend(self._secure.gone(event.agent, now))
            queue.extend(self._act(self._rounds.handle(event, now), now))

    def _take(self, item: object, now: float) -> list[Event]:
        match item:
            case Message():
                return self._message(item, now)
            case Checked():
                return self._reception.checked(item, now)
            case Averaged(number, result):
                return self._folded(number, result)
            case EvaluationDone():
                self._versions.prune(self._config.keep_checkpoints)
                return [Evaluated(self._evaluation.keep(item))]
            case _ModelPresent(version):
                if self._announced.model_present(version, self._link, now):
                    return self._secure.announced(now)
            case ForReleases():
                self._releases.take(item)
            case BaseException():
                raise item
            case Connected() | Disconnected() | Overflow() | LinkFailed():
                return self._link_changed(item, now)
            case _:
                raise AssertionError(f"nobody posts {type(item).__name__}")
        return []

    def _link_changed(
        self, item: Connected | Disconnected | Overflow | LinkFailed, now: float
    ) -> list[Event]:
        match item:
            case Connected():
                self._subscribe(now)
                return self._secure.connected(now)
            case Disconnected():  # the link has said why, and goes on trying; the round goes on without it
                self._releases.disconnected(now)
            case Overflow(dropped):
                log.warning("inbox_overflowed", dropped=dropped, remedy="agents repeat what was lost")
                self._subscribe(now)
            case LinkFailed(error):
                log.error("link_fault", error=error)
        return []

    def _folded(self, number: int, result: FoldResult) -> list[Event]:
        for agent in result.damaged:
            self._store.record_refusal(
                number, agent, Rejection.WRONG_HASH, "damaged on the aggregator's disk"
            )
        self._store.close_round(number, result.seconds, result.version)
        self._secure.discard()
        self._watch.closed()
        log.info("round_closed", round=number, fold_s=round(result.seconds, 3))
        return [*self._presence.revoked(), Folded()]

    def _back(self, agent: str) -> None:
        self._reception.back(agent)
        self._secure.back(agent)

    def _subscribe(self, now: float) -> None:
        self._link.subscribe(
            [
                (self._topics.state("+"), 1),
                (self._topics.telemetry("+"), 0),
                (self._topics.up("+"), 1),
                (self._topics.model("+"), 1),
            ]
        )
        self._presence.connected()
        self._announced.repeat(self._link, now)
        self._seeder.connected()
        self._releases.connected(now)

    def _message(self, message: Message, now: float) -> list[Event]:
        chunk = self._topics.parse_object_chunk(message.topic)
        if chunk is not None:
            self._seeder.arrived(chunk[0], message.payload)
            return []
        topic = self._topics.parse_agent(message.topic)
        if topic is None:
            log.debug("topic_ignored", topic=message.topic[:200])
            return []
        match topic.kind:
            case "state" if message.payload:
                return self._presence.state(topic.agent, message.payload, retained=message.retain)
            case "offer":
                return self._reception.message(topic.agent, message.payload, now)
            case "masking up":
                return self._secure.message(topic.agent, message.payload, now)
            case "chunk":
                self._reception.chunk(topic.agent, topic.sha256, topic.index, message.payload, now)
            case "release" | "model":
                self._releases.message(topic.agent, topic.kind, message.payload, now, retained=message.retain)
            case "telemetry":
                self._presence.telemetry(topic.agent, message.payload, now)
        return []

    # --- carrying out ---------------------------------------------------------------------------------------------

    def _act(self, commands: list[Command], now: float) -> list[Event]:
        events: list[Event] = []
        for command in commands:
            match command:
                case OpenCommand():
                    self._open(command)
                case Unmask(number, agents):
                    self._store.start_unmasking(number)
                    self._reception.shut()
                    events += self._secure.unmask(agents, now)
                case Skip(number):
                    log.error(
                        "round_skipped", round=number, reason="its sum cannot be had", lost="its updates"
                    )
                    self._averaging.skip(number)
                case FoldCommand(number, agents):
                    self._fold(number, agents)
                case Evaluate(number):
                    self._evaluation.begin(number)
                case Wait(number, missing):
                    reason = f"waiting for {missing} more agents" if missing else "waiting for more agents"
                    log.info("waiting_for_agents", round=number, missing=missing)
                    self._idle(number, reason, finished=False)
                case Finish(number, reason):
                    log.info("run_finished", round=number, reason=reason)
                    self._idle(number, reason, finished=True)
                    self._releases.run_finished(number)
        return events

    def _open(self, command: OpenCommand) -> None:
        if self._interrupted is None or self._interrupted.round != command.round:
            self._encoding = self._plans.encoding
        schema = self._averaging.schema(command.round)
        self._noise.open(command.round, schema, wanted=self._rounds.wanted, online=len(self._rounds.online))
        plan, objects = self._plans.make(command, self._encoding, self._chunk_bytes(), self._rounds.wanted)
        self._masked_noise.pay(plan)
        self._store.open_round(
            command.round,
            command.attempt,
            command.cohort,
            base=plan.base,
            encoding=self._encoding,
            deadline_s=command.deadline_s,
            masked=plan.privacy.secagg is not None,
        )
        if not command.cohort:  # a secret draw of nobody: there is nobody to tell
            return
        masking = None
        if plan.privacy.secagg is not None:
            self._secure.open(plan)
            masking = self._averaging.mask(plan)
        accepted = self._store.updates(plan.round)
        self._reception.open(
            OpenRound.of(plan, schema, {agent: update.sha256 for agent, update in accepted.items()}, masking)
        )
        for agent in accepted:  # by an earlier process; those of an earlier attempt have been added
            self._averaging.add(plan.round, agent, self._encoding)
        self._watch.opened(plan.round)
        self._announced.hold(plan)
        self._seeder.want(plan.base, objects)
        log_opened(plan, self._rounds.quorum)

    def _fold(self, number: int, agents: tuple[str, ...]) -> None:
        if self._secure.unmask_plan is not None:
            self._averaging.unmask(number, self._secure.unmask_plan)
            return
        self._store.start_folding(number)
        self._reception.shut()
        self._averaging.close(number, agents, self._encoding)

    def _idle(self, number: int, reason: str, *, finished: bool) -> None:
        plan = IdlePlan(
            run=self._store.run, round=number, finished=finished, reason=reason, issued_at=time.time()
        )
        self._announced.plan(plan, self._link, time.monotonic())

    def _chunk_bytes(self) -> int:
        return min(self._config.broker.chunk_bytes, self._link.limits.largest_chunk)

    def _submit(self, work: Callable[[], object]) -> None:
        def hand_back(done: Future[object]) -> None:
            if not done.cancelled():
                self._inbox.post(done.exception() or done.result())

        self._executor.submit(work).add_done_callback(hand_back)
