"""A federation with client-level privacy in memory: real server, real agents, noise that is paid for."""

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from memory_federation import (
    PATIENCE_S,
    SHAPES,
    Arrays,
    Federation,
    Start,
    TinyTrainer,
    base_arrays,
    delta_of,
    eventually,
)

from aggregator.privacy_config import ClientConfig, PrivacyConfig
from aggregator.records import StoredVersion
from aggregator.round_noise import noisy_rounds
from aggregator.status import collect
from aggregator.status_view import render
from aggregator.store import Store
from edge_agent.training import Trained
from federation.wire.messages import RoundPlan
from federation.wire.versions import model_digest
from privacy.accounting import Spend, epsilon_pld
from privacy.budget import PrivateRound

PARAMETERS = sum(int(np.prod(shape)) for shape in SHAPES.values())
FAINT = 1e-4
"""A noise multiplier that leaves the mean visible."""


class Shouting(TinyTrainer):
    """Its updates are scaled, and it remembers the clip norms that plans promised."""

    def __init__(self, factor: float = 1.0, *, gate: threading.Event | None = None) -> None:
        super().__init__(gate=gate)
        self.factor = factor
        self.clip_norms: list[float] = []

    def train(
        self,
        base: Arrays,
        plan: RoundPlan,
        agent: str,
        cancelled: Callable[[], bool],
        *,
        private: PrivateRound | None = None,
    ) -> Trained:
        assert plan.privacy.client is not None
        self.clip_norms.append(plan.privacy.client.clip_norm)
        trained = super().train(base, plan, agent, cancelled, private=private)
        loud = {name: array * np.float32(self.factor) for name, array in trained.delta.items()}
        return Trained(loud, trained.samples, trained.metrics)


def private(fleet: Federation, **client: float) -> None:
    settings = {"noise_multiplier": FAINT, "epsilon": 1e12, "clip_norm": 0.5} | client
    privacy = PrivacyConfig(client=ClientConfig(**settings))
    fleet.config = msgspec.structs.replace(fleet.config, privacy=privacy)


def join_all(fleet: Federation) -> list[Shouting]:
    trainers = [Shouting() for _ in fleet.names]
    for name, trainer in zip(fleet.names, trainers, strict=True):
        fleet.join(name, trainer)
    return trainers


def folder(fleet: Federation) -> Path:
    return fleet.folder / "server"


def flat(arrays: Arrays) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([arrays[name].astype(np.float64).ravel() for name in sorted(arrays)])


def test_the_model_is_the_mean_of_clipped_updates_of_equal_weight(federation: Start) -> None:
    """One device claims a hundred thousand times its update: it moves the model by C / n, like any other."""
    fleet = federation(count=1)
    private(fleet)
    for name, factor in zip(fleet.names, (1.0, 1e5, 1e-3), strict=True):
        fleet.join(name, Shouting(factor))
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    base = base_arrays()
    expected = np.zeros(PARAMETERS)
    for name, factor in zip(fleet.names, (1.0, 1e5, 1e-3), strict=True):
        update = factor * flat(delta_of(base, name, 1))
        expected += update * min(1.0, 0.5 / float(np.linalg.norm(update))) / 3
    moved = flat(fleet.model(1)) - flat(base)
    # The noise has a standard deviation of 1.7e-5, a weight in float32 a step of 2e-7.
    np.testing.assert_allclose(moved, expected, atol=1.2e-4)
    with fleet.store() as store:
        assert {update.samples for update in store.updates(1).values()} == {1}
        assert all(update.metrics.loss is None for update in store.updates(1).values())


@pytest.mark.parametrize("down", ["full", "sq:4"])
def test_the_run_ends_before_the_round_that_would_exceed_the_budget(federation: Start, down: str) -> None:
    limit = epsilon_pld([Spend(2.0, 1.0, 2)], 1e-5)
    fleet = federation(count=5, down=down)
    private(fleet, noise_multiplier=2.0, epsilon=limit)
    trainers = join_all(fleet)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    assert all(trainer.ended == [1, 2] for trainer in trainers)
    report = collect(folder(fleet))
    spent = report.client_privacy
    assert spent is not None
    assert (len(report.rounds), spent.paid_rounds, spent.exhausted) == (2, 2, True)
    assert spent.epsilon == pytest.approx(limit)
    assert "the budget is spent: one more round would make" in render(report)
    assert b"exhausted" in msgspec.json.encode(report)
    # Started again, it opens none; with a larger budget, it goes on from there.
    _, again = fleet.serve()
    assert again.result(PATIENCE_S) is True
    assert len(collect(folder(fleet)).rounds) == 2
    private(fleet, noise_multiplier=2.0, epsilon=epsilon_pld([Spend(2.0, 1.0, 3)], 1e-5))
    _, third = fleet.serve()
    assert third.result(PATIENCE_S) is True
    assert all(trainer.ended == [1, 2, 3] for trainer in trainers)


