"""edge_agent.session under any order of plans, replays, credits, receipts, faults and power loss."""

from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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
    LinkUp,
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
    UpdateReady,
    WorkFailed,
)
from federation.errors import PeerError, Rejection
from federation.wire.messages import (
    Credit,
    FullModel,
    IdlePlan,
    Receipt,
    RoundPlan,
    TaskSpec,
    TrainMetrics,
    TrainSpec,
    UpdateOffer,
)
from federation.wire.transfer import make_ref

ME = "me"
RUNS = ("0" * 16, "1" * 16)
ROUNDS = 4
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))

Key = tuple[str, int]
keys = st.tuples(st.sampled_from(RUNS), st.integers(1, ROUNDS))


def base_of(key: Key) -> str:
    """The version that a round starts from; two rounds of a run share each."""
    return sha256(f"{key[0]} {key[1] // 2}".encode()).hexdigest()


def full_of(key: Key, chunk_bytes: int) -> FullModel:
    return FullModel(version=base_of(key), object=make_ref(f"model {base_of(key)}".encode() * 9, chunk_bytes))


def offer_of(key: Key) -> UpdateOffer:
    return UpdateOffer(
        run=key[0],
        round=key[1],
        base=base_of(key),
        object=make_ref(f"update {key}".encode() * 9, 64),
        encoding="float32",
        samples=1,
        metrics=TrainMetrics(loss=0.0, accuracy=0.0, steps=1, train_s=0.0),
    )


