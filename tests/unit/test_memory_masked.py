"""Masked sums over a broker in memory: real server, real agents, to the bit the plain sum of their integers."""

import numpy as np
import pytest
from masked_federation import Recorder, check_sums, masked, vanish
from memory_federation import PATIENCE_S, Start, TinyTrainer, base_arrays, eventually


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def test_the_sum_of_all_is_exact(federation: Start, recorder: Recorder) -> None:
    fleet = masked(federation(4, count=2))
    trainers = {name: TinyTrainer() for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    check_sums(fleet, recorder, {1: fleet.names, 2: fleet.names})
    assert all(trainer.ended == [1, 2] for trainer in trainers.values())


SIX = {"count": 1, "min_agents": 4, "cohort_size": 6, "gather_s": 60.0, "quorum": 0.5, "grace_s": 0.1}


@pytest.mark.parametrize("when", ["keys", "shares", "offer", "agreement", "reveal"])
def test_a_third_may_vanish_at_any_step(federation: Start, recorder: Recorder, when: str) -> None:
    fleet = masked(federation(6, **SIX), min_agents=4)
    vanish(fleet, ["pi1", "pi4"], when)
    for name in fleet.names:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    others = [name for name in fleet.names if name not in ("pi1", "pi4")]
    check_sums(fleet, recorder, {1: fleet.names if when in ("agreement", "reveal") else others})
    with fleet.store() as store:
        assert store.rounds()[0].attempt == 1


HALF = ["pi0", "pi2", "pi3"]


@pytest.mark.parametrize(("when", "phase_s"), [("shares", 0.5), ("offer", 30.0), ("agreement", 0.5)])
def test_after_too_many_vanish_all_mask_anew_and_nobody_trains_again(
    federation: Start, recorder: Recorder, when: str, phase_s: float
) -> None:
    fleet = masked(federation(6, **SIX, deadline_s=1.0), min_agents=4, phase_s=phase_s)
    come_back = vanish(fleet, HALF, when)
    trainers = {name: TinyTrainer() for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    with fleet.store() as store:
        eventually(lambda: [row.attempt for row in store.rounds()] == [2], "another attempt")
    come_back()
    assert served.result(PATIENCE_S) is True
    check_sums(fleet, recorder, {1: fleet.names})
    assert all(trainer.ended == [1] for trainer in trainers.values())
    eventually(lambda: not list(fleet.folder.glob("pi*/secagg/trained")), "nothing is kept of it")


def test_a_sum_that_too_few_open_is_skipped_and_the_run_goes_on(
    federation: Start, recorder: Recorder
) -> None:
    fleet = masked(federation(6, **SIX | {"count": 2}), min_agents=4, phase_s=0.5)
    come_back = vanish(fleet, HALF, "reveal")
    for name in fleet.names:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    with fleet.store() as store:
        eventually(lambda: [row.phase for row in store.rounds()][:1] == ["closed"], "the round is closed")
    come_back()
    assert served.result(PATIENCE_S) is True
    for name, array in fleet.model(1).items():
        np.testing.assert_array_equal(array, base_arrays()[name])
    with fleet.store() as store:
        assert [row.phase for row in store.rounds()] == ["closed", "closed"]
        assert len(store.updates(2)) >= 4
    assert any(not np.array_equal(array, base_arrays()[name]) for name, array in fleet.model(2).items())
