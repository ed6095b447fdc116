"""edge_agent.session: one agent's part in a round, case by case. No clock, no network."""

import pytest
from msgspec import structs
from session_plans import MASKED, OTHER_RUN, RUN, base_of, feed, full_of, idle, offer, plan, receipt

from edge_agent.session import (
    Abandon,
    BaseReady,
    BaseUnusable,
    CreditArrived,
    Fetch,
    ForgetUpdate,
    IgnorePlan,
    JoinSum,
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
    DeclineCode,
    RoundPlan,
)


def delivering(number: int = 1) -> Session:
    session = Session("me")
    feed(session, PlanArrived(plan(number)), BaseReady(base_of(number)), UpdateReady(offer(number)))
    assert session.phase is Phase.DELIVERING
    return session


def test_a_round_from_the_plan_to_the_receipt() -> None:
    session = Session("me")
    assert feed(session, PlanArrived(plan())) == [Remember(RUN, 1, done=False), Fetch(plan(1))]
    assert feed(session, BaseReady(base_of(1))) == [Train(plan())]
    mine = offer()
    assert feed(session, UpdateReady(mine)) == [SendOffer(0)]
    credit = Credit(sha256=mine.object.sha256, chunks=(1, 0, 1))
    assert feed(session, CreditArrived(credit)) == [SendChunks(mine, (1, 0))]
    assert feed(session, ReceiptArrived(receipt(mine))) == [
        Remember(RUN, 1, done=True),
        ForgetUpdate(accepted=True, reason="accepted"),
    ]
    assert session.phase is Phase.IDLE
    assert session.next_wakeup() is None


def test_an_agent_that_was_not_invited_only_remembers_the_round() -> None:
    session = Session("me")
    assert feed(session, PlanArrived(plan(cohort=("you",)))) == [Remember(RUN, 1, done=False)]
    assert session.phase is Phase.IDLE


def test_an_agent_that_is_invited_later_joins_the_later_attempt() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(cohort=("you",))))
    later = plan(attempt=2)
    assert feed(session, PlanArrived(later)) == [Fetch(later)]


def test_the_same_plan_again_changes_nothing() -> None:
    session = delivering()
    assert feed(session, PlanArrived(plan()), PlanArrived(plan(attempt=2))) == []


def test_the_same_offer_again_does_not_interrupt_the_fetching() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan()))
    assert feed(session, PlanArrived(plan()), PlanArrived(plan(attempt=2))) == []
    assert session.phase is Phase.FETCHING


def test_an_older_plan_is_a_replay() -> None:
    session = delivering(3)
    commands = feed(session, PlanArrived(plan(2)), PlanArrived(idle(2)))
    assert commands == [IgnorePlan(2, "this device has seen round 3 of the same run")] * 2
    assert session.phase is Phase.DELIVERING


def test_a_round_that_was_closed_is_not_begun_again_by_a_replay() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(2)))
    assert feed(session, PlanArrived(idle(2))) == [
        Remember(RUN, 2, done=True),
        Abandon("the round is closed"),
    ]
    assert feed(session, PlanArrived(plan(2))) == []


def test_a_newer_round_ends_the_training_of_an_older_one() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(1)), BaseReady(base_of(1)))
    assert feed(session, PlanArrived(plan(2))) == [
        Remember(RUN, 2, done=False),
        Abandon("a newer round is open"),
        Fetch(plan(2)),
    ]
    assert feed(session, UpdateReady(offer(1))) == [], "it came too late"


def test_a_newer_round_forgets_an_update_without_a_receipt() -> None:
    session = delivering(1)
    assert feed(session, PlanArrived(plan(2))) == [
        Remember(RUN, 2, done=False),
        ForgetUpdate(accepted=False, reason="a newer round is open"),
        Fetch(plan(2)),
    ]
    credit = Credit(sha256=offer(1).object.sha256, chunks=(0,))
    assert feed(session, CreditArrived(credit), ReceiptArrived(receipt(offer(1)))) == []


def test_another_run_starts_from_its_own_rounds() -> None:
    session = delivering(7)
    assert feed(session, PlanArrived(plan(1, run=OTHER_RUN)))[-1] == Fetch(plan(1, run=OTHER_RUN))


def test_a_plan_of_a_run_that_is_over_is_a_replay_also_after_power_loss() -> None:
    session = delivering(7)
    *_, remembered, _, _ = feed(session, PlanArrived(plan(1, run=OTHER_RUN)))
    assert remembered == Remember(OTHER_RUN, 1, done=False, retired=(RUN,))
    reason = f"run {RUN} is over, this device has seen run {OTHER_RUN}"
    assert feed(session, PlanArrived(plan(8))) == [IgnorePlan(8, reason)]
    restarted = Session("me", seen=(OTHER_RUN, 1), retired=remembered.retired)
    assert feed(restarted, PlanArrived(plan(8))) == [IgnorePlan(8, reason)]


