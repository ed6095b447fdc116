"""aggregator.seeding: the broker holds the newest models whole, whatever it has lost or kept from before."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_link import ADDRESS, MemoryBroker

from aggregator.seeding import Seeder
from aggregator.store import Store
from federation.wire.inbox import LinkEvent, Message
from federation.wire.messages import ObjectRef
from federation.wire.objects import ref_of_file
from federation.wire.topics import Topics

TOPICS = Topics("home")
PATIENCE_S = 20.0


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


class Server:
    """A seeder on a link whose messages are handed to it as the service does."""

    def __init__(self, folder: Path, broker: MemoryBroker) -> None:
        self.broker = broker
        self.present: list[str] = []
        self.link = broker.make_link(ADDRESS, "server", on_event=self.hear)
        self.link.start()
        self.store = Store(folder, "home", create=True)
        self.seeder = Seeder(self.link, TOPICS, self.store, self.present.append)

    def hear(self, event: LinkEvent) -> None:
        chunk = TOPICS.parse_object_chunk(event.topic) if isinstance(event, Message) else None
        if chunk is not None and isinstance(event, Message):
            self.seeder.arrived(chunk[0], event.payload)

    def wants(self, number: int, chunk_bytes: int = 64) -> ObjectRef:
        path = self.store.checkpoint_path(number)
        path.write_bytes(bytes([number]) * 1000)
        ref = ref_of_file(path, chunk_bytes)
        before = len(self.present)
        self.seeder.want(path, ref)
        eventually(lambda: len(self.present) > before, "the broker holds it")
        assert self.present[-1] == ref.sha256
        return ref

    def close(self) -> None:
        self.seeder.stop()
        self.store.close()


Start = Callable[[], Server]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Start]:
    broker = MemoryBroker()
    started: list[Server] = []

    def start() -> Server:
        started.append(Server(tmp_path, broker))
        return started[-1]

    yield start
    for one in started:
        one.close()


def held(broker: MemoryBroker) -> dict[str, int]:
    """Bytes per object on the broker."""
    sizes: dict[str, int] = {}
    for topic, payload in list(broker.retained.items()):
        chunk = TOPICS.parse_object_chunk(topic)
        assert chunk is not None
        sizes[chunk[0]] = sizes.get(chunk[0], 0) + len(payload)
    return sizes


def test_the_two_newest_models_are_kept_and_older_ones_cleared(server: Start) -> None:
    one = server()
    first, second, third = (one.wants(number) for number in range(3))
    eventually(lambda: first.sha256 not in held(one.broker), "the oldest is cleared")
    assert held(one.broker) == {second.sha256: 1000, third.sha256: 1000}


def test_what_an_earlier_process_left_is_cleared_one_day(server: Start) -> None:
    first = server()
    old = first.wants(0)
    first.close()
    second = server()
    assert old.sha256 in held(second.broker)
    new = second.wants(1)
    eventually(lambda: held(second.broker) == {new.sha256: 1000}, "the old one is cleared")


def test_after_a_reconnect_only_what_was_lost_is_sent_again(server: Start) -> None:
    one = server()
    ref = one.wants(0)
    sent = len(one.broker.log)
    one.seeder.connected()
    eventually(lambda: len(one.present) == 2, "it was looked for")
    assert len(one.broker.log) == sent, "the broker had kept it"
    one.broker.crash()
    one.seeder.connected()
    eventually(lambda: len(one.present) == 3, "it was sent again")
    assert held(one.broker) == {ref.sha256: 1000}


@pytest.mark.parametrize("chunk_bytes", [64, 128, 250])
def test_a_model_that_is_cut_anew_after_a_restart_is_sent_anew(server: Start, chunk_bytes: int) -> None:
    first = server()
    old = first.wants(0, chunk_bytes=100)
    first.close()
    second = server()
    ref = second.wants(0, chunk_bytes=chunk_bytes)
    assert ref.sha256 == old.sha256
    for index in range(ref.chunks):
        assert len(second.broker.retained[TOPICS.object_chunk(ref.sha256, index)]) in (
            chunk_bytes,
            1000 % chunk_bytes,
        )


def test_a_model_that_is_cut_anew_is_not_cleared_as_its_former_self(server: Start) -> None:
    one = server()
    one.wants(0, chunk_bytes=100)
    again = one.wants(0, chunk_bytes=128)
    later = one.wants(1)
    last = one.wants(2)
    eventually(
        lambda: held(one.broker) == {later.sha256: 1000, last.sha256: 1000}, "only the oldest is cleared"
    )
    assert again.sha256 not in held(one.broker)
