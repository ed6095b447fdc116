"""Distributed noise over a broker in memory: it is in the sum, it is paid for, and a plan that gives too little is declined."""

from math import sqrt

import msgspec
import numpy as np
import pytest
from masked_federation import Recorder, check_sums, masked
from memory_federation import PATIENCE_S, SHAPES, Start, TinyTrainer, base_arrays, delta_of, eventually

from aggregator.masked_noise import paid_rounds
from aggregator.promises import terms_of
from aggregator.status import collect
from aggregator.status_view import render
from federation.wire.codec import schema_of
from federation.wire.masking import scale_of
from privacy.distributed import epsilon_of, least_agents

SCHEMA = schema_of(base_arrays())
VALUES = sum(int(np.prod(shape)) for shape in SHAPES.values())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_noise_of_all_is_in_the_sum(federation: Start, recorder: Recorder, bits: int) -> None:
    noise, clip_norm, size = 3.0, 0.5, 6
    fleet = masked(
        federation(size, count=1, min_agents=size),
        noise_multiplier=noise,
        clip_norm=clip_norm,
        modulus_bits=bits,
        dropouts=1 / 3,
    )
    for name in fleet.names:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    check_sums(fleet, recorder, {1: fleet.names})
    base = base_arrays()
    clipped = {name: np.zeros(array.shape) for name, array in base.items()}
    for agent in fleet.names:
        delta = delta_of(base, agent, 1)
        norm = sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in delta.values()))
        for name, array in delta.items():
            clipped[name] += array.astype(np.float64) * min(1.0, clip_norm / norm)
    error = sum(
        float((((fleet.model(1)[name] - base[name]) * float(size) - clipped[name]) ** 2).sum())
        for name in base
    )
    # Nobody vanished: there is more noise than was promised. It has 1,230 values, so its variance is known to 4 %.
    expected = noise * clip_norm * sqrt(size / least_agents(size, 1 / 3))
    assert sqrt(error / VALUES) == pytest.approx(expected, rel=0.15)
    plan = recorder.plans[1, 1]
    assert scale_of(plan, SCHEMA).wrap_probability < 1e-4
    with fleet.store() as store:
        (paid,) = paid_rounds(store)
    assert paid.noise_multiplier == noise
    text = render(collect(fleet.folder / "server"))
    assert f"epsilon {epsilon_of([paid.sum], 1e-5):.3g} of 8 at delta 1e-05 after 1 round" in text


def test_the_run_ends_when_the_budget_is_spent(federation: Start) -> None:
    fleet = masked(federation(3, count=10), noise_multiplier=2.0, epsilon=4.0)
    for name in fleet.names:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    with fleet.store() as store:
        paid = paid_rounds(store)
        assert [row.round for row in store.rounds()] == [row.round for row in paid] == [1, 2, 3]
    assert epsilon_of([row.sum for row in paid], 1e-5) <= 4.0
    assert epsilon_of([paid[0].sum] * 4, 1e-5) > 4.0


def test_a_device_declines_a_plan_whose_noise_is_less_than_it_says(
    federation: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An aggregator that lies: it states an epsilon that its noise does not give, and takes it for paid."""
    fleet = masked(federation(3, count=1), noise_multiplier=0.01, epsilon=1e9)

    def lie(*arguments: object) -> object:
        honest = terms_of(*arguments)  # type: ignore[arg-type]
        assert honest.secagg is not None
        return msgspec.structs.replace(honest, secagg=msgspec.structs.replace(honest.secagg, epsilon=1.0))

    monkeypatch.setattr("aggregator.central_noise.terms_of", lie)
    monkeypatch.setattr("aggregator.masked_noise.MaskedNoise.pay", lambda *_: None)
    trainers = [TinyTrainer() for _ in fleet.names]
    for name, trainer in zip(fleet.names, trainers, strict=True):
        fleet.join(name, trainer)
    fleet.serve()
    with fleet.store() as store:
        eventually(lambda: len(store.declines()) == 3, "all decline")
        for _, _, code, reason, _ in store.declines():
            assert code == "terms"
            assert (
                "the plan promises epsilon 1 at delta 1e-05, but 1 rounds with its noise multiplier 0.01"
                in reason
            )
    assert not any(trainer.ended for trainer in trainers)
