"""A device that wants more privacy than a plan promises sits out, in sight of everybody, and the others go on."""

from memory_federation import PATIENCE_S, Start, TinyTrainer

from aggregator.status import collect
from aggregator.status_view import render


def test_a_decline_for_the_terms_is_visible_and_holds_nobody_up(federation: Start) -> None:
    fleet = federation(count=2, min_agents=2, cohort_size=3, gather_s=30, quorum=0.5)
    strict = TinyTrainer()
    fleet.join("pi0", strict, require=["secagg n>=3"])
    trainers = [TinyTrainer(), TinyTrainer()]
    for name, trainer in zip(fleet.names[1:], trainers, strict=True):
        fleet.join(name, trainer)

    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True

    assert not strict.began
    assert all(trainer.ended == [1, 2] for trainer in trainers)
    report = collect(fleet.folder / "server")
    assert {(row["round"], row["agent"], row["code"]) for row in report.declines} == {
        (1, "pi0", "terms"),
        (2, "pi0", "terms"),
    }
    assert "secagg n>=3" in render(report)
    assert "no privacy terms" in report.declines[0]["reason"]
