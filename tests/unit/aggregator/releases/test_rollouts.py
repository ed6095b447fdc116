"""aggregator.releases.rollouts: when a canary is widened, when it is halted, and what it waits for."""

from itertools import pairwise

import pytest

from aggregator.config import ReleaseConfig
from aggregator.releases.records import ReleaseState
from aggregator.releases.rollout_events import (
    Announce,
    CanaryRecord,
    Command,
    FollowerGone,
    FollowerSeen,
    LinkDown,
    LinkUp,
    Mark,
    Note,
    Released,
    Reported,
    RolledBack,
    Tick,
)
from aggregator.releases.rollouts import HEAR_S, Rollouts
from federation.errors import ReleaseFault
from federation.wire.release import Channel, RolloutState, draw

HOME = "home"
CANARY, STABLE = Channel.CANARY, Channel.STABLE
CONFIRMED, REFUSED, ROLLED_BACK = RolloutState.CONFIRMED, RolloutState.REFUSED, RolloutState.ROLLED_BACK
STEP_S, GIVE_UP_S = 100.0, 1000.0
NUMBER = 7
DEVICES = sorted((f"pi{index}" for index in range(10)), key=lambda name: draw(HOME, name, NUMBER))
"""In the order in which release 7 reaches them."""


def share_of(count: int) -> float:
    """A share that takes so many of them."""
    if count == len(DEVICES):
        return 0.9999
    return draw(HOME, DEVICES[count], NUMBER)


