"""Masked sums over a broker in memory: real server, real agents, to the bit the plain sum of their integers."""

import numpy as np
import pytest
from masked_federation import Recorder, at_message, check_sums, kind_of, masked, vanish
from memory_federation import NAME, PATIENCE_S, Start, TinyTrainer, base_arrays, eventually
from memory_link import Weather

from federation.wire.masking import Reveal, body_up
from federation.wire.topics import Topics


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


def test_a_sum_that_too_few_open_is_skipped_and_the_run_goes_on(federation: Start) -> None:
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


@pytest.mark.parametrize("when", ["keys", "shares", "offer", "agreement", "reveal"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_server_that_dies_goes_on_with_the_same_attempt(
    federation: Start, recorder: Recorder, when: str, count: int
) -> None:
    fleet = masked(federation(4, count=1, min_agents=4, gather_s=0))
    trainers = {name: TinyTrainer() for name in fleet.names}
    service, served = fleet.serve()
    dies = at_message(fleet, when, count, service.stop)
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    assert served.result(PATIENCE_S) is False
    assert dies.is_set()
    _, again = fleet.serve()
    assert again.result(PATIENCE_S) is True
    check_sums(fleet, recorder, {1: fleet.names})
    assert all(trainer.ended == [1] for trainer in trainers.values())
    with fleet.store() as store:
        assert store.rounds()[0].attempt == 1
    assert not list((fleet.folder / "server" / "secagg").iterdir())


@pytest.mark.parametrize("when", ["keys", "shares", "offer", "agreement", "reveal"])
def test_an_agent_that_is_started_again_counts_as_vanished(
    federation: Start, recorder: Recorder, when: str
) -> None:
    # Nobody waits for it, though it is back long before its grace is over.
    fleet = masked(federation(6, **SIX | {"grace_s": 600.0}), min_agents=4)
    agent = fleet.join("pi1", TinyTrainer())
    died = at_message(fleet, when, 1, agent.stop, of="pi1")
    for name in fleet.names:
        if name != "pi1":
            fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    eventually(died.is_set, "it dies")
    fleet.agents.pop("pi1").result(PATIENCE_S)
    again = TinyTrainer()
    fleet.join("pi1", again)
    assert served.result(PATIENCE_S) is True
    with fleet.store() as store:
        names = sorted(store.updates(1))
        assert store.rounds()[0].attempt == 1
    assert set(names) >= set(fleet.names) - {"pi1"}
    assert ("pi1" in names) == (when in ("agreement", "reveal")) or when in ("keys", "offer")
    check_sums(fleet, recorder, {1: names})


def test_bad_weather_changes_nothing(federation: Start, recorder: Recorder) -> None:
    weather = Weather(drop=0.03, duplicate=0.2, reorder=0.05, corrupt=0.03)
    fleet = masked(federation(4, weather=weather, count=1))
    for name in fleet.names:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    check_sums(fleet, recorder, {1: fleet.names})


def test_nothing_that_the_aggregator_received_or_stored_contains_an_agents_integers(
    federation: Start, recorder: Recorder
) -> None:
    fleet = masked(federation(6, **SIX), min_agents=4)
    vanish(fleet, ["pi4"], "offer")
    service, served = fleet.serve()
    # It stops with most reveals on its disk: never again does it know as much of single agents.
    at_message(fleet, "reveal", 5, service.stop)
    for name in fleet.names:
        fleet.join(name, TinyTrainer())
    assert served.result(PATIENCE_S) is False
    files = [path.read_bytes() for path in (fleet.folder / "server").rglob("*") if path.is_file()]
    _, again = fleet.serve()
    assert again.result(PATIENCE_S) is True
    others = [name for name in fleet.names if name != "pi4"]
    check_sums(fleet, recorder, {1: others})
    with fleet.store() as store:
        updates = store.updates(1)
    received = [
        payload for _, topic, payload in fleet.broker.log if "/up/" in topic or topic.endswith("/state")
    ]
    files += [path.read_bytes() for path in (fleet.folder / "server").rglob("*") if path.is_file()]
    held = [*received, *files]
    assert any(b"\x00masked" in data or b"masked:16" in data for data in held), (
        "it is looked where it would be"
    )
    assert len(recorder.plain) == 6
    for plain in recorder.plain.values():
        whole = plain.tobytes()
        windows = [whole[at : at + 24] for at in range(0, len(whole) - 24, 2)]
        for data in held:
            assert not any(window in data for window in windows if len(set(window)) > 6)
    for name in others:
        assert updates[name].samples == 1
        assert updates[name].metrics.loss is None
        assert updates[name].metrics.accuracy is None
    bodies = [
        body_up(payload) for _, topic, payload in fleet.broker.log if kind_of(topic, payload) == "reveal"
    ]
    reveals = [body for body in bodies if isinstance(body, Reveal)]
    seeds = {owner for reveal in reveals for owner in reveal.seeds}
    keys = {owner for reveal in reveals for owner in reveal.keys}
    assert (seeds, keys) == (set(others), {"pi4"}), "never both secrets of one agent"


def test_what_is_sent_looks_like_noise(federation: Start, recorder: Recorder) -> None:
    fleet = masked(federation(3, count=1), min_agents=2)
    for name in fleet.names:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    chunks: dict[str, bytes] = {}
    for _, topic, payload in fleet.broker.log:
        parsed = Topics(NAME).parse_agent(topic)
        if parsed is not None and parsed.kind == "chunk":
            chunks[parsed.sha256] = chunks.get(parsed.sha256, b"") + payload
    assert set(chunks) == set(recorder.plain)
    for digest, data in chunks.items():
        sent, plain = np.frombuffer(data, "<u2"), recorder.plain[digest]
        assert abs(np.corrcoef(sent, plain.astype("<i2"))[0, 1]) < 0.15
        assert abs(sent.mean() / 2**16 - 0.5) < 0.05
        # Differences of two agents' updates are noise as well: no mask is used twice.
    one, other, _ = (np.frombuffer(data, "<u2") for data in chunks.values())
    assert np.unique(one - other).size > 0.9 * one.size
