"""The run's state table, by its events: no clock, no network."""

import pytest

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
    Masked,
    OpenRound,
    Phase,
    RoundRecord,
    Rounds,
    Skip,
    SumFailed,
    Tick,
    Unmask,
    Unmasked,
    UpdateStored,
    Wait,
)
from federation.wire.fields import MAX_COHORT


def rounds(**settings: float) -> Rounds:
    defaults: dict[str, float] = {
        "count": 3,
        "min_agents": 2,
        "gather_s": 0,
        "deadline_s": 100,
        "grace_s": 10,
    }
    return Rounds(RoundsConfig(**(defaults | settings)))  # type: ignore[arg-type]


def feed(machine: Rounds, *events: Event, now: float = 0.0) -> list[Command]:
    return [command for event in events for command in machine.handle(event, now)]


def online(*names: str) -> list[AgentOnline]:
    return [AgentOnline(name) for name in names]


def stored(*names: str) -> list[UpdateStored]:
    return [UpdateStored(name) for name in names]


def opened(*names: str, **settings: float) -> Rounds:
    machine = rounds(min_agents=len(names), **settings)
    machine.start(0.0)
    commands = feed(machine, *online(*names))
    assert commands == [OpenRound(1, 1, names, machine.config.deadline_s)]
    return machine


def test_waits_until_enough_agents_are_online_and_says_how_many_are_missing() -> None:
    machine = rounds(min_agents=2)
    assert machine.start(0.0) == [Wait(0, 2)]
    assert feed(machine, *online("a")) == []
    assert feed(machine, *online("b")) == [OpenRound(1, 1, ("a", "b"), 100)]


def test_gathers_more_agents_for_a_while_once_the_least_are_there() -> None:
    machine = rounds(gather_s=5)
    machine.start(0.0)
    assert feed(machine, *online("a", "b"), now=1.0) == []
    assert machine.next_wakeup() == 6.0
    assert feed(machine, *online("c"), now=3.0) == []
    assert feed(machine, Tick(), now=6.0) == [OpenRound(1, 1, ("a", "b", "c"), 100)]


def test_a_full_cohort_does_not_wait_for_more() -> None:
    machine = rounds(gather_s=60, cohort_size=2)
    machine.start(0.0)
    assert feed(machine, *online("a", "b")) == [OpenRound(1, 1, ("a", "b"), 100)]


def test_agents_that_leave_while_gathering_start_the_wait_anew() -> None:
    machine = rounds(gather_s=5)
    machine.start(0.0)
    feed(machine, *online("a", "b"))
    feed(machine, AgentOffline("b"), now=1.0)
    assert machine.next_wakeup() is None
    assert feed(machine, *online("b"), now=20.0) == []
    assert machine.next_wakeup() == 25.0


def test_a_round_closes_when_all_have_delivered_and_folds_in_the_order_of_names() -> None:
    machine = opened("a", "b", "c")
    assert feed(machine, *stored("c", "a")) == []
    assert feed(machine, *stored("b")) == [Fold(1, ("a", "b", "c"))]
    assert feed(machine, Folded()) == [Evaluate(1)]
    assert feed(machine, Evaluated(0.5)) == [OpenRound(2, 1, ("a", "b", "c"), 100)]


def test_over_selection_closes_with_the_cohort_size() -> None:
    machine = rounds(min_agents=2, cohort_size=2, over_selection=0.5, gather_s=60)
    machine.start(0.0)
    assert feed(machine, *online("a", "b", "c")) == [OpenRound(1, 1, ("a", "b", "c"), 100)]
    assert feed(machine, *stored("a", "c")) == [Fold(1, ("a", "c"))]
    assert feed(machine, *stored("b")) == [], "a surplus update after the close changes nothing"


def test_a_vanished_agent_is_waited_for_only_during_its_grace() -> None:
    machine = opened("a", "b", "c", quorum=0.5)
    machine.config = RoundsConfig(count=3, min_agents=2, gather_s=0, deadline_s=100, grace_s=10)
    feed(machine, *stored("a", "b"))
    assert feed(machine, AgentOffline("c"), now=5.0) == []
    assert machine.next_wakeup() == 15.0
    assert feed(machine, Tick(), now=14.9) == []
    assert feed(machine, Tick(), now=15.0) == [Fold(1, ("a", "b"))]