def test_an_update_of_another_run_with_the_same_number_is_not_delivered() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(1, run=OTHER_RUN)), BaseReady(base_of(1, OTHER_RUN)))
    assert feed(session, UpdateReady(offer(1))) == []
    assert session.phase is Phase.TRAINING


def test_a_failure_in_another_run_declines_nothing() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(1, run=OTHER_RUN)))
    assert feed(session, WorkFailed(RUN, 1, "its model was deleted")) == []
    assert session.phase is Phase.FETCHING


def test_a_model_of_another_round_starts_no_training() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(2)))
    assert feed(session, BaseReady(base_of(1))) == []


def test_a_model_that_is_cut_anew_is_fetched_anew() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(1)))
    again = plan(1, full=full_of(1, chunk_bytes=128))
    assert feed(session, PlanArrived(again)) == [Fetch(again)]


def test_a_model_that_is_cut_anew_during_training_interrupts_nothing() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(1)), BaseReady(base_of(1)))
    again = plan(1, attempt=2, full=full_of(1, chunk_bytes=128))
    assert feed(session, PlanArrived(again)) == []
    assert feed(session, BaseUnusable(RUN, 1, "damaged")) == [Fetch(again)], "from what is on the broker now"


def test_a_base_model_that_cannot_be_made_is_fetched_in_another_way() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(1)), BaseReady(base_of(1)))
    assert feed(session, BaseUnusable(RUN, 1, "another version")) == [Fetch(plan(1))]
    assert session.phase is Phase.FETCHING
    assert feed(session, BaseUnusable(RUN, 1, "another version")) == [], "it was said twice"
    assert feed(session, BaseReady(base_of(1))) == [Train(plan(1))]


def test_a_base_model_of_an_older_round_or_another_run_that_cannot_be_made_matters_no_more() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(1)), BaseReady(base_of(1)))
    feed(session, PlanArrived(plan(2)), BaseReady(base_of(2)))
    for stale in (BaseUnusable(RUN, 1, "damaged"), BaseUnusable(OTHER_RUN, 2, "damaged")):
        assert feed(session, stale) == []
    assert session.phase is Phase.TRAINING


def test_a_round_that_starts_from_the_same_version_is_fetched_and_trained_again() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan(1)), BaseReady(base_of(1)))
    same = structs.replace(plan(2), base=base_of(1), full=full_of(1))
    assert feed(session, PlanArrived(same), BaseReady(base_of(1)))[-2:] == [Fetch(same), Train(same)]


def test_a_fault_on_the_device_declines_the_round_until_a_later_attempt() -> None:
    session = Session("me")
    feed(session, PlanArrived(plan()))
    declined = SendDecline(RUN, 1, "the disk is full")
    assert feed(session, WorkFailed(RUN, 1, "the disk is full")) == [declined]
    assert feed(session, PlanArrived(plan())) == [declined], "the first one may be lost"
    assert feed(session, PlanArrived(plan(attempt=2))) == [Fetch(plan(attempt=2))]


def test_an_update_that_the_disk_has_lost_is_forgotten_and_declined() -> None:
    session = delivering()
    assert feed(session, WorkFailed(RUN, 1, "chunk 0 is damaged")) == [
        ForgetUpdate(accepted=False, reason="chunk 0 is damaged"),
        SendDecline(RUN, 1, "chunk 0 is damaged"),
    ]
    assert session.next_wakeup() is None


@pytest.mark.parametrize("code", [None, Rejection.NON_FINITE])
def test_a_round_with_a_receipt_is_never_trained_again(code: Rejection | None) -> None:
    session = delivering()
    (remembered, forgotten) = feed(session, ReceiptArrived(receipt(offer(), code)))
    assert remembered == Remember(RUN, 1, done=True)
    assert isinstance(forgotten, ForgetUpdate)
    assert forgotten.accepted is (code is None)
    assert feed(session, PlanArrived(plan()), PlanArrived(plan(attempt=2))) == []
    after_power_loss = Session("me", seen=(RUN, 1), done=True)
    assert feed(after_power_loss, PlanArrived(plan()), PlanArrived(plan(attempt=2))) == []


def test_a_second_receipt_and_one_for_something_else_say_nothing() -> None:
    session = delivering()
    assert feed(session, ReceiptArrived(receipt(offer(data="other")))) == []
    assert feed(session, ReceiptArrived(receipt(offer(1, OTHER_RUN)))) == []
    feed(session, ReceiptArrived(receipt(offer())))
    assert feed(session, ReceiptArrived(receipt(offer()))) == []


