"""Masked sums over a broker in memory: real server, real agents, to the bit the plain sum of their integers."""

import pytest
from masked_federation import Recorder, check_sums, masked
from memory_federation import PATIENCE_S, Start, TinyTrainer


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
