"""What devices say that they have spent: refused at the door where it does not fit the plan, kept, and shown."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from aggregator.admission import Limits, OpenRound, check_offer
from aggregator.spending import last_spent
from aggregator.status import collect
from aggregator.status_view import render
from aggregator.store import Store
from federation.errors import PeerError, Rejection
from federation.wire.messages import AgentState, TrainMetrics, UpdateOffer
from federation.wire.terms import SampleTerms, Spent
from federation.wire.transfer import make_ref

TARGET = SampleTerms(clip_norm=1.5, delta=1e-5, rounds=10, epsilon=3.0)
NOISE = SampleTerms(clip_norm=1.5, delta=1e-5, rounds=10, noise_multiplier=1.1)
SPENT = Spent(
    epsilon=2.5,
    round_epsilon=0.8,
    delta=1e-5,
    noise_multiplier=1.1,
    clip_norm=1.5,
    steps=100,
    entry=4,
    head="e" * 64,
)
OFFER = UpdateOffer(
    run="0" * 16,
    round=1,
    base="b" * 64,
    object=make_ref(bytes(64), 64),
    encoding="float32",
    samples=1,
    metrics=TrainMetrics(loss=None, accuracy=None, steps=1, train_s=1.0),
    spent=SPENT,
)


def offer(**fields: Any) -> UpdateOffer:
    return msgspec.structs.replace(OFFER, spent=msgspec.structs.replace(SPENT, **fields))


def check(what: UpdateOffer, terms: SampleTerms | None) -> None:
    state = OpenRound(
        run=OFFER.run,
        round=1,
        open=True,
        base=OFFER.base,
        cohort=frozenset({"pi1"}),
        encoding="float32",
        upload_chunk_bytes=64,
        schema={"w": (64,)},
        sample=terms,
    )
    check_offer(what, "pi1", state, Limits(max_samples=10))


@pytest.mark.parametrize("terms", [TARGET, NOISE])
def test_more_protection_than_asked_passes(terms: SampleTerms) -> None:
    check(offer(noise_multiplier=5.0, round_epsilon=0.1, epsilon=7.0), terms)
    check(OFFER, terms)


def test_without_terms_nothing_need_be_said() -> None:
    check(msgspec.structs.replace(OFFER, spent=None), None)


@pytest.mark.parametrize(
    ("what", "terms", "code"),
    [
        (msgspec.structs.replace(OFFER, spent=None), TARGET, Rejection.MISSING_SPENT),
        (offer(clip_norm=1.6), TARGET, Rejection.WRONG_SPENT),
        (offer(clip_norm=1.4), TARGET, Rejection.WRONG_SPENT),
        (offer(delta=1e-4), TARGET, Rejection.WRONG_SPENT),
        (offer(noise_multiplier=1.0999), NOISE, Rejection.WRONG_SPENT),
        (offer(round_epsilon=3.01), TARGET, Rejection.WRONG_SPENT),
    ],
)
def test_what_does_not_fit_the_plan_is_refused(
    what: UpdateOffer, terms: SampleTerms, code: Rejection
) -> None:
    with pytest.raises(PeerError) as refused:
        check(what, terms)
    assert refused.value.code is code


def test_the_last_word_is_kept_with_the_update_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with Store(tmp_path, "home", create=True) as store:
        for name in ("pi1", "pi2"):
            store.record_agent(name, AgentState(state="online", session="0" * 16))
        with capture_logs() as logs:
            store.record_update(1, "pi1", OFFER)
            store.record_update(2, "pi1", offer(entry=5, epsilon=2.75))
        assert not logs
        assert last_spent(store)["pi1"].spent.epsilon == 2.75
    report = collect(tmp_path)
    assert [agent["spent"] and agent["spent"]["epsilon"] for agent in report.agents] == [2.75, None]
    assert report.agents[0]["spent"]["went_back"] is False
    assert "2.75 (1e-05)" in render(report)


def test_a_ledger_that_goes_back_is_told_and_stays_marked(tmp_path: Path) -> None:
    with Store(tmp_path, "home", create=True) as store:
        store.record_update(1, "pi1", OFFER)
        with capture_logs() as logs:
            store.record_update(2, "pi1", offer(entry=1, epsilon=0.8))
        assert [(log["event"], log["log_level"], log["before"]) for log in logs] == [
            ("ledger_went_back", "warning", 4)
        ]
        with capture_logs() as logs:
            store.record_update(3, "pi1", offer(entry=9, epsilon=2.0))
            store.record_update(3, "pi2", offer(entry=1))
        assert not logs
        assert [last_spent(store)[name].went_back for name in ("pi1", "pi2")] == [True, False]