def test_an_update_in_the_outbox_is_delivered_after_power_loss_without_training() -> None:
    session = Session("me", seen=(RUN, 4), pending=offer(4))
    assert session.next_wakeup() is None, "nothing is known of the round yet"
    assert feed(session, PlanArrived(plan(4))) == [SendOffer(0)]
    credit = Credit(sha256=offer(4).object.sha256, chunks=(2,))
    assert feed(session, CreditArrived(credit)) == [SendChunks(offer(4), (2,))]


def test_a_receipt_that_comes_before_the_plan_is_enough() -> None:
    session = Session("me", seen=(RUN, 4), pending=offer(4))
    assert feed(session, ReceiptArrived(receipt(offer(4))))[-1] == ForgetUpdate(
        accepted=True, reason="accepted"
    )
    assert feed(session, PlanArrived(plan(4))) == []


def test_an_update_in_the_outbox_is_forgotten_when_its_round_is_over() -> None:
    for over in (idle(4), plan(5), plan(1, run=OTHER_RUN)):
        session = Session("me", seen=(RUN, 4), pending=offer(4))
        assert ForgetUpdate in map(type, feed(session, PlanArrived(over)))


def test_an_update_in_the_outbox_proves_that_its_plan_was_seen() -> None:
    session = Session("me", pending=offer(4))
    (ignored,) = feed(session, PlanArrived(plan(3)))
    assert isinstance(ignored, IgnorePlan), "a replay: the update is for round 4"
    assert feed(session, PlanArrived(plan(4))) == [SendOffer(0)]


def test_power_loss_between_receipt_and_deletion_only_deletes() -> None:
    session = Session("me", seen=(RUN, 4), done=True, pending=offer(4))
    assert feed(session, PlanArrived(plan(4))) == [ForgetUpdate(accepted=False, reason="it has its receipt")]


def test_the_offer_is_repeated_until_there_is_an_answer_and_at_once_after_a_reconnect() -> None:
    session = delivering()
    assert feed(session, Tick(), now=1.0) == []
    wakeup = session.next_wakeup()
    assert wakeup is not None
    assert feed(session, Tick(), now=wakeup) == [SendOffer(1)]
    assert feed(session, LinkUp(), now=wakeup + 0.1) == [SendOffer(2)]


def test_a_credit_for_chunks_that_do_not_exist_is_refused() -> None:
    session = delivering()
    with pytest.raises(PeerError) as refused:
        feed(session, CreditArrived(Credit(sha256=offer().object.sha256, chunks=(4000,))))
    assert refused.value.code is Rejection.MALFORMED
    assert session.phase is Phase.DELIVERING


def test_nothing_is_due_in_an_idle_session() -> None:
    session = Session("me")
    credit = Credit(sha256=offer().object.sha256, chunks=(0,))
    assert feed(session, Tick(), LinkUp(), CreditArrived(credit), ReceiptArrived(receipt(offer()))) == []


def needs_masks(of: RoundPlan) -> str:
    return "" if of.privacy.secagg else "no masks"


def test_a_plan_below_the_terms_is_declined_before_anything_is_fetched() -> None:
    session = Session("me", objection=needs_masks)
    declined = SendDecline(RUN, 1, "no masks", DeclineCode.TERMS)
    assert feed(session, PlanArrived(plan())) == [Remember(RUN, 1, done=False), declined]
    assert feed(session, PlanArrived(plan())) == [declined]
    better = structs.replace(plan(attempt=2), privacy=MASKED)
    assert feed(session, PlanArrived(better)) == [JoinSum(better), Fetch(better)]


def test_a_later_attempt_cannot_take_back_what_was_promised() -> None:
    session = Session("me", objection=needs_masks)
    feed(session, PlanArrived(structs.replace(plan(), privacy=MASKED)), BaseReady(base_of(1)))
    assert session.phase is Phase.TRAINING
    assert feed(session, PlanArrived(plan(attempt=2))) == [
        Abandon("no masks"),
        SendDecline(RUN, 1, "no masks", DeclineCode.TERMS),
    ]
    assert feed(session, UpdateReady(offer())) == []


def test_an_update_on_disk_is_not_sent_under_lesser_terms() -> None:
    session = Session("me", seen=(RUN, 1), pending=offer(), objection=needs_masks)
    assert feed(session, PlanArrived(plan())) == [
        ForgetUpdate(accepted=False, reason="no masks"),
        SendDecline(RUN, 1, "no masks", DeclineCode.TERMS),
    ]
