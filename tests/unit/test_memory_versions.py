"""Deltas down and lossy updates up, over a broker in memory: all ends hold the same bits, and fetch as little as they can."""

import threading
from dataclasses import dataclass, field

import msgspec
import pytest
from memory_federation import KEEP, NAME, PATIENCE_S, SEED, Federation, Start, TinyTrainer, eventually
from memory_link import MemoryLink, Weather
from safetensors.numpy import load_file

from aggregator.store import Store
from aggregator.versions import remember_seed
from edge_agent.agent import Agent
from federation.wire.topics import Topics
from federation.wire.versions import model_digest

TOPICS = Topics(NAME)


def fetched(link: MemoryLink) -> int:
    """Bytes of models and deltas that were delivered to it."""
    return sum(size for topic, size in link.heard if TOPICS.parse_object_chunk(topic) is not None)


@dataclass
class Device:
    """One agent's lives."""

    fleet: Federation
    name: str
    trainer: TinyTrainer = field(default_factory=TinyTrainer)
    agent: Agent | None = None
    link: MemoryLink | None = None

    def join(self) -> None:
        self.agent = self.fleet.join(self.name, self.trainer)
        eventually(lambda: self.fleet.broker.links_of(f"{NAME}-{self.name}-"), "it is connected")
        (self.link,) = self.fleet.broker.links_of(f"{NAME}-{self.name}-")

    def leave(self) -> None:
        assert self.agent is not None
        self.fleet.leave(self.agent, self.name)

    def last_base(self) -> int:
        """Number of the version that it keeps: what its last round started from."""
        return max(self.trainer.bases) - 1


def play(fleet: Federation, devices: list[Device], until: int) -> dict[str, int]:
    """Rounds up to ``until`` with these devices, all online; bytes that each fetched."""
    before = {device.name: fetched(device.link) for device in devices if device.link is not None}
    rounds = msgspec.structs.replace(fleet.config.rounds, count=until, min_agents=len(devices))
    fleet.config = msgspec.structs.replace(fleet.config, rounds=rounds)
    _, served = fleet.serve()
    assert served.result(PATIENCE_S) is True
    for device in devices:
        assert device.trainer.bases[until] == digest(fleet, until - 1), f"{device.name} in round {until}"
    return {
        device.name: fetched(device.link) - before[device.name]
        for device in devices
        if device.link is not None
    }


def digest(fleet: Federation, number: int) -> str:
    return model_digest(fleet.model(number))


def length(store: Store, first: int, last: int) -> int:
    """Of the deltas that lead to these versions."""
    return sum(store.delta_path(number).stat().st_size for number in range(first, last + 1))


def by_full_model(fleet: Federation, number: int) -> int:
    """What a newcomer fetches to get to a version: the key frame, and the deltas since."""
    with fleet.store() as store:
        key = int(store.recall("key_frame") or 0)
        return store.checkpoint_path(key).stat().st_size + length(store, key + 1, number)


def by_deltas(fleet: Federation, held: int, number: int) -> int:
    with fleet.store() as store:
        return length(store, held + 1, number)


def test_all_ends_hold_the_same_version_bit_for_bit(federation: Start) -> None:
    fleet = federation(3, up="sq:16", down="sq:4")
    devices = [Device(fleet, name) for name in fleet.names]
    for device in devices:
        device.join()
    rounds = 6
    play(fleet, devices, rounds)
    versions = [digest(fleet, number) for number in range(rounds + 1)]
    assert len(set(versions)) == rounds + 1, "every round has changed the model"
    for device in devices:
        assert [device.trainer.bases[number] for number in range(1, rounds + 1)] == versions[:-1]
        kept = fleet.folder / device.name / "objects" / f"{versions[-2]}.safetensors"
        expected = fleet.model(rounds - 1)
        assert {name: array.tobytes() for name, array in load_file(kept).items()} == {
            name: array.tobytes() for name, array in expected.items()
        }
    with fleet.store() as store:
        recorded = [store.version(number) for number in range(rounds + 1)]
    assert [version and version.digest for version in recorded] == versions


