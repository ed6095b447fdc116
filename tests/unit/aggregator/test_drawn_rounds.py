"""Rounds whose cohort is a secret draw, and runs that a privacy budget ends."""

from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aggregator.cohort import draw_secretly
from aggregator.config import RoundsConfig
from aggregator.rounds import (
    AgentOffline,
    AgentOnline,
    AgentOut,
    Budget,
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
from federation.errors import ConfigError

NAMES = ("a", "b", "c", "d")


class Drawing:
    """Draws what it is told, and remembers from whom."""

    def __init__(self, *cohorts: Sequence[str]) -> None:
        self._cohorts = list(cohorts)
        self.asked: list[set[str]] = []

    def __call__(self, online: Collection[str]) -> tuple[str, ...]:
        self.asked.append(set(online))
        return tuple(self._cohorts.pop(0))


def machine(
    *cohorts: Sequence[str], budget: Budget | None = None, **settings: float
) -> tuple[Rounds, Drawing]:
    defaults: dict[str, float] = {
        "count": 9,
        "min_agents": 4,
        "gather_s": 0,
        "deadline_s": 100,
        "grace_s": 10,
    }
    drawing = Drawing(*cohorts)
    config = RoundsConfig(**(defaults | settings))  # type: ignore[arg-type]
    return Rounds(config, draw=drawing if cohorts else None, budget=budget), drawing


def feed(rounds: Rounds, *events: Event, now: float = 0.0) -> list[Command]:
    return [command for event in events for command in rounds.handle(event, now)]


def begun(*cohorts: Sequence[str], **settings: float) -> tuple[Rounds, list[Command]]:
    rounds, _ = machine(*cohorts, budget=None, **settings)
    rounds.start(0.0)
    return rounds, feed(rounds, *map(AgentOnline, NAMES))


def test_the_draw_is_of_all_who_are_online_once_enough_are() -> None:
    rounds, drawing = machine(("b", "d"))
    assert rounds.start(0.0) == [Wait(0, 4)]
    assert feed(rounds, *map(AgentOnline, NAMES)) == [OpenRound(1, 1, ("b", "d"), 100)]
    assert drawing.asked == [set(NAMES)]


def test_a_drawn_cohort_may_be_smaller_than_the_least_that_must_be_online() -> None:
    rounds, _ = begun(("b",))
    assert feed(rounds, UpdateStored("b")) == [Fold(1, ("b",))]


def test_an_empty_draw_is_folded_at_once() -> None:
    rounds, commands = begun((), ("a",))
    assert commands == [OpenRound(1, 1, (), 100), Fold(1, ())]
    assert feed(rounds, Folded()) == [Evaluate(1)]
    assert feed(rounds, Evaluated(None)) == [OpenRound(2, 1, ("a",), 100)]


@pytest.mark.parametrize("phase", [Phase.OPEN, Phase.FOLDING])
def test_an_empty_draw_is_folded_after_a_restart(phase: Phase) -> None:
    rounds, drawing = machine(("a",))
    commands = rounds.start(0.0, RoundRecord(3, 1, (), (), phase, 50.0))
    assert commands[-1] == Fold(3, ())
    assert drawing.asked == []


def test_a_restart_keeps_the_draw() -> None:
    rounds, drawing = machine(("a",))
    record = RoundRecord(3, 1, ("b", "d"), ("b",), Phase.OPEN, 50.0)
    assert rounds.start(0.0, record) == [OpenRound(3, 1, ("b", "d"), 50.0)]
    feed(rounds, *map(AgentOnline, NAMES))
    assert feed(rounds, UpdateStored("d")) == [Fold(3, ("b", "d"))]
    assert drawing.asked == []


def test_nobody_replaces_a_member_that_was_drawn() -> None:
    """A second draw among the others would not be the Poisson draw that is accounted for."""
    rounds, _ = begun(("b", "d"), quorum=1.0)
    feed(rounds, AgentOffline("d"), UpdateStored("b"))
    assert feed(rounds, Tick(), now=50.0) == [], "others are online, but they were not drawn"
    assert feed(rounds, Tick(), now=100.0) == [OpenRound(1, 2, ("b", "d"), 100)]


@pytest.mark.parametrize("come", [(), ("b",)])
def test_after_the_second_deadline_it_is_closed_with_what_has_come(come: tuple[str, ...]) -> None:
    rounds, _ = begun(("b", "d"), quorum=1.0)
    assert feed(rounds, *map(UpdateStored, come)) == []
    assert feed(rounds, Tick(), now=100.0) == [OpenRound(1, 2, ("b", "d"), 100)]
    assert feed(rounds, Tick(), now=150.0) == []
    assert feed(rounds, Tick(), now=200.0) == [Fold(1, come)]


def test_one_that_is_out_is_asked_once_more() -> None:
    rounds, _ = begun(("b",))
    assert feed(rounds, AgentOut("b")) == []
    assert feed(rounds, Tick(), now=100.0) == [OpenRound(1, 2, ("b",), 100)]
    assert feed(rounds, UpdateStored("b"), now=101.0) == [Fold(1, ("b",))]


def test_a_quorum_of_the_drawn_closes_at_the_deadline() -> None:
    rounds, _ = begun(("a", "b", "d"), quorum=0.5)
    feed(rounds, UpdateStored("a"), UpdateStored("b"))
    assert feed(rounds, Tick(), now=100.0) == [Fold(1, ("a", "b"))]


def test_the_budget_ends_the_run_with_its_reason() -> None:
    rounds, _ = machine(budget=Budget(1, "epsilon is spent"))
    rounds.start(0.0)
    feed(rounds, *map(AgentOnline, NAMES), *map(UpdateStored, NAMES), Folded())
    assert feed(rounds, Evaluated(None)) == [Finish(1, "epsilon is spent")]
    assert rounds.phase is Phase.FINISHED


def test_a_budget_for_no_round_opens_none_and_one_for_more_than_are_wanted_changes_nothing() -> None:
    none, _ = machine(budget=Budget(0, "epsilon is spent"))
    assert none.start(0.0) == [Finish(0, "epsilon is spent")]
    ample, _ = machine(budget=Budget(99, "epsilon is spent"), count=1)
    ample.round = 1
    assert ample.start(0.0) == [Finish(1, "all 1 rounds done")]


names = st.sampled_from(NAMES)
weather = st.lists(
    st.tuples(
        st.one_of(
            st.builds(AgentOnline, names),
            st.builds(AgentOffline, names),
            st.builds(UpdateStored, names),
            st.builds(AgentOut, names),
            st.just(Tick()),
            st.just(Folded()),
            st.just(Evaluated(None)),
        ),
        st.sampled_from([0.0, 5.0, 60.0]),
    ),
    max_size=60,
)


@given(cohorts=st.lists(st.sets(names).map(lambda drawn: tuple(sorted(drawn))), max_size=4), events=weather)
def test_whatever_happens_a_cohort_stays_as_it_was_drawn_and_folds_those_of_it_that_have_delivered(
    cohorts: list[tuple[str, ...]], events: list[tuple[Event, float]]
) -> None:
    rounds, _ = machine(*cohorts, (), quorum=0.7, count=len(cohorts) + 1, min_agents=1)
    commands, now, delivered = rounds.start(0.0), 0.0, dict[int, set[str]]()
    for event, seconds in events:
        now += seconds
        if isinstance(event, UpdateStored) and rounds.phase is Phase.OPEN and event.agent in rounds.cohort:
            delivered.setdefault(rounds.round, set()).add(event.agent)
        commands += rounds.handle(event, now)
    opened = [command for command in commands if isinstance(command, OpenRound)]
    assert all(command.attempt <= 2 for command in opened)
    assert all(command.cohort == [*cohorts, ()][command.round - 1] for command in opened)
    folded = [command for command in commands if isinstance(command, Fold)]
    assert len({command.round for command in folded}) == len(folded)
    assert all(set(command.agents) == delivered.get(command.round, set()) for command in folded)


def test_each_agent_is_drawn_independently_with_the_rate() -> None:
    """Sizes of 2,000 draws of 20 agents at 0.3, and how often each agent is drawn, are binomial."""
    names = [f"pi{number:02}" for number in range(20)]
    draws = [draw_secretly(names, 0.3) for _ in range(2000)]
    assert all(list(draw) == sorted(draw) for draw in draws)
    for name in names:
        assert stats.binomtest(sum(name in draw for draw in draws), 2000, 0.3).pvalue > 1e-8
    variance = sum((len(draw) - 6) ** 2 for draw in draws) / 2000
    assert variance == pytest.approx(20 * 0.3 * 0.7, rel=6 * (2 / 2000) ** 0.5)


def test_a_rate_of_one_takes_all_and_nobody_is_drawn_from_nobody() -> None:
    assert draw_secretly(NAMES[::-1], 1.0) == NAMES
    assert draw_secretly((), 0.5) == ()


def test_a_draw_that_a_plan_may_not_hold_is_refused() -> None:
    names = [str(number) for number in range(9000)]
    with pytest.raises(
        ConfigError, match=r"sampling_rate is 0\.45: of 9000 agents it may draw more than the 4096"
    ):
        draw_secretly(names, 0.45)
    assert len(draw_secretly(names, 0.4)) < 4096