class Machine:
    """A machine with a clock, whose link is up, and the devices that it knows."""

    def __init__(self, count: int = 3, devices: int = 10, **settings: float) -> None:
        values = {"step_s": STEP_S, "give_up_s": GIVE_UP_S, "widen": 100.0, "max_failures": 0.1} | settings
        self.config = ReleaseConfig(**values)  # type: ignore[arg-type]
        self.now = 5000.0
        self.rollouts = Rollouts(HOME, self.config, stable=3)
        self.rollouts.start(self.now, ())
        self.feed(LinkUp())
        for name in DEVICES[:devices]:
            self.feed(FollowerSeen(name, online=True))
        self.begun = self.feed(Released(NUMBER, CANARY, share_of(count), 40))

    def feed(self, event: object) -> list[Command]:
        return self.rollouts.handle(event, self.now)  # type: ignore[arg-type]

    def reports(
        self, state: RolloutState, *devices: str, manifest: int = 40, fault: ReleaseFault | None = None
    ) -> list[Command]:
        commands: list[Command] = []
        for name in devices:
            commands += self.feed(Reported(name, NUMBER, manifest, state, fault))
        return commands

    def passes(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.feed(Tick())

    @property
    def share(self) -> float:
        return self.rollouts.share


def announced(commands: list[Command]) -> list[tuple[Channel, int | None, float]]:
    return [(one.channel, one.number, one.share) for one in commands if isinstance(one, Announce)]


def marked(commands: list[Command]) -> dict[int, ReleaseState]:
    return {one.number: one.state for one in commands if isinstance(one, Mark)}


def notes(commands: list[Command]) -> list[str]:
    return [one.event for one in commands if isinstance(one, Note)]


def test_a_canary_begins_with_its_share() -> None:
    machine = Machine(count=3)
    assert announced(machine.begun) == [(CANARY, NUMBER, share_of(3))]
    assert marked(machine.begun) == {NUMBER: ReleaseState.CANARY}
    assert notes(machine.begun) == ["canary_begun"]
    assert machine.rollouts.in_step() == set(DEVICES[:3])


def test_a_step_lasts_its_time_even_if_all_have_confirmed() -> None:
    machine = Machine()
    assert machine.reports(CONFIRMED, *DEVICES[:3]) == []
    assert machine.rollouts.next_wakeup() == machine.now + STEP_S
    assert announced(machine.passes(STEP_S)) == [(CANARY, NUMBER, 1.0)]
    assert machine.rollouts.in_step() == set(DEVICES)


def test_after_the_last_step_the_release_is_stable() -> None:
    machine = Machine()
    machine.reports(CONFIRMED, *DEVICES[:3])
    machine.passes(STEP_S)
    machine.reports(CONFIRMED, *DEVICES[3:])
    commands = machine.passes(STEP_S)
    assert announced(commands) == [(STABLE, NUMBER, 1.0), (CANARY, None, 0.0)]
    assert marked(commands) == {NUMBER: ReleaseState.STABLE, 3: ReleaseState.RETIRED}
    assert machine.rollouts.stable == NUMBER
    assert machine.rollouts.canary is None
    assert machine.passes(10 * GIVE_UP_S) == []


def test_shares_grow_by_the_factor_up_to_all() -> None:
    machine = Machine(count=1, widen=3.0)
    shares = [machine.share]
    for _ in range(20):
        if machine.rollouts.canary is None:
            break
        machine.reports(CONFIRMED, *machine.rollouts.in_step())
        machine.passes(STEP_S)
        shares.append(machine.share)
    assert machine.rollouts.stable == NUMBER
    grown = shares[:-1]  # none after the end
    assert grown[-1] == 1.0
    assert grown == sorted(grown)
    for before, after in pairwise(grown):
        assert after == min(1.0, 3 * before)


def test_whoever_is_online_is_waited_for_until_it_is_given_up() -> None:
    machine = Machine()
    machine.reports(CONFIRMED, *DEVICES[:2])
    assert machine.passes(STEP_S) == []
    assert machine.passes(STEP_S) == []
    assert announced(machine.passes(GIVE_UP_S)) == [(CANARY, NUMBER, 1.0)]


def test_whoever_is_offline_is_not_waited_for_once_enough_have_confirmed() -> None:
    machine = Machine(min_reports=2)
    machine.feed(FollowerSeen(DEVICES[2], online=False))
    machine.reports(CONFIRMED, DEVICES[0])
    machine.passes(STEP_S)
    assert machine.share < 1, "one of two"
    assert announced(machine.reports(CONFIRMED, DEVICES[1])) == [(CANARY, NUMBER, 1.0)]


def test_a_step_of_devices_that_are_all_offline_waits_until_they_are_given_up() -> None:
    machine = Machine()
    for name in DEVICES:
        machine.feed(FollowerSeen(name, online=False))
    assert machine.passes(GIVE_UP_S - 1) == []
    assert announced(machine.passes(1)) == [(CANARY, NUMBER, 1.0)], "others may say more"
    commands = machine.passes(GIVE_UP_S)
    assert notes(commands) == ["canary_held"], "but nothing becomes stable that no device has confirmed"
    assert machine.passes(GIVE_UP_S) == [], "said once"
    machine.feed(FollowerSeen(DEVICES[5], online=True))
    assert announced(machine.reports(CONFIRMED, DEVICES[5])) == [(STABLE, NUMBER, 1.0), (CANARY, None, 0.0)]


def test_a_step_into_which_no_device_falls_does_not_stall() -> None:
    machine = Machine(count=0)
    assert machine.rollouts.in_step() == set()
    assert machine.passes(STEP_S - 1) == []
    assert announced(machine.passes(1)) == [(CANARY, NUMBER, 1.0)]


def test_where_nobody_runs_models_a_canary_becomes_stable_after_its_steps() -> None:
    machine = Machine(devices=0)
    machine.passes(STEP_S)
    assert announced(machine.passes(STEP_S))[0] == (STABLE, NUMBER, 1.0)


@pytest.mark.parametrize("state", [REFUSED, ROLLED_BACK])
@pytest.mark.parametrize(
    ("in_step", "limit", "allowed"), [(3, 0.0, 0), (3, 0.1, 0), (3, 0.34, 1), (10, 0.1, 1), (10, 0.3, 3)]
)
def test_one_failure_more_than_allowed_halts_at_once(
    state: RolloutState, in_step: int, limit: float, allowed: int
) -> None:
    machine = Machine(count=in_step, max_failures=limit)
    assert machine.reports(state, *DEVICES[:allowed], fault=ReleaseFault.TOO_SLOW) == []
    commands = machine.reports(state, DEVICES[allowed], fault=ReleaseFault.CRASHED)
    assert announced(commands) == [(CANARY, None, 0.0)]
    assert marked(commands) == {NUMBER: ReleaseState.HALTED}
    assert notes(commands) == ["canary_halted"]
    (mark,) = (one for one in commands if isinstance(one, Mark))
    assert f"{allowed + 1} of {in_step}" in mark.reason
    assert "crashed 1" in mark.reason
    assert machine.rollouts.stable == 3
    assert machine.reports(REFUSED, *DEVICES) == [], "it is over"


def test_at_the_end_of_a_step_only_those_who_answered_are_counted() -> None:
    """One of two that answered is half of them, not a tenth."""
    machine = Machine(count=10, max_failures=0.1)
    for name in DEVICES[2:]:
        machine.feed(FollowerSeen(name, online=False))
    machine.reports(REFUSED, DEVICES[0])
    assert machine.reports(CONFIRMED, DEVICES[1]) == []
    assert notes(machine.passes(STEP_S)) == ["canary_halted"]


@pytest.mark.parametrize("state", [RolloutState.TESTING, RolloutState.PROBATION])
def test_a_device_that_vanishes_with_the_release_has_failed(state: RolloutState) -> None:
    machine = Machine()
    machine.reports(CONFIRMED, *DEVICES[:2])
    machine.reports(state, DEVICES[2])
    machine.passes(STEP_S / 2)
    machine.feed(FollowerSeen(DEVICES[2], online=False))
    at = machine.now + GIVE_UP_S
    while machine.rollouts.canary is not None and machine.now < at - 1:
        wakeup = machine.rollouts.next_wakeup()
        assert wakeup is not None
        machine.now = wakeup
        assert machine.share < 1, "it is waited for"
        commands = machine.feed(Tick())
    assert machine.now == at
    assert notes(commands) == ["canary_halted"]
    assert any(isinstance(one, Mark) and "lost 1" in one.reason for one in commands)


def test_one_that_is_back_in_time_has_not_vanished() -> None:
    machine = Machine(max_failures=0.0)
    machine.reports(RolloutState.PROBATION, DEVICES[0])
    machine.feed(FollowerSeen(DEVICES[0], online=False))
    machine.passes(GIVE_UP_S - 1)
    machine.feed(FollowerSeen(DEVICES[0], online=True))
    machine.passes(2 * GIVE_UP_S)
    assert machine.rollouts.canary == NUMBER


def test_one_that_never_began_is_only_not_waited_for() -> None:
    machine = Machine(max_failures=0.0)
    machine.reports(CONFIRMED, *DEVICES[:2])
    machine.reports(RolloutState.FETCHING, DEVICES[2])
    machine.feed(FollowerSeen(DEVICES[2], online=False))
    assert announced(machine.passes(2 * GIVE_UP_S)) == [(CANARY, NUMBER, 1.0)]


def test_a_device_that_mends_itself_counts_as_it_is_now() -> None:
    machine = Machine(count=10, max_failures=0.1)
    machine.reports(REFUSED, DEVICES[0], fault=ReleaseFault.NO_SPACE)
    machine.reports(CONFIRMED, *DEVICES)
    assert machine.rollouts.tally(machine.now).failed == 0


def test_a_device_that_takes_canaries_by_choice_counts_wherever_it_stands() -> None:
    machine = Machine(count=1)
    commands = machine.reports(ROLLED_BACK, DEVICES[9])
    assert notes(commands) == ["canary_halted"]


@pytest.mark.parametrize(("number", "manifest"), [(6, 40), (NUMBER, 39)])
def test_reports_about_another_release_or_an_earlier_attempt_do_not_count(number: int, manifest: int) -> None:
    machine = Machine()
    assert machine.feed(Reported(DEVICES[0], number, manifest, ROLLED_BACK)) == []
    assert machine.rollouts.tally(machine.now).failed == 0


def test_a_device_that_is_revoked_is_neither_counted_nor_waited_for() -> None:
    machine = Machine(count=2)
    machine.reports(CONFIRMED, DEVICES[0])
    machine.passes(STEP_S)
    assert announced(machine.feed(FollowerGone(DEVICES[1]))) == [(CANARY, NUMBER, 1.0)]


def test_nothing_is_widened_without_a_link_nor_before_what_was_kept_is_heard() -> None:
    machine = Machine()
    machine.reports(CONFIRMED, *DEVICES[:3])
    machine.feed(LinkDown())
    assert machine.passes(10 * GIVE_UP_S) == []
    assert machine.rollouts.next_wakeup() is None
    assert machine.feed(LinkUp()) == []
    for name in DEVICES:
        machine.feed(FollowerSeen(name, online=True))
    assert machine.passes(HEAR_S - 1) == []
    assert notes(machine.reports(ROLLED_BACK, DEVICES[0])) == ["canary_halted"]


def test_silence_while_the_link_is_down_is_no_loss() -> None:
    machine = Machine(max_failures=0.0)
    machine.reports(RolloutState.PROBATION, *DEVICES[:3])
    machine.feed(LinkDown())
    machine.passes(10 * GIVE_UP_S)
    machine.feed(LinkUp())
    machine.passes(HEAR_S)
    assert machine.rollouts.canary == NUMBER


def test_a_restart_goes_on_with_the_step_but_hears_first() -> None:
    machine = Machine()
    again = Rollouts(HOME, machine.config, stable=3)
    reports = [Reported(name, NUMBER, 41, CONFIRMED) for name in DEVICES[:3]]
    now = 9.0
    record = CanaryRecord(NUMBER, share_of(3), 40, elapsed_s=1e9)
    assert again.start(now, DEVICES, record, reports) == []
    assert again.handle(LinkUp(), now) == []
    assert again.handle(Tick(), now + HEAR_S - 1) == []
    assert announced(again.handle(Tick(), now + HEAR_S)) == [(CANARY, NUMBER, 1.0)]


def test_a_restart_after_a_long_absence_gives_nobody_up_at_once() -> None:
    machine = Machine()
    again = Rollouts(HOME, machine.config, stable=3)
    again.start(0.0, DEVICES, CanaryRecord(NUMBER, share_of(3), 40, elapsed_s=1e9))
    again.handle(LinkUp(), 0.0)
    assert again.handle(Tick(), GIVE_UP_S - STEP_S - 1) == []


@pytest.mark.parametrize("elapsed_s", [-1e9, 0.0])
def test_a_clock_that_was_set_back_only_lengthens_a_step(elapsed_s: float) -> None:
    machine = Machine()
    again = Rollouts(HOME, machine.config, stable=3)
    reports = [Reported(name, NUMBER, 41, CONFIRMED) for name in DEVICES[:3]]
    again.start(0.0, DEVICES, CanaryRecord(NUMBER, share_of(3), 40, elapsed_s), reports)
    again.handle(LinkUp(), 0.0)
    assert again.next_wakeup() == STEP_S
    assert again.handle(Tick(), STEP_S - 1) == []
    assert announced(again.handle(Tick(), STEP_S)) == [(CANARY, NUMBER, 1.0)]


def test_a_failure_on_disk_is_acted_upon_at_the_start() -> None:
    machine = Machine()
    again = Rollouts(HOME, machine.config, stable=3)
    record = CanaryRecord(NUMBER, share_of(3), 40, elapsed_s=0.0)
    commands = again.start(0.0, DEVICES, record, [Reported(DEVICES[0], NUMBER, 41, ROLLED_BACK)])
    assert notes(commands) == ["canary_halted"]


# --- operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channel", "share"), [(STABLE, 1.0), (CANARY, 1.0)])
def test_a_release_to_all_at_once_ends_a_canary(channel: Channel, share: float) -> None:
    machine = Machine()
    commands = machine.feed(Released(8, channel, share, 50))
    assert announced(commands) == [(STABLE, 8, 1.0), (CANARY, None, 0.0)]
    retired = ReleaseState.RETIRED
    assert marked(commands) == {8: ReleaseState.STABLE, NUMBER: retired, 3: retired}


def test_a_canary_may_be_released_to_all_before_its_time() -> None:
    machine = Machine()
    commands = machine.feed(Released(NUMBER, STABLE, 1.0, 50))
    assert announced(commands) == [(STABLE, NUMBER, 1.0), (CANARY, None, 0.0)]
    assert marked(commands) == {NUMBER: ReleaseState.STABLE, 3: ReleaseState.RETIRED}


def test_another_canary_takes_the_place_of_the_one_that_is_under_way() -> None:
    machine = Machine()
    machine.reports(CONFIRMED, *DEVICES)
    commands = machine.feed(Released(8, CANARY, 0.5, 50))
    assert announced(commands) == [(CANARY, 8, 0.5)]
    assert marked(commands) == {NUMBER: ReleaseState.RETIRED, 8: ReleaseState.CANARY}
    assert machine.rollouts.tally(machine.now).confirmed == 0


@pytest.mark.parametrize(("asked", "becomes"), [(0.9, 0.9), (0.01, share_of(3))])
def test_the_same_canary_again_may_widen_it_but_takes_it_from_nobody(asked: float, becomes: float) -> None:
    machine = Machine()
    machine.reports(CONFIRMED, *DEVICES[:3])
    commands = machine.feed(Released(NUMBER, CANARY, asked, 50))
    assert announced(commands) == [(CANARY, NUMBER, becomes)]
    assert machine.rollouts.tally(machine.now).confirmed == 3, "what they have said still counts"
    assert machine.rollouts.next_wakeup() == machine.now + STEP_S


def test_taking_a_canary_back_leaves_the_stable_release() -> None:
    machine = Machine()
    commands = machine.feed(RolledBack(None))
    assert announced(commands) == [(CANARY, None, 0.0)]
    assert marked(commands) == {NUMBER: ReleaseState.WITHDRAWN}


def test_going_back_to_a_release_takes_the_stable_one_and_the_canary_back() -> None:
    machine = Machine()
    commands = machine.feed(RolledBack(2))
    assert announced(commands) == [(CANARY, None, 0.0), (STABLE, 2, 1.0)]
    withdrawn = ReleaseState.WITHDRAWN
    assert marked(commands) == {NUMBER: withdrawn, 3: withdrawn, 2: ReleaseState.STABLE}
    assert machine.rollouts.stable == 2


def test_going_back_to_the_stable_release_only_takes_the_canary_back() -> None:
    assert announced(Machine().feed(RolledBack(3))) == [(CANARY, None, 0.0)]


def test_without_a_canary_nothing_needs_time() -> None:
    machine = Machine()
    machine.feed(RolledBack(None))
    assert machine.rollouts.next_wakeup() is None
    assert machine.rollouts.in_step() == set()
