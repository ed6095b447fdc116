"""A real server and real agents over a broker in memory: rounds end with the exact average, whatever the weather."""

import threading

import msgspec
import pytest
from memory_federation import NAME, PATIENCE_S, Start, TinyTrainer, eventually
from memory_link import Weather

from edge_agent.training import TrainingError
from federation.errors import ConfigError
from federation.wire.inbox import Message
from federation.wire.messages import (
    AgentState,
    Telemetry,
    encode_json,
)


def test_three_agents_average_exactly(federation: Start) -> None:
    fleet = federation()
    trainers = {name: TinyTrainer() for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    fleet.check()
    assert all(trainer.ended == [1, 2, 3] for trainer in trainers.values())
    eventually(lambda: not list(fleet.folder.glob("pi*/outbox/*")), "outboxes are empty")
    assert not list((fleet.folder / "server" / "updates").rglob("pi*"))


def test_lost_repeated_reordered_and_damaged_messages_change_nothing(federation: Start) -> None:
    weather = Weather(drop=0.03, duplicate=0.2, reorder=0.05, corrupt=0.03)
    fleet = federation(3, weather=weather, count=2)
    trainers = {name: TinyTrainer() for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    fleet.check(2)
    assert all(trainer.ended == [1, 2] for trainer in trainers.values()), "nobody trained twice"


def test_cut_cables_and_a_broker_that_forgets_everything_change_nothing(federation: Start) -> None:
    fleet = federation(count=2)
    gate = threading.Event()
    trainers = {name: TinyTrainer(gate=gate) for name in fleet.names}
    for name, trainer in trainers.items():
        fleet.join(name, trainer)
    _, served = fleet.serve()
    eventually(lambda: all(trainer.began == [1] for trainer in trainers.values()), "all train")
    (cut,) = fleet.broker.links_of("pi0")
    fleet.broker.cut(cut)
    fleet.broker.crash()
    (server,) = fleet.broker.links_of("aggregator")
    fleet.broker.cut(server)
    gate.set()
    eventually(
        lambda: all(trainer.ended == [1] for trainer in trainers.values()), "training goes on without a link"
    )
    fleet.broker.restore(server)
    fleet.broker.restore(cut)
    assert served.result(PATIENCE_S) is True
    fleet.check(2)


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_a_server_that_is_started_again_goes_on_with_the_same_round(federation: Start, encoding: str) -> None:
    fleet = federation(count=1)
    gate = threading.Event()
    for name in fleet.names:
        fleet.join(name, TinyTrainer(gate=gate if name == "pi2" else None))
    service, served = fleet.serve()
    with fleet.store() as store:
        eventually(lambda: sorted(store.updates(1)) == ["pi0", "pi1"], "two have delivered")
    service.stop()
    assert served.result(PATIENCE_S) is False
    # An open round keeps its encoding, whatever the settings say now.
    fleet.config = msgspec.structs.replace(fleet.config, up_encoding=encoding)
    _, again = fleet.serve()
    gate.set()
    assert again.result(PATIENCE_S) is True
    fleet.check(1)


def test_an_agent_that_is_started_again_delivers_what_it_had_trained(federation: Start) -> None:
    fleet = federation(count=1)
    first, second = TinyTrainer(), TinyTrainer()
    agent = fleet.join("pi0", first)
    _, served = fleet.serve()
    others = threading.Event()
    for name in fleet.names[1:]:
        fleet.join(name, TinyTrainer(gate=others))
    eventually(lambda: first.began, "it trains")
    with fleet.store() as store:
        eventually(lambda: sorted(store.updates(1)) == ["pi0"], "it has delivered")
    fleet.leave(agent, "pi0")
    fleet.join("pi0", second)
    others.set()
    assert served.result(PATIENCE_S) is True
    fleet.check(1)
    assert (first.ended, second.began) == ([1], []), "a round with a receipt is not trained again"


def test_an_update_without_a_receipt_survives_the_agent(federation: Start) -> None:
    fleet = federation(count=1)
    gate, server_is_gone = threading.Event(), threading.Event()
    first, second = TinyTrainer(gate=server_is_gone), TinyTrainer()
    agent = fleet.join("pi0", first)
    for name in fleet.names[1:]:
        fleet.join(name, TinyTrainer(gate=gate))
    service, served = fleet.serve()
    eventually(lambda: first.began, "it was invited")
    service.stop()
    assert served.result(PATIENCE_S) is False
    server_is_gone.set()
    eventually(lambda: list(fleet.folder.glob("pi0/outbox/offer")), "its update is on disk")
    fleet.leave(agent, "pi0")
    fleet.join("pi0", second)
    gate.set()
    _, again = fleet.serve()
    assert again.result(PATIENCE_S) is True
    fleet.check(1)
    assert second.began == []


def test_a_round_that_was_declined_is_trained_in_its_next_attempt(federation: Start) -> None:
    fleet = federation(count=1, deadline_s=1.0)
    unlucky = TinyTrainer(faults=[TrainingError("out of memory")])
    fleet.join("pi0", unlucky)
    for name in fleet.names[1:]:
        fleet.join(name, TinyTrainer())
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    fleet.check(1)
    assert (unlucky.began, unlucky.ended) == ([1, 1], [1])


def test_a_chatty_agent_does_not_stop_the_clock(federation: Start) -> None:
    fleet = federation(2, count=1, min_agents=1, quorum=0.5, deadline_s=1.0, cohort_size=2)
    fleet.join("pi0", TinyTrainer())
    fleet.join("pi1", TinyTrainer(gate=threading.Event()))
    eventually(
        lambda: len([topic for topic in fleet.broker.retained if topic.endswith("/state")]) == 2, "births"
    )
    (chatty,) = fleet.broker.links_of("pi1")
    report = encode_json(
        Telemetry(
            session=chatty.client_id[-16:],
            phase="training",
            uptime_s=1,
            cpu_percent=1,
            process_mb=1,
            available_mb=1,
            disk_free_mb=1,
        )
    )
    ended = threading.Event()

    service, served = fleet.serve()

    def chat() -> None:
        while not ended.is_set():
            if len(service._inbox._items) < 50:  # never empty, never full
                chatty.publish(f"fedge/1/{NAME}/agent/pi1/telemetry", report, qos=0)

    talking = fleet.pool.submit(chat)
    try:
        assert served.result(PATIENCE_S) is True
    finally:
        ended.set()
        talking.result()
    with fleet.store() as store:
        assert sorted(store.updates(1)) == ["pi0"]


def test_the_second_process_under_one_name_ends_the_first(federation: Start) -> None:
    fleet = federation(1)
    fleet.join("pi0", TinyTrainer())
    first = fleet.agents["pi0"]
    eventually(lambda: fleet.broker.retained, "a birth")
    fleet.folder = fleet.folder / "copy"
    fleet.join("pi0", TinyTrainer())
    with pytest.raises(ConfigError, match="another process runs as 'pi0'"):
        first.result(PATIENCE_S)


def test_the_birth_of_an_earlier_life_that_the_broker_delivers_late_ends_nobody(federation: Start) -> None:
    fleet = federation(1)
    fleet.join("pi0", TinyTrainer())
    eventually(lambda: fleet.broker.retained, "a birth")
    (link,) = fleet.broker.links_of("pi0")
    earlier = encode_json(AgentState(state="online", session="0" * 16))
    fleet.broker.deliver(link, Message(f"fedge/1/{NAME}/agent/pi0/state", earlier, retain=True), 1)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    assert not fleet.agents["pi0"].done()


def test_a_revoked_agent_is_not_invited_any_more(federation: Start) -> None:
    fleet = federation(3, count=2, min_agents=2, cohort_size=3, gather_s=0.5, quorum=0.5, grace_s=0.2)
    gate = threading.Event()
    for name in fleet.names:
        fleet.join(name, TinyTrainer(gate=gate))
    _, served = fleet.serve()
    with fleet.store() as store:
        eventually(lambda: store.rounds() and len(store.rounds()[0].cohort) == 3, "a round is open")
        fleet.enrolment.revoke("pi2")
        fleet.broker.cut(fleet.broker.links_of("pi2")[0])
        gate.set()
        eventually(lambda: len(store.rounds()) == 2, "the next round")
        assert store.rounds()[1].cohort == ("pi0", "pi1")
    assert served.result(PATIENCE_S) is True
