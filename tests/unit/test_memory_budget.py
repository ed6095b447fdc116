"""Rounds that cost privacy: every device pays before it trains, says what it spent, and stops at its limit."""

import threading

from memory_federation import NAME, PATIENCE_S, SAMPLES, Federation, Start, TinyTrainer, eventually

from aggregator.privacy_config import PrivacyConfig, SampleConfig
from aggregator.spending import last_spent
from aggregator.status import collect
from edge_agent.config import PrivacyLimits
from edge_agent.guard import owner_of
from privacy.accounting import Spend, epsilon_pld
from privacy.budget import steps_of
from privacy.ledger import read_entries
from privacy.ledger_format import Entry

NOISE = PrivacyConfig(sample=SampleConfig(noise_multiplier=1.0, clip_norm=2.0))
DELTA = NOISE.sample.delta


def ledger(fleet: Federation, name: str) -> tuple[Entry, ...]:
    return read_entries(fleet.folder / name / "ledger", owner_of(fleet.bundles[name]))


def epsilon(entries: tuple[Entry, ...]) -> float:
    return epsilon_pld([entry.spend for entry in entries], DELTA)


def test_what_is_trained_is_what_was_paid_and_what_is_told(federation: Start) -> None:
    fleet = federation(2, privacy=NOISE)
    trainers = {name: TinyTrainer() for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True

    with fleet.store() as store:
        told = last_spent(store)
        assert [update.samples for update in store.updates(3).values()] == [1, 1]
        assert {update.metrics.loss for update in store.updates(3).values()} == {None}
    for name, trainer in trainers.items():
        entries = ledger(fleet, name)
        assert [entry.round for entry in entries] == [1, 2, 3]
        assert [private and private.spend for private in trainer.private] == [
            entry.spend for entry in entries
        ]
        assert {(entry.noise_multiplier, entry.clip_norm, entry.delta) for entry in entries} == {
            (1.0, 2.0, DELTA)
        }
        assert entries[0].sample_rate == 32 / SAMPLES
        spent = told[name].spent
        assert spent.epsilon == epsilon(entries)
        assert spent.round_epsilon == epsilon(entries[:1])
        assert (spent.entry, told[name].went_back) == (3, False)


def test_a_device_at_its_limit_says_so_and_stays(federation: Start) -> None:
    fleet = federation(count=3, min_agents=2, cohort_size=3, gather_s=30, quorum=0.5, privacy=NOISE)
    thrifty = TinyTrainer()
    rate, steps = steps_of(SAMPLES, fleet.config.train.batch_size, fleet.config.train.epochs, 0)
    one_round = epsilon_pld([Spend(NOISE.sample.noise_multiplier, rate, steps)], DELTA)
    agent = fleet.join("pi0", thrifty, limits=PrivacyLimits(max_epsilon=one_round * 1.01))
    for name in fleet.names[1:]:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True

    assert thrifty.ended == [1], "the second round does not fit"
    assert [entry.round for entry in ledger(fleet, "pi0")] == [1]
    report = collect(fleet.folder / "server")
    assert report.federation == NAME
    assert {(row["round"], row["agent"], row["code"]) for row in report.declines} == {
        (2, "pi0", "budget"),
        (3, "pi0", "budget"),
    }
    assert f"allows {one_round * 1.01:g}" in report.declines[0]["reason"]
    fleet.leave(agent, "pi0")  # raises what has ended the agent before


def test_a_round_that_is_trained_again_is_paid_again(federation: Start) -> None:
    fleet = federation(2, privacy=NOISE, count=1)
    gate = threading.Event()
    first = TinyTrainer(gate=gate)
    agent = fleet.join("pi0", first)
    fleet.join("pi1", TinyTrainer())
    _, served = fleet.serve()
    eventually(lambda: first.began, "the first training")
    fleet.leave(agent, "pi0")  # in the middle of it
    again = TinyTrainer()
    fleet.join("pi0", again)
    assert served.result(PATIENCE_S) is True
    assert not first.ended
    assert [(entry.number, entry.round) for entry in ledger(fleet, "pi0")] == [(1, 1), (2, 1)]
    with fleet.store() as store:
        assert last_spent(store)["pi0"].spent.epsilon == epsilon(ledger(fleet, "pi0"))


def test_a_damaged_ledger_trains_nothing(federation: Start) -> None:
    fleet = federation(count=1, min_agents=2, cohort_size=3, gather_s=30, quorum=0.5, privacy=NOISE)
    folder = fleet.folder / "pi0" / "ledger"
    folder.mkdir(parents=True)
    (folder / "entries").write_bytes(b"not a ledger\n")
    trainer = TinyTrainer()
    fleet.join("pi0", trainer)
    for name in fleet.names[1:]:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    assert not trainer.began
    (decline,) = collect(fleet.folder / "server").declines
    assert (decline["agent"], decline["code"]) == ("pi0", "fault")
    assert "is damaged" in decline["reason"]
