"""edge_agent.session under secure aggregation: trained once, masked anew in each attempt, there until the sum is opened."""

from msgspec import structs
from session_plans import MASKED, RUN, base_of, feed, idle, offer, plan, receipt

from edge_agent.session import (
    Abandon,
    BaseReady,
    Fetch,
    ForgetUpdate,
    JoinSum,
    Mask,
    MasksReady,
    Phase,
    PlanArrived,
    ReceiptArrived,
    Remember,
    SendDecline,
    SendOffer,
    Session,
    Train,
    TrainingKept,
    UpdateReady,
    WorkFailed,
)
from federation.errors import Rejection
from federation.wire.messages import DeclineCode, RoundPlan, UpdateOffer


def masked_plan(number: int = 1, attempt: int = 1) -> RoundPlan:
    return structs.replace(plan(number, attempt=attempt), privacy=MASKED, up_encoding="masked:16")


def masked_offer(number: int = 1, attempt: int = 1) -> UpdateOffer:
    data = offer(number, data=f"masked {attempt}")
    return structs.replace(data, encoding="masked:16", attempt=attempt)


def delivered() -> Session:
    session = Session("me")
    feed(
        session,
        PlanArrived(masked_plan()),
        BaseReady(base_of(1)),
        MasksReady(1),
        TrainingKept(RUN, 1),
        UpdateReady(masked_offer()),
        ReceiptArrived(receipt(masked_offer())),
    )
    assert session.phase is Phase.OPENING
    return session


def test_keys_go_out_before_the_model_has_come() -> None:
    first = masked_plan()
    assert feed(Session("me"), PlanArrived(first)) == [
        Remember(RUN, 1, done=False),
        JoinSum(first),
        Fetch(first),
    ]


def test_it_is_masked_when_both_the_masks_and_the_training_are_there() -> None:
    for order in ((MasksReady(1), TrainingKept(RUN, 1)), (TrainingKept(RUN, 1), MasksReady(1))):
        session = Session("me")
        assert feed(session, PlanArrived(masked_plan()), BaseReady(base_of(1)))[-1] == Train(masked_plan())
        assert feed(session, order[0]) == []
        assert feed(session, order[1]) == [Mask(masked_plan())]
        assert feed(session, UpdateReady(masked_offer())) == [SendOffer(0)]


def test_masks_of_another_attempt_are_of_no_use() -> None:
    session = Session("me")
    feed(session, PlanArrived(masked_plan(attempt=2)), BaseReady(base_of(1)), MasksReady(1))
    assert feed(session, TrainingKept(RUN, 1)) == []
    assert feed(session, UpdateReady(masked_offer(attempt=1))) == []
    assert feed(session, MasksReady(2)) == [Mask(masked_plan(attempt=2))]


def test_after_its_receipt_it_stays_until_the_round_is_over() -> None:
    session = delivered()
    assert feed(session, PlanArrived(masked_plan())) == []
    assert feed(session, PlanArrived(idle(1))) == [Remember(RUN, 1, done=True)]
    assert session.plan is None


def test_another_attempt_takes_it_back_to_masking_without_training() -> None:
    session = delivered()
    second = masked_plan(attempt=2)
    assert feed(session, PlanArrived(second)) == [JoinSum(second)]
    assert session.phase is Phase.MASKING
    assert feed(session, MasksReady(2)) == [Mask(second)]
    assert feed(session, UpdateReady(masked_offer(attempt=2))) == [SendOffer(0)]
    late = ReceiptArrived(receipt(masked_offer(attempt=1)))
    assert feed(session, late) == [], "of the first attempt"


def test_an_update_on_its_way_is_dropped_for_another_attempt() -> None:
    session = Session("me")
    feed(
        session,
        PlanArrived(masked_plan()),
        BaseReady(base_of(1)),
        MasksReady(1),
        TrainingKept(RUN, 1),
        UpdateReady(masked_offer()),
    )
    second = masked_plan(attempt=2)
    assert feed(session, PlanArrived(second)) == [
        ForgetUpdate(accepted=False, reason="it was masked for an earlier attempt"),
        JoinSum(second),
    ]


def test_after_a_restart_it_masks_what_was_kept() -> None:
    session = Session("me", seen=(RUN, 1), kept=(RUN, 1))
    second = masked_plan(attempt=2)
    assert feed(session, PlanArrived(second)) == [JoinSum(second)]
    assert feed(session, MasksReady(2)) == [Mask(second)]


def test_after_a_restart_it_delivers_what_was_masked_for_this_attempt_only() -> None:
    here = Session("me", seen=(RUN, 1), kept=(RUN, 1), pending=masked_offer(attempt=2))
    assert feed(here, PlanArrived(masked_plan(attempt=2))) == [SendOffer(0)]
    later = masked_plan(attempt=3)
    gone = Session("me", seen=(RUN, 1), kept=(RUN, 1), pending=masked_offer(attempt=2))
    assert feed(gone, PlanArrived(later)) == [
        ForgetUpdate(accepted=False, reason="it was masked for an earlier attempt"),
        JoinSum(later),
    ]


def test_a_refusal_ends_the_round_for_it() -> None:
    session = Session("me", seen=(RUN, 1), kept=(RUN, 1), pending=masked_offer())
    feed(session, PlanArrived(masked_plan()))
    commands = feed(session, ReceiptArrived(receipt(masked_offer(), Rejection.WRONG_LENGTH)))
    assert commands[0] == Remember(RUN, 1, done=True)
    assert session.phase is Phase.IDLE


def test_who_cannot_trust_the_roster_stops_training_and_declines_this_attempt() -> None:
    session = Session("me")
    feed(session, PlanArrived(masked_plan()), BaseReady(base_of(1)))
    declined = SendDecline(RUN, 1, "two rosters", DeclineCode.TERMS)
    assert feed(session, WorkFailed(RUN, 1, "two rosters", DeclineCode.TERMS)) == [
        Abandon("two rosters"),
        declined,
    ]
    assert feed(session, PlanArrived(masked_plan())) == [declined]
    second = masked_plan(attempt=2)
    assert feed(session, PlanArrived(second)) == [JoinSum(second), Fetch(second)]
