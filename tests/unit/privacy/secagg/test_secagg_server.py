"""privacy.secagg.server: exact sums with a third of the cohort gone at any phase, refusals, deadlines, and replay after a crash."""

from dataclasses import replace

import numpy as np
import pytest
from masking_cohort import CONTEXT, PHASE_S, Cohort, names_of, without

from privacy.secagg.agreement import PublicKeys, Terms
from privacy.secagg.client_messages import Tick as DeviceTick
from privacy.secagg.errors import RefusedError
from privacy.secagg.sealing import SEALED_BYTES
from privacy.secagg.server import Server
from privacy.secagg.server_messages import (
    Abort,
    AgentGone,
    AgreementArrived,
    CloseMasking,
    KeysArrived,
    MaskedStored,
    RevealArrived,
    SendAgreements,
    SendRoster,
    SendShares,
    SendSurvivors,
    ServerEvent,
    ServerPhase,
    SharesArrived,
    Tick,
)
from privacy.secagg.shamir import PRIME

TERMS = Terms(3, 1 / 3)
ONE = "agent-0001"
DROP_PHASES = [
    ServerPhase.KEYS,
    ServerPhase.SHARES,
    ServerPhase.MASKED,
    ServerPhase.AGREEMENTS,
    ServerPhase.REVEALS,
]


def cohort_before(phase: ServerPhase, count: int = 6) -> Cohort:
    cohort = Cohort(names_of(count), TERMS)
    cohort.reach(phase)
    return cohort


def finish(cohort: Cohort) -> None:
    """In good weather from here on; whoever is silent runs into the deadlines."""
    cohort.run()
    for _ in ServerPhase:
        if cohort.plan is None and cohort.aborted is None:
            cohort.time_out()
            cohort.run()


def sums_up(cohort: Cohort, survivors: tuple[str, ...]) -> bool:
    return (
        cohort.plan is not None
        and cohort.plan.survivors == survivors
        and np.array_equal(cohort.total, cohort.plain_sum(survivors))
    )


# --- sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("count", [3, 4, 9, 30])
def test_the_sum_is_exact(count: int, bits: int) -> None:
    cohort = Cohort(names_of(count), TERMS, bits=bits)
    cohort.run()
    assert sums_up(cohort, cohort.names)
    assert not cohort.refused
    assert not cohort.client_aborts