def test_a_grace_that_is_over_is_no_reason_to_wake_up_again() -> None:
    machine = opened("a", "b", "c")
    feed(machine, *stored("a"))
    feed(machine, AgentOffline("c"), now=5.0)
    assert feed(machine, Tick(), now=15.0) == [], "b is still at work"
    assert machine.next_wakeup() == 100.0


def test_no_round_invites_more_agents_than_a_plan_can_name() -> None:
    names = [f"pi{number:05d}" for number in range(MAX_COHORT + 5)]
    machine = rounds(gather_s=5)
    machine.start(0.0)
    feed(machine, *online(*names[:-1]))
    (command,) = feed(machine, Tick(), now=5.0)
    assert isinstance(command, OpenRound)
    assert len(command.cohort) == MAX_COHORT
    feed(machine, *online(names[-1]), now=6.0)
    (extended,) = feed(machine, Tick(), now=105.0)
    assert isinstance(extended, OpenRound)
    assert extended.cohort == command.cohort


def test_an_agent_that_comes_back_within_its_grace_is_waited_for_again() -> None:
    machine = opened("a", "b")
    feed(machine, *stored("a"))
    feed(machine, AgentOffline("b"), now=5.0)
    feed(machine, AgentOnline("b"), now=6.0)
    assert feed(machine, Tick(), now=50.0) == []
    assert feed(machine, *stored("b"), now=51.0) == [Fold(1, ("a", "b"))]


def test_the_deadline_closes_a_round_that_has_its_quorum() -> None:
    machine = opened("a", "b", "c")
    machine.config = RoundsConfig(count=3, min_agents=2, quorum=0.6, gather_s=0, deadline_s=100, grace_s=10)
    feed(machine, *stored("a", "b"))
    assert feed(machine, Tick(), now=99.9) == []
    assert feed(machine, Tick(), now=100.0) == [Fold(1, ("a", "b"))]


def test_without_a_quorum_the_round_is_extended_and_keeps_what_it_has() -> None:
    machine = opened("a", "b")
    feed(machine, *stored("a"))
    feed(machine, AgentOnline("z"), now=50.0)
    assert feed(machine, Tick(), now=100.0) == [OpenRound(1, 2, ("a", "b", "z"), 100)]
    assert feed(machine, *stored("z"), now=120.0) == []
    assert feed(machine, *stored("b"), now=121.0) == [Fold(1, ("a", "b", "z"))]


def test_replacements_are_invited_at_once_when_nobody_is_left_to_wait_for() -> None:
    machine = opened("a", "b")
    feed(machine, *stored("a"))
    feed(machine, AgentOut("b"), now=1.0)
    assert machine.phase is Phase.OPEN
    assert feed(machine, AgentOnline("z"), now=2.0) == [OpenRound(1, 2, ("a", "b", "z"), 100)]


def test_an_extended_round_is_not_held_up_again_by_those_that_had_vanished() -> None:
    machine = opened("a", "b", "c", "d", "e", quorum=0.8)
    machine.config = RoundsConfig(count=3, min_agents=2, quorum=0.8, gather_s=0, deadline_s=100, grace_s=10)
    feed(machine, *stored("a"))
    feed(machine, AgentOffline("c"), AgentOffline("d"), AgentOffline("e"), now=5.0)
    assert feed(machine, Tick(), now=100.0) == [OpenRound(1, 2, ("a", "b", "c", "d", "e"), 100)]
    assert feed(machine, *stored("b"), now=101.0) == [Fold(1, ("a", "b"))]


def test_one_that_had_vanished_counts_again_when_it_comes_back() -> None:
    machine = opened("a", "b", "c", quorum=1.0)
    machine.config = RoundsConfig(count=3, min_agents=2, quorum=1.0, gather_s=0, deadline_s=100, grace_s=10)
    feed(machine, *stored("a"))
    feed(machine, AgentOffline("c"), now=5.0)
    feed(machine, Tick(), now=100.0)
    feed(machine, AgentOnline("c"), now=101.0)
    assert feed(machine, *stored("b"), now=102.0) == []
    assert feed(machine, *stored("c"), now=103.0) == [Fold(1, ("a", "b", "c"))]