class Device(RuleBasedStateMachine):
    """A device whose disk is three attributes, and whose worker is told what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        # what the disk remembers
        self.progress = Remember("", 0, done=False)
        self.outbox: UpdateOffer | None = None
        # what the worker does
        self.fetching: RoundPlan | None = None
        self.training: Key | None = None
        # what an observer knows
        self.invited: set[Key] = set()
        self.receipted: set[Key] = set()
        self.newest: dict[str, int] = {}
        self.retired: set[str] = set()
        self.run = ""
        self.session = Session(ME)

    # --- the server and the network -------------------------------------------------------------------------------

    @rule(key=keys, invited=st.booleans(), attempt=st.integers(1, 3), chunk_bytes=st.sampled_from([64, 128]))
    def a_plan_arrives(self, key: Key, invited: bool, attempt: int, chunk_bytes: int) -> None:
        plan = RoundPlan(
            run=key[0],
            round=key[1],
            attempt=attempt,
            task=TASK,
            train=TrainSpec(),
            base=base_of(key),
            full=full_of(key, chunk_bytes),
            deltas=(),
            up_encoding="float32",
            max_noise=0.0,
            cohort=(ME, "you") if invited else ("you",),
            deadline_s=60,
            issued_at=0,
            upload_chunk_bytes=64,
        )
        stale = self.is_stale(key)
        if invited:
            self.invited.add(key)
        commands = self.feed(PlanArrived(plan))
        if stale:
            assert [type(command) for command in commands] == [IgnorePlan], "a replay"
            return
        self.sees(*key)
        if not invited and self.session.plan is None:
            assert not any(isinstance(command, Fetch | Train | SendOffer) for command in commands)

    @rule(run=st.sampled_from(RUNS), number=st.integers(0, ROUNDS))
    def an_idle_plan_arrives(self, run: str, number: int) -> None:
        stale = self.is_stale((run, number))
        plan = IdlePlan(run=run, round=number, finished=False, reason="", issued_at=0)
        commands = self.feed(PlanArrived(plan))
        if stale:
            assert [type(command) for command in commands] == [IgnorePlan], "a replay"
            return
        self.sees(run, number)
        assert self.session.phase is Phase.IDLE
        assert self.outbox is None, "what is over is forgotten"

    @rule(key=keys, chunks=st.lists(st.integers(0, 6), min_size=1, max_size=4))
    def a_credit_arrives(self, key: Key, chunks: list[int]) -> None:
        ref = offer_of(key).object
        event = CreditArrived(Credit(sha256=ref.sha256, chunks=tuple(chunks)))
        if (
            max(chunks) >= ref.chunks
            and self.session.phase is Phase.DELIVERING
            and self.outbox == offer_of(key)
        ):
            with pytest.raises(PeerError):
                self.session.handle(event, self.now)
            return
        commands = self.feed(event)
        for command in commands:
            assert isinstance(command, SendChunks)
            assert set(command.indices) == set(chunks)

    @rule(key=keys, accepted=st.booleans())
    def a_receipt_arrives(self, key: Key, accepted: bool) -> None:
        expected = self.outbox is not None and (self.outbox.run, self.outbox.round) == key
        self.feed(
            ReceiptArrived(
                Receipt(
                    run=key[0],
                    round=key[1],
                    sha256=offer_of(key).object.sha256,
                    accepted=accepted,
                    code=None if accepted else Rejection.LATE,
                )
            )
        )
        if expected:
            self.receipted.add(key)
            assert self.outbox is None

    @rule()
    def the_link_comes_back(self) -> None:
        self.feed(LinkUp())

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())
        wakeup = self.session.next_wakeup()
        assert wakeup is None or wakeup > self.now, "a wakeup in the past would keep a processor busy"

    # --- the device -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.fetching is not None)
    @rule()
    def the_model_is_there(self) -> None:
        assert self.fetching is not None
        plan, self.fetching = self.fetching, None
        assert [type(command) for command in self.feed(BaseReady(plan.base))] == [Train]

    @precondition(lambda self: self.training is not None)
    @rule()
    def training_ends(self) -> None:
        assert self.training is not None
        key, self.training = self.training, None
        self.outbox = offer_of(key)
        self.feed(UpdateReady(self.outbox))

    @precondition(lambda self: self.training is not None)
    @rule()
    def the_base_model_cannot_be_made(self) -> None:
        assert self.training is not None
        key, self.training = self.training, None
        assert [type(command) for command in self.feed(BaseUnusable(*key, "damaged"))] == [Fetch]

    @rule(key=keys)
    def the_base_model_of_an_abandoned_training_could_not_be_made(self, key: Key) -> None:
        if key != self.training:
            assert self.feed(BaseUnusable(*key, "damaged")) == []

    @rule(key=keys)
    def a_model_of_another_round_is_there(self, key: Key) -> None:
        if self.fetching is None or base_of(key) != self.fetching.base:
            assert self.feed(BaseReady(base_of(key))) == []

    @rule(key=keys)
    def an_abandoned_training_ends_after_all(self, key: Key) -> None:
        if key != self.training:
            assert self.feed(UpdateReady(offer_of(key))) == []

    @rule(key=keys)
    def work_fails(self, key: Key) -> None:
        self.feed(WorkFailed(*key, "out of memory"))
        if self.training == key:
            self.training = None

    @rule()
    def the_power_fails(self) -> None:
        self.fetching = self.training = None
        seen = self.progress
        self.session = Session(
            ME, seen=(seen.run, seen.round), done=seen.done, pending=self.outbox, retired=seen.retired
        )

    @precondition(lambda self: self.outbox is not None)
    @rule()
    def the_power_fails_before_the_update_is_deleted(self) -> None:
        assert self.outbox is not None
        kept = self.outbox
        self.a_receipt_arrives((kept.run, kept.round), accepted=True)
        self.outbox = kept
        self.the_power_fails()

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def agrees_with_the_disk(self) -> None:
        assert self.progress.run == self.run
        assert self.progress.round == self.newest.get(self.run, 0)

    @invariant()
    def works_only_where_it_was_invited(self) -> None:
        if self.session.phase is not Phase.IDLE:
            plan = self.session.plan
            assert plan is not None
            assert (plan.run, plan.round) in self.invited
            assert (plan.run, plan.round) == (self.run, self.newest[self.run])

    def sees(self, run: str, number: int) -> None:
        if run != self.run:
            self.retired |= {self.run} if self.run else set()
        self.run, self.newest[run] = run, number

    def is_stale(self, key: Key) -> bool:
        return key[0] in self.retired or (key[0] == self.run and key[1] < self.newest[self.run])

    def feed(self, event: Event) -> list[Command]:
        commands = self.session.handle(event, self.now)
        for command in commands:
            self.carry_out(command)
        return commands

    def carry_out(self, command: Command) -> None:
        plan = self.session.plan
        match command:
            case Fetch(wanted):
                assert wanted == plan, "what the newest plan offers, and nothing else"
                assert self.training is None, "the recipe of a training is not changed under it"
                self.fetching = wanted
            case Train(asked):
                key = asked.run, asked.round
                assert key not in self.receipted, "a round with a receipt was trained again"
                assert self.training is None, "two trainings at once"
                assert key == (self.progress.run, self.progress.round)
                self.training = key
            case Abandon():
                self.fetching = self.training = None
            case SendOffer() | SendChunks():
                assert plan is not None
                assert self.outbox is not None
                assert (self.outbox.run, self.outbox.round) == (plan.run, plan.round), "for another round"
                assert not isinstance(command, SendChunks) or command.offer == self.outbox
            case SendDecline(run, number):
                assert (run, number) == (self.progress.run, self.progress.round)
                assert (run, number) in self.invited
                self.fetching = None
            case ForgetUpdate():
                assert self.outbox is not None, "forgotten twice"
                self.outbox = None
            case Remember(run, number):
                assert run != self.progress.run or number >= self.progress.round, "back in time"
                assert command != self.progress, "a write that says nothing new wears the disk"
                self.progress = command


TestDevice = Device.TestCase
TestDevice.settings = settings(deadline=None, max_examples=250, stateful_step_count=40)
