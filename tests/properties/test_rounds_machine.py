"""aggregator.rounds under any weather: agents come, go, deliver and decline, time passes, the server is killed."""

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aggregator.config import RoundsConfig
from aggregator.rounds import (
    AgentOffline,
    AgentOnline,
    AgentOut,
    Command,
    Evaluate,
    Evaluated,
    Event,
    Finish,
    Fold,
    Folded,
    OpenRound,
    Phase,
    RoundRecord,
    Rounds,
    Tick,
    UpdateStored,
    Wait,
)

AGENTS = ("a", "b", "c", "d", "e")
DEADLINE_S = 100.0
PERCENT = 100

agent_names = st.sampled_from(AGENTS)


class Server(RuleBasedStateMachine):
    """A server whose disk is a few attributes, and whose clock is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.config = RoundsConfig()
        self.machine = Rounds(self.config)
        # what the disk remembers
        self.open: OpenRound | None = None
        self.deadline = 0.0
        self.disk: set[str] = set()
        self.closing: Fold | None = None
        self.closed = 0
        # what is being worked on
        self.evaluating = False
        self.finished = False

    @initialize(
        count=st.integers(1, 3),
        least=st.integers(1, 3),
        extra=st.integers(0, 2),
        everybody=st.booleans(),
        over=st.sampled_from([0.0, 0.5]),
        quorum=st.sampled_from([0, 50, 100]),
        gather_s=st.sampled_from([0.0, 5.0]),
        grace_s=st.sampled_from([0.0, 10.0]),
    )
    def begin(
        self,
        count: int,
        least: int,
        extra: int,
        everybody: bool,
        over: float,
        quorum: int,
        gather_s: float,
        grace_s: float,
    ) -> None:
        self.config = RoundsConfig(
            count=count,
            min_agents=least,
            cohort_size=0 if everybody else least + extra,
            over_selection=over,
            quorum=quorum / PERCENT,
            gather_s=gather_s,
            grace_s=grace_s,
            deadline_s=DEADLINE_S,
        )
        self.machine = Rounds(self.config)
        self.carry_out(self.machine.start(self.now))

    # --- the weather --------------------------------------------------------------------------------------------

    @rule(agent=agent_names)
    def comes_online(self, agent: str) -> None:
        self.feed(AgentOnline(agent))

    @rule(agent=agent_names)
    def goes_offline(self, agent: str) -> None:
        self.feed(AgentOffline(agent))

    @rule(agent=agent_names)
    def delivers(self, agent: str) -> None:
        if self.takes_updates_of(agent):
            self.disk.add(agent)
        self.feed(UpdateStored(agent))

    @rule(agent=agent_names)
    def declines(self, agent: str) -> None:
        self.feed(AgentOut(agent))

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 9.0, 60.0, 200.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())

    @rule()
    def sleeps_until_the_wakeup(self) -> None:
        wakeup = self.machine.next_wakeup()
        if wakeup is not None:
            self.now = wakeup
            self.feed(Tick())

    @precondition(lambda self: self.closing is not None)
    @rule()
    def averaging_ends(self) -> None:
        assert self.closing is not None
        self.closed, self.open, self.closing = self.closing.round, None, None
        self.feed(Folded())

    @precondition(lambda self: self.evaluating)
    @rule(accuracy=st.none() | st.floats(0, 1))
    def evaluation_ends(self, accuracy: float | None) -> None:
        self.evaluating = False
        self.feed(Evaluated(accuracy))

    @precondition(lambda self: not self.finished)
    @rule(down_s=st.sampled_from([0.0, 30.0, 500.0]))
    def is_killed_and_started_again(self, down_s: float) -> None:
        self.now += down_s
        record = None
        if self.open is not None:
            record = RoundRecord(
                self.open.round,
                self.open.attempt,
                self.open.cohort,
                tuple(self.disk),
                Phase.OPEN if self.closing is None else Phase.FOLDING,
                self.deadline - self.now,
            )
        evaluate_first, self.evaluating = self.evaluating, False
        self.machine = Rounds(self.config, round=self.closed)
        commands = self.machine.start(self.now, record, evaluate_first=evaluate_first)
        if self.closing is not None:
            # That it was enough was decided before: whom the round had stopped waiting for is not remembered.
            assert commands == [self.closing], "a restart folds exactly the same updates"
        else:
            self.carry_out(commands)

    @rule(event=st.sampled_from([Folded(), Evaluated(None), Evaluated(1.0)]))
    def work_that_nobody_asked_for_ends(self, event: Event) -> None:
        if isinstance(event, Folded) and self.closing is not None:
            return
        if isinstance(event, Evaluated) and self.evaluating:
            return
        assert self.machine.handle(event, self.now) == []

    # --- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def sleeps_whenever_it_cannot_act(self) -> None:
        wakeup = self.machine.next_wakeup()
        assert wakeup is None or wakeup > self.now, "a wakeup in the past would keep a processor busy"

    @invariant()
    def an_open_round_always_has_a_wakeup(self) -> None:
        if self.open is not None and self.closing is None:
            assert self.machine.next_wakeup() is not None

    @invariant()
    def agrees_with_the_disk(self) -> None:
        if self.open is not None:
            assert self.machine.round == self.open.round == self.closed + 1
            assert self.machine.delivered == self.disk

    def feed(self, event: Event) -> None:
        self.carry_out(self.machine.handle(event, self.now))

    def takes_updates_of(self, agent: str) -> bool:
        return self.open is not None and self.closing is None and agent in self.open.cohort

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            assert not self.finished, f"{command} after the end"
            match command:
                case OpenRound():
                    self.opens(command)
                case Fold():
                    self.folds(command)
                case Evaluate(number):
                    assert number == self.closed
                    assert self.open is None
                    self.evaluating = True
                case Wait(number):
                    assert number == self.closed
                    assert self.open is None
                case Finish(number):
                    assert number == self.closed == self.config.count
                    self.finished = True

    def opens(self, command: OpenRound) -> None:
        assert self.closing is None
        assert not self.evaluating
        assert list(command.cohort) == sorted(set(command.cohort))
        assert command.round == self.closed + 1, "rounds count up by one"
        if self.open is None:
            assert command.attempt == 1
            self.disk = set()
        else:
            assert command.attempt in (self.open.attempt, self.open.attempt + 1)
            assert set(command.cohort) >= set(self.open.cohort), "nobody's work is lost"
        self.open, self.deadline = command, self.now + command.deadline_s

    def folds(self, command: Fold) -> None:
        assert self.closing is None
        assert self.open is not None
        assert command.round == self.open.round == self.closed + 1, "a round is folded once"
        assert list(command.agents) == sorted(self.disk)
        assert self.disk <= set(self.open.cohort)
        # An extended round is not held up for members that had vanished.
        expected = len(self.open.cohort) - len(self.machine.excused)
        wanted = min(self.config.cohort_size or expected, expected)
        share = round(self.config.quorum * PERCENT)
        assert PERCENT * len(self.disk) >= share * wanted
        assert len(self.disk) >= min(self.config.min_agents, wanted)
        self.closing = command

    # --- whatever has happened: once everybody is there and delivers, the run comes to its end --------------------

    def teardown(self) -> None:
        for agent in AGENTS:
            self.feed(AgentOnline(agent))
        steps: dict[Phase, Callable[[], None]] = {
            Phase.WAITING: self.sleeps_until_the_wakeup,
            Phase.OPEN: self.somebody_delivers,
            Phase.FOLDING: self.averaging_ends,
            Phase.EVALUATING: lambda: self.evaluation_ends(None),
        }
        for _ in range(self.config.count * (len(AGENTS) + 4)):
            if self.machine.phase is not Phase.FINISHED:
                steps[self.machine.phase]()
        assert self.machine.phase is Phase.FINISHED
        assert self.finished

    def somebody_delivers(self) -> None:
        assert self.open is not None
        self.delivers(next(agent for agent in self.open.cohort if agent not in self.disk))


TestServer = Server.TestCase
TestServer.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)


def test_a_round_that_was_enough_without_the_vanished_is_folded_after_a_restart() -> None:
    server = Server()
    server.begin(count=1, least=1, extra=1, everybody=False, over=0.0, quorum=100, gather_s=0.0, grace_s=0.0)
    server.comes_online("a")
    server.goes_offline("a")
    server.comes_online("b")
    server.delivers("a")
    assert server.closing == Fold(1, ("a",))
    server.is_killed_and_started_again(0.0)
    server.teardown()