def test_killed_between_the_fold_and_the_close_the_model_keeps_its_noise(
    federation: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = federation(count=1)
    private(fleet, noise_multiplier=2.0)
    join_all(fleet)

    def power_cut(*_: object) -> None:
        raise ConnectionAbortedError

    with monkeypatch.context() as patched:
        patched.setattr(Store, "close_round", power_cut)
        _, served = fleet.serve()
        with pytest.raises(ConnectionAbortedError):
            served.result(PATIENCE_S)
    seen = model_digest(fleet.model(1))
    _, again = fleet.serve()
    assert again.result(PATIENCE_S) is True
    assert model_digest(fleet.model(1)) == seen
    with fleet.store() as store:
        assert store.version(1) == StoredVersion(seen, "full")
        assert len(noisy_rounds(store)) == 1, "it is paid for once"


def test_killed_while_the_round_is_open_it_is_paid_for_once(federation: Start) -> None:
    fleet = federation(count=1)
    private(fleet, noise_multiplier=2.0)
    gate = threading.Event()
    for name in fleet.names:
        fleet.join(name, Shouting(gate=gate if name == "pi2" else None))
    service, served = fleet.serve()
    with fleet.store() as store:
        eventually(lambda: sorted(store.updates(1)) == ["pi0", "pi1"], "two have delivered")
        service.stop()
        assert served.result(PATIENCE_S) is False
        gate.set()
        _, again = fleet.serve()
        assert again.result(PATIENCE_S) is True
        assert len(noisy_rounds(store)) == 1
        assert sorted(store.updates(1)) == fleet.names


def test_the_clip_norm_of_each_plan_follows_the_updates(federation: Start) -> None:
    fleet = federation(count=4)
    private(fleet, clip_norm=1000.0, quantile=0.5, clip_learning_rate=2.0)
    trainers = join_all(fleet)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    norms = trainers[0].clip_norms
    assert all(trainer.clip_norms == norms for trainer in trainers)
    assert norms[0] == 1000.0
    for before, after in pairwise(norms):
        # All three updates are below, so that C falls by exp(-2 (1 - 1/2)); the share has a noise of 1 / 20.
        assert np.log(after / before) == pytest.approx(-1.0, abs=2 * 6 / 20)
    report = collect(folder(fleet)).client_privacy
    assert report is not None
    assert report.clip_norm < norms[-1]


def test_a_draw_of_nobody_is_noise_alone_and_costs_like_any_other(federation: Start) -> None:
    fleet = federation(count=2)
    private(fleet, noise_multiplier=2.0, sampling_rate=1e-9)
    trainers = join_all(fleet)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    assert not any(trainer.began for trainer in trainers)
    for number in (1, 2):
        before = base_arrays() if number == 1 else fleet.model(number - 1)
        moved = float(np.linalg.norm(flat(fleet.model(number)) - flat(before)))
        assert moved == pytest.approx(2.0 * 0.5 * PARAMETERS**0.5, rel=0.15)
    with fleet.store() as store:
        assert [row.cohort for row in store.rounds()] == [(), ()]
        assert [row.phase for row in store.rounds()] == ["closed", "closed"]
        assert len(noisy_rounds(store)) == 2


def test_secret_draws_take_some_and_every_round_ends(federation: Start) -> None:
    fleet = federation(count=12, up="sq:16", down="sq:4")
    private(fleet, noise_multiplier=2.0, sampling_rate=0.5)
    trainers = join_all(fleet)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    with fleet.store() as store:
        rounds = store.rounds()
        for row in rounds:
            assert sorted(store.updates(row.round)) == list(row.cohort)
        assert all(paid.expected == 1.5 for paid in noisy_rounds(store))
    assert [row.phase for row in rounds] == ["closed"] * 12
    assert len({row.cohort for row in rounds}) > 1
    for name, trainer in zip(fleet.names, trainers, strict=True):
        assert trainer.ended == [row.round for row in rounds if name in row.cohort]
    report = collect(folder(fleet)).client_privacy
    assert report is not None
    assert report.epsilon == pytest.approx(epsilon_pld([Spend(2.0, 0.5, 12)], 1e-5))
    assert report.known_cohorts_epsilon is not None