def test_a_round_stays_open_when_too_few_are_left_to_close_it_with() -> None:
    machine = opened("a", "b", "c")
    feed(machine, *stored("a"))
    feed(machine, AgentOffline("b"), AgentOffline("c"), now=5.0)
    assert feed(machine, Tick(), now=100.0) == [OpenRound(1, 2, ("a", "b", "c"), 100)]
    assert machine.phase is Phase.OPEN
    assert machine.wanted == 3


def test_an_extension_replaces_the_vanished_and_invites_no_more_than_the_cohort_size() -> None:
    machine = rounds(min_agents=2, cohort_size=2, gather_s=60)
    machine.start(0.0)
    (first,) = feed(machine, *online("a", "b"))
    assert isinstance(first, OpenRound)
    feed(machine, *online("w", "x", "y", "z"), now=1.0)
    feed(machine, AgentOffline("b"), now=2.0)
    (again,) = feed(machine, Tick(), now=100.0)
    assert isinstance(again, OpenRound)
    assert len(again.cohort) == 3
    assert {"a", "b"} < set(again.cohort)
    assert machine.wanted == 2


def test_a_decline_is_not_waited_for() -> None:
    machine = opened("a", "b", "c")
    machine.config = RoundsConfig(count=3, min_agents=2, gather_s=0, deadline_s=100)
    feed(machine, *stored("a", "b"))
    assert feed(machine, AgentOut("c")) == [Fold(1, ("a", "b"))]


def test_an_update_from_outside_the_cohort_is_not_counted() -> None:
    machine = opened("a", "b")
    feed(machine, AgentOnline("z"))
    assert feed(machine, *stored("z")) == []
    assert machine.delivered == set()


def test_the_run_ends_after_its_rounds() -> None:
    machine = opened("a", "b", count=1)
    feed(machine, *stored("a", "b"), Folded())
    assert feed(machine, Evaluated(None)) == [Finish(1, "all 1 rounds done")]
    assert machine.phase is Phase.FINISHED
    assert feed(machine, *online("c"), Tick(), now=1e6) == []


def test_the_run_ends_at_its_target_accuracy() -> None:
    machine = opened("a", "b", target_accuracy=0.9)
    feed(machine, *stored("a", "b"), Folded())
    (finish,) = feed(machine, Evaluated(0.93))
    assert finish == Finish(1, "reached the target accuracy: 93.00% of 90.00%")


def test_the_run_ends_on_a_plateau() -> None:
    machine = opened("a", "b", count=100, patience=2)
    accuracies = [0.5, 0.7, 0.7, 0.6]
    for accuracy in accuracies[:-1]:
        commands = feed(machine, *stored("a", "b"), Folded(), Evaluated(accuracy))
        assert isinstance(commands[-1], OpenRound)
    commands = feed(machine, *stored("a", "b"), Folded(), Evaluated(accuracies[-1]))
    assert commands[-1] == Finish(4, "no better accuracy than 70.00% in 2 rounds")


@pytest.mark.parametrize("remaining", [30.0, -5.0])
def test_a_restart_goes_on_with_the_same_round(remaining: float) -> None:
    machine = rounds()
    record = RoundRecord(2, 1, ("a", "b", "c"), ("a",), phase=Phase.OPEN, remaining_s=remaining)
    commands = machine.start(1000.0, record)
    grace = 10.0
    assert commands == [OpenRound(2, 1, ("a", "b", "c"), max(grace, remaining))], "time to deliver is left"
    commands = feed(machine, *online("b", "c"), *stored("b", "c"), now=1001.0)
    assert commands[-1] == Fold(2, ("a", "b", "c"))


def test_a_restart_during_folding_folds_exactly_what_was_closed() -> None:
    machine = rounds()
    record = RoundRecord(2, 1, ("a", "b", "c"), ("c", "a"), phase=Phase.FOLDING, remaining_s=50)
    assert machine.start(0.0, record) == [Fold(2, ("a", "c"))]
    assert feed(machine, *stored("b")) == []


def test_a_restart_with_everything_delivered_folds_at_once() -> None:
    machine = rounds()
    record = RoundRecord(2, 1, ("a", "b"), ("a", "b"), phase=Phase.OPEN, remaining_s=50)
    assert machine.start(0.0, record)[-1] == Fold(2, ("a", "b"))