@pytest.mark.parametrize("told", [True, False], ids=["last will", "silence"])
@pytest.mark.parametrize("phase", DROP_PHASES)
@pytest.mark.parametrize("count", [3, 6, 10, 24])
def test_a_third_may_vanish_at_any_phase(count: int, phase: ServerPhase, told: bool) -> None:
    cohort = Cohort(names_of(count), TERMS if count > 3 else Terms(2, 1 / 3))
    cohort.reach(phase)
    lost = cohort.names[1::3][: count // 3]
    if told:
        cohort.vanish(lost)
    else:
        cohort.gone |= set(lost)
    finish(cohort)
    late = phase in (ServerPhase.AGREEMENTS, ServerPhase.REVEALS)
    assert sums_up(cohort, cohort.names if late else tuple(sorted(set(cohort.names) - set(lost))))


def test_a_third_of_a_sparse_graph_may_vanish() -> None:
    cohort = Cohort(names_of(60), TERMS)
    cohort.reach(ServerPhase.MASKED)
    cohort.vanish(cohort.names[::6])
    cohort.reach(ServerPhase.REVEALS)
    cohort.gone |= set(cohort.names[1::6])
    finish(cohort)
    assert sums_up(cohort, tuple(name for place, name in enumerate(cohort.names) if place % 6))


def test_a_third_in_all_may_vanish_one_at_each_phase() -> None:
    cohort = Cohort(names_of(15), TERMS)
    for number, phase in enumerate(DROP_PHASES):
        cohort.reach(phase)
        cohort.vanish([cohort.names[2 * number]])
    finish(cohort)
    assert sums_up(cohort, tuple(sorted(set(cohort.names) - {cohort.names[place] for place in (0, 2, 4)})))


@pytest.mark.parametrize("phase", DROP_PHASES)
def test_more_than_the_threshold_allows_ends_without_a_sum(phase: ServerPhase) -> None:
    cohort = Cohort(names_of(6), Terms(4, 1 / 3))
    cohort.reach(phase)
    cohort.gone |= set(cohort.names[:3])
    finish(cohort)
    assert cohort.plan is None
    assert cohort.aborted is not None
    assert set(cohort.names[:3]) <= set(cohort.aborted.missing)


def test_a_cohort_below_the_promised_size_is_not_summed() -> None:
    cohort = Cohort(names_of(5), Terms(5, 1 / 3))
    cohort.reach(ServerPhase.MASKED)
    cohort.vanish([ONE])
    finish(cohort)
    assert cohort.aborted == Abort("4 devices in phase masked, at least 5 are needed", (ONE,))


# --- the pace -----------------------------------------------------------------------------------------------------


def test_it_waits_for_all_that_are_not_gone() -> None:
    cohort = Cohort(names_of(6), TERMS)
    last = cohort.up.pop()
    cohort.run()
    assert not cohort.down
    cohort.vanish([last[0]])
    assert {to for to, _ in cohort.down} == set(cohort.names) - {last[0]}


def test_ticks_before_the_deadline_change_nothing() -> None:
    cohort = Cohort(names_of(6), TERMS)
    cohort.up.pop()
    cohort.run()
    assert cohort.server.next_wakeup() == PHASE_S
    assert not cohort.server.changes(Tick(), PHASE_S - 1)
    assert cohort.server.changes(Tick(), PHASE_S)


def test_masked_vectors_have_no_deadline_but_the_rounds() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    assert cohort.server.next_wakeup() is None
    assert not cohort.server.changes(Tick(), 1e9)
    assert cohort.server.changes(CloseMasking(), 0.0)


def test_a_round_that_ends_before_shares_were_exchanged_has_no_sum() -> None:
    cohort = cohort_before(ServerPhase.SHARES)
    (command,) = cohort.server.handle(CloseMasking(), 0.0)
    assert isinstance(command, Abort)


def test_who_was_gone_when_the_roster_closed_has_no_part() -> None:
    cohort = Cohort(names_of(6), TERMS)
    held = cohort.up.pop()
    cohort.run()
    cohort.vanish([ONE])
    cohort.up.append(held)
    finish(cohort)
    assert sums_up(cohort, tuple(name for name in cohort.names if name != ONE))


def test_who_comes_back_in_time_is_waited_for_again() -> None:
    cohort = Cohort(names_of(6), TERMS)
    held = cohort.up.pop()
    cohort.run()
    cohort.tell_server(AgentGone(ONE))
    cohort.device_says(ONE, cohort.clients[ONE].handle(DeviceTick(), 1e3))
    cohort.up.append(held)
    finish(cohort)
    assert sums_up(cohort, cohort.names)


# --- refusals -----------------------------------------------------------------------------------------------------

GOOD_KEY = bytes([9]) + bytes(31)


@pytest.mark.parametrize(
    ("agent", "keys", "why"),
    [
        ("stranger", PublicKeys(GOOD_KEY, GOOD_KEY, bytes(32)), "not invited"),
        (ONE, PublicKeys(bytes(32), GOOD_KEY, bytes(32)), "X25519"),
        (ONE, PublicKeys(GOOD_KEY, bytes(32), bytes(32)), "X25519"),
        (ONE, PublicKeys(GOOD_KEY, GOOD_KEY[:31], bytes(32)), "X25519"),
        (ONE, PublicKeys(GOOD_KEY, GOOD_KEY, bytes(31)), "commitment"),
    ],
)
def test_bad_keys_are_refused(agent: str, keys: PublicKeys, why: str) -> None:
    server = Server(CONTEXT, names_of(4), TERMS, phase_s=PHASE_S)
    with pytest.raises(RefusedError, match=why):
        server.handle(KeysArrived(agent, keys), 0.0)


def test_keys_after_the_roster_are_too_late() -> None:
    cohort = Cohort(names_of(6), TERMS)
    _, late = cohort.up.pop()
    cohort.run()
    cohort.time_out()
    with pytest.raises(RefusedError, match="too late"):
        cohort.server.handle(late, cohort.now)


def test_a_device_that_restarted_is_not_waited_for() -> None:
    cohort = cohort_before(ServerPhase.SHARES)
    cohort.gone.add(ONE)
    cohort.tell_server(KeysArrived(ONE, replace(cohort.keys[ONE], seed_commitment=bytes(32))))
    cohort.run()
    assert sums_up(cohort, tuple(name for name in cohort.names if name != ONE))


def shares_from(cohort: Cohort, name: str) -> SharesArrived:
    cohort.run(
        until=lambda: any(isinstance(event, SharesArrived) and event.agent == name for _, event in cohort.up)
    )
    return next(event for _, event in cohort.up if isinstance(event, SharesArrived) and event.agent == name)


def test_bad_shares_are_refused() -> None:
    cohort = cohort_before(ServerPhase.SHARES)
    good = shares_from(cohort, ONE)
    first = next(iter(good.sealed))
    bad = [
        SharesArrived("stranger", good.sealed),
        SharesArrived(ONE, without(good.sealed, first)),
        SharesArrived(ONE, {**good.sealed, "stranger": bytes(SEALED_BYTES)}),
        SharesArrived(ONE, {**good.sealed, ONE: bytes(SEALED_BYTES)}),
        SharesArrived(ONE, {**good.sealed, first: bytes(SEALED_BYTES - 1)}),
        SharesArrived(ONE, {**good.sealed, first: bytes(1 << 20)}),
    ]
    for event in bad:
        with pytest.raises(RefusedError):
            cohort.server.handle(event, 0.0)
    cohort.server.handle(good, 0.0)
    with pytest.raises(RefusedError, match="other shares before"):
        cohort.server.handle(SharesArrived(ONE, {**good.sealed, first: bytes(SEALED_BYTES)}), 0.0)


@pytest.mark.parametrize("phase", [ServerPhase.KEYS, ServerPhase.SHARES, ServerPhase.AGREEMENTS])
def test_vectors_are_taken_only_between_shares_and_survivors(phase: ServerPhase) -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    if phase is ServerPhase.AGREEMENTS:
        cohort.gone.add(ONE)
        cohort.run()
        cohort.time_out()
    else:
        cohort = cohort_before(phase)
    with pytest.raises(RefusedError, match="no masked vector"):
        cohort.server.handle(MaskedStored(ONE), 0.0)


def test_signatures_on_other_survivors_are_refused() -> None:
    cohort = cohort_before(ServerPhase.AGREEMENTS)
    with pytest.raises(RefusedError, match="other survivors"):
        cohort.server.handle(AgreementArrived(ONE, bytes(32)), 0.0)
    with pytest.raises(RefusedError, match="not a survivor"):
        cohort.server.handle(AgreementArrived("stranger", bytes(32)), 0.0)
    with pytest.raises(RefusedError, match="not asked"):
        cohort.server.handle(RevealArrived(ONE, {}, {}), 0.0)


def reveals(cohort: Cohort) -> list[RevealArrived]:
    """What all devices reveal, before the aggregator has heard of it."""
    cohort.hold_reveals = True
    cohort.run()
    return cohort.held


def test_shares_that_nobody_asked_for_are_refused() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    cohort.vanish(["agent-0005"])
    good = reveals(cohort)[0]
    me, share = good.agent, next(iter(good.seeds.values()))
    for seeds, keys in [
        ({"agent-0005": share}, {}),  # of one that vanished
        ({}, {"agent-0002": share}),  # of one that survived
        ({"stranger": share}, {}),
        ({**good.seeds, "agent-0002": share[:-1]}, good.keys),
        ({**good.seeds, "agent-0002": PRIME.to_bytes(33, "big")}, good.keys),
    ]:
        with pytest.raises(RefusedError):
            cohort.server.handle(RevealArrived(me, seeds, keys), 0.0)


def forged(event: RevealArrived) -> RevealArrived:
    return replace(
        event,
        seeds={name: bytes([share[0], *share[2:], share[1]]) for name, share in event.seeds.items()},
        keys={name: bytes([share[0], *share[2:], share[1]]) for name, share in event.keys.items()},
    )


@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_forged_share_is_found_and_replaced_by_a_later_one(place: int) -> None:
    cohort = cohort_before(ServerPhase.MASKED, 10)
    cohort.vanish(["agent-0009"])
    events = reveals(cohort)
    events[place] = forged(events[place])
    for event in events:
        cohort.tell_server(event)
    assert sums_up(cohort, cohort.names[:-1])


def test_forged_shares_that_are_too_many_give_no_sum() -> None:
    cohort = cohort_before(ServerPhase.REVEALS)
    events = [forged(event) if number < 3 else event for number, event in enumerate(reveals(cohort))]
    for event in events:
        cohort.tell_server(event)
    cohort.time_out()
    assert cohort.plan is None
    assert cohort.aborted is not None
    assert "committed" in cohort.aborted.reason


# --- repeats and replay -------------------------------------------------------------------------------------------


def test_repeats_are_answered_and_do_not_count() -> None:
    cohort = cohort_before(ServerPhase.REVEALS)
    answers = {
        KeysArrived: SendRoster,
        MaskedStored: SendSurvivors,
        AgreementArrived: SendAgreements,
    }
    seen = set()
    for event in list(cohort.heard):
        if type(event) not in answers:
            continue
        assert not cohort.server.changes(event, cohort.now)
        (answer,) = cohort.server.handle(event, cohort.now)
        assert isinstance(answer, answers[type(event)])
        assert answer.to == event.agent  # type: ignore[union-attr]
        seen.add(type(event))
    assert seen == set(answers)


def test_repeated_shares_are_answered_while_vectors_are_awaited() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    event = next(event for event in cohort.heard if isinstance(event, SharesArrived))
    (answer,) = cohort.server.handle(event, cohort.now)
    assert isinstance(answer, SendShares)


def replayed(journal: list[ServerEvent], names: tuple[str, ...]) -> Server:
    server = Server(CONTEXT, names, TERMS, phase_s=PHASE_S)
    server.start(0.0)
    for event in journal:
        server.replay(event)
    return server


def test_after_a_crash_at_any_event_the_same_sum_comes_out() -> None:
    """The aggregator restarts, on a clock that began anew, after each number of events; then all goes on."""
    whole = Cohort(names_of(6), TERMS)
    whole.reach(ServerPhase.MASKED)
    whole.gone.add(ONE)
    finish(whole)
    assert any(isinstance(event, CloseMasking) for event in whole.journal)
    for crash_at in range(len(whole.journal) + 1):
        cohort = Cohort(names_of(6), TERMS)
        cohort.run(until=lambda cohort=cohort, at=crash_at: len(cohort.journal) >= at)  # type: ignore[misc]
        if cohort.server.phase is ServerPhase.MASKED:
            cohort.gone.add(ONE)
        cohort.up.clear()
        cohort.down.clear()
        cohort.server = replayed(cohort.journal, cohort.names)
        cohort.now = 5.0
        cohort.server_says(cohort.server.resume(cohort.now))
        for name, client in cohort.clients.items():
            cohort.device_says(name, client.handle(DeviceTick(), 1e6))
        for name in cohort.stored:  # the outbox offers it until it is accepted
            cohort.up.append((name, MaskedStored(name)))
        finish(cohort)
        assert cohort.plan is not None, (crash_at, cohort.aborted)
        assert np.array_equal(cohort.total, cohort.plain_sum(cohort.plan.survivors))


def test_a_replay_says_what_was_said_and_ends_where_it_was() -> None:
    cohort = Cohort(names_of(9), TERMS)
    cohort.reach(ServerPhase.SHARES)
    cohort.gone.add(ONE)
    finish(cohort)
    assert any(isinstance(event, Tick) for event in cohort.journal), "a phase ended by its deadline"
    again = replayed(cohort.journal, cohort.names)
    assert again.phase is ServerPhase.DONE
    (command,) = again.resume(0.0)
    assert command == replayed(cohort.journal, cohort.names).resume(7.0)[0]
    assert command.plan == cohort.plan  # type: ignore[union-attr]


def test_after_an_abort_nothing_is_taken() -> None:
    cohort = Cohort(names_of(6), TERMS)
    cohort.up.clear()
    cohort.time_out()
    assert cohort.aborted is not None
    assert cohort.server.next_wakeup() is None
    with pytest.raises(RefusedError, match="aborted"):
        cohort.server.handle(MaskedStored(ONE), cohort.now)
    assert cohort.server.resume(0.0) == [cohort.aborted]