def test_who_missed_some_rounds_gets_there_the_cheapest_way(federation: Start) -> None:
    fleet = federation(4, up="sq:16", down="sq:4")
    stays, also_stays, guest, newcomer = (Device(fleet, name) for name in fleet.names)
    always = [stays, also_stays]
    for device in (*always, guest):
        device.join()
    full = play(fleet, [*always, guest], 1)
    assert set(full.values()) == {by_full_model(fleet, 0)}, "all are new, and no seed is known"
    for missed in (0, 1, KEEP - 1, KEEP, KEEP + 1):
        guest.leave()
        held, last = guest.last_base(), guest.last_base() + 1
        if missed:
            play(fleet, always, last + missed)
        guest.join()
        base = last + missed
        cost = play(fleet, [*always, guest], base + 1)
        one_delta = by_deltas(fleet, base - 1, base)
        assert (cost[stays.name], cost[also_stays.name]) == (one_delta, one_delta)
        if missed < KEEP:
            assert cost[guest.name] == by_deltas(fleet, held, base), f"{missed} rounds missed"
            assert cost[guest.name] < by_full_model(fleet, base)
        else:
            assert cost[guest.name] == by_full_model(fleet, base), f"{missed} rounds missed"
    newcomer.join()
    last = guest.last_base() + 1
    cost = play(fleet, [*always, guest, newcomer], last + 1)
    assert cost[newcomer.name] == by_full_model(fleet, last)
    assert cost[guest.name] == by_deltas(fleet, last - 1, last)


def test_what_can_be_built_is_not_sent(federation: Start) -> None:
    fleet = federation(3, up="sq:16", down="sq:4")
    with fleet.store() as store:
        remember_seed(store, SEED)
    first, second, newcomer = (Device(fleet, name) for name in fleet.names)
    for device in (first, second):
        device.join()
    assert set(play(fleet, [first, second], 1).values()) == {0}
    newcomer.join()
    cost = play(fleet, [first, second, newcomer], 2)
    assert set(cost.values()) == {by_deltas(fleet, 0, 1)}, "also a newcomer's, in the second round"
    assert [device.trainer.built for device in (first, second, newcomer)] == [[SEED]] * 3


def test_a_machine_that_builds_another_model_fetches_it_and_does_not_try_again(federation: Start) -> None:
    fleet = federation(2, up="sq:16", down="sq:4")
    with fleet.store() as store:
        remember_seed(store, SEED + 1)
    devices = [Device(fleet, name) for name in fleet.names]
    for device in devices:
        device.join()
    assert set(play(fleet, devices, 1).values()) == {by_full_model(fleet, 0)}
    assert set(play(fleet, devices, 2).values()) == {by_deltas(fleet, 0, 1)}
    assert [device.trainer.built for device in devices] == [[SEED + 1]] * 2


@pytest.mark.parametrize("down", ["sq:4", "full"])
def test_neither_weather_nor_a_restart_changes_a_bit(federation: Start, down: str) -> None:
    rounds = 3
    calm = federation(3, up="sq:16", down=down)
    for name in calm.names:
        calm.join(name, TinyTrainer())
    _, served = calm.serve()
    assert served.result(PATIENCE_S) is True

    rough = federation(
        3,
        weather=Weather(drop=0.03, duplicate=0.2, reorder=0.05, corrupt=0.03),
        seed=1,
        up="sq:16",
        down=down,
    )
    gate = threading.Event()
    trainers = {name: TinyTrainer(gate=gate if name == "pi2" else None) for name in rough.names}
    for name, trainer in trainers.items():
        rough.join(name, trainer)
    service, served = rough.serve()
    with rough.store() as store:
        eventually(lambda: sorted(store.updates(1)) == ["pi0", "pi1"], "two have delivered")
    service.stop()
    assert served.result(PATIENCE_S) is False
    _, served = rough.serve()
    gate.set()
    assert served.result(PATIENCE_S) is True
    assert [digest(rough, number) for number in range(rounds + 1)] == [
        digest(calm, number) for number in range(rounds + 1)
    ]
    assert all(trainer.ended == [1, 2, 3] for trainer in trainers.values()), "nobody trained twice"