def test_a_restart_gives_silent_members_their_grace() -> None:
    machine = rounds()
    machine.start(0.0, RoundRecord(1, 1, ("a", "b", "c"), ("a", "b"), phase=Phase.OPEN, remaining_s=100))
    assert feed(machine, Tick(), now=9.9) == []
    assert feed(machine, Tick(), now=10.0) == [Fold(1, ("a", "b"))]


def test_an_unevaluated_round_is_evaluated_before_the_next() -> None:
    machine = rounds(target_accuracy=0.9)
    machine.round = 2
    assert machine.start(0.0, evaluate_first=True) == [Evaluate(2)]
    assert feed(machine, Evaluated(0.95))[-1] == Finish(2, "reached the target accuracy: 95.00% of 90.00%")


def test_a_finished_run_goes_on_when_more_rounds_are_asked_for() -> None:
    machine = rounds(count=5)
    machine.round = 3
    assert machine.start(0.0) == [Wait(3, 2)]
    assert feed(machine, *online("a", "b")) == [OpenRound(4, 1, ("a", "b"), 100)]


# --- masked sums --------------------------------------------------------------------------------------------------


def masked_round(**settings: float) -> Rounds:
    config = RoundsConfig(min_agents=3, deadline_s=100, grace_s=10, gather_s=0, quorum=0.5, **settings)  # type: ignore[arg-type]
    machine = Rounds(config, masked=Masked(min_agents=3, dropouts=0.25))
    machine.start(0.0)
    for agent in "abc":
        machine.handle(AgentOnline(agent), 0.0)
    assert machine.phase is Phase.OPEN
    return machine


def test_a_masked_round_is_unmasked_before_it_is_folded() -> None:
    machine = masked_round()
    for agent in "ab":
        assert machine.handle(UpdateStored(agent), 1.0) == []
    assert machine.handle(UpdateStored("c"), 1.0) == [Unmask(1, ("a", "b", "c"))]
    assert machine.handle(UpdateStored("d"), 1.0) == []
    assert machine.next_wakeup() is None
    assert machine.handle(Unmasked(), 2.0) == [Fold(1, ("a", "b", "c"))]
    assert machine.handle(Unmasked(), 2.0) == []


def test_a_masked_round_is_not_closed_with_fewer_than_may_be_summed() -> None:
    machine = masked_round()
    for agent in "ab":
        machine.handle(UpdateStored(agent), 1.0)
    machine.handle(AgentOut("c"), 1.0)
    (again,) = machine.handle(Tick(), 100.0)
    assert again == OpenRound(1, 2, ("a", "b", "c"), 100)
    assert machine.delivered == set(), "what was masked in the first attempt is of no use in the second"


def test_too_few_shares_give_the_silent_ones_a_grace_before_all_begin_anew() -> None:
    machine = masked_round()
    assert machine.handle(SumFailed(asked=False), 5.0) == []
    assert machine.next_wakeup() == 15.0
    assert machine.handle(Tick(), 15.0) == [OpenRound(1, 2, ("a", "b", "c"), 100)]


def test_too_few_agreements_open_the_next_attempt_without_the_vanished() -> None:
    machine = masked_round()
    machine.handle(AgentOnline("d"), 0.5)
    for agent in "abc":
        machine.handle(UpdateStored(agent), 1.0)
    machine.handle(AgentOffline("b"), 1.0)
    (again,) = machine.handle(SumFailed(asked=False), 20.0)
    assert again == OpenRound(1, 2, ("a", "c", "d"), 100)
    assert machine.phase is Phase.OPEN


def test_a_sum_that_devices_were_asked_to_open_is_not_tried_again() -> None:
    machine = masked_round()
    for agent in "abc":
        machine.handle(UpdateStored(agent), 1.0)
    assert machine.handle(SumFailed(asked=True), 20.0) == [Skip(1)]
    assert machine.handle(Folded(), 21.0) == [Evaluate(1)]


def test_a_restart_asks_for_exactly_the_sum_that_was_wanted() -> None:
    machine = Rounds(RoundsConfig(min_agents=3), masked=Masked(min_agents=3, dropouts=0.25))
    record = RoundRecord(2, 3, ("a", "b", "c", "d"), ("a", "b", "c"), phase=Phase.UNMASKING, remaining_s=50)
    opened, unmask = machine.start(0.0, record)
    assert isinstance(opened, OpenRound)
    assert (opened.attempt, unmask) == (3, Unmask(2, ("a", "b", "c")))
