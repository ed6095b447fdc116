"""edge_agent.fetching: a model comes whole from the broker, from the disk, or from both."""

import hashlib
from pathlib import Path

import pytest
from memory_link import ADDRESS, MemoryBroker, MemoryLink

from edge_agent.fetching import ModelCache
from federation.errors import PeerError, Rejection
from federation.wire.inbox import LinkEvent, Message
from federation.wire.messages import ObjectRef
from federation.wire.topics import Topics
from federation.wire.transfer import make_ref

TOPICS = Topics("home")
DATA = bytes(range(256)) * 20
REF = make_ref(DATA, 128)
CHUNKS = [DATA[start : start + 128] for start in range(0, len(DATA), 128)]


class Device:
    """A model cache whose link is served by hand: messages wait until :meth:`listen`."""

    def __init__(self, folder: Path, broker: MemoryBroker) -> None:
        self.broker = broker
        self.heard: list[Message] = []
        self.ready: list[str] = []
        self.link: MemoryLink = broker.make_link(ADDRESS, "device", on_event=self.hear)
        self.link.start()
        self.cache = ModelCache(folder, self.link, TOPICS, self.ready.append)

    def hear(self, event: LinkEvent) -> None:
        if isinstance(event, Message):
            self.heard.append(event)

    def listen(self, now: float = 0.0) -> None:
        while self.heard:
            message = self.heard.pop(0)
            chunk = TOPICS.parse_object_chunk(message.topic)
            assert chunk is not None
            self.cache.chunk(*chunk, message.payload, now)


def topic(index: int, ref: ObjectRef = REF) -> str:
    return TOPICS.object_chunk(ref.sha256, index)


def seeded(*, without: tuple[int, ...] = ()) -> MemoryBroker:
    chunks = {topic(index): chunk for index, chunk in enumerate(CHUNKS) if index not in without}
    return MemoryBroker(retained=chunks)


def test_a_model_is_fetched_and_nothing_stays_subscribed(tmp_path: Path) -> None:
    device = Device(tmp_path, seeded())
    device.cache.fetch(REF, 0.0)
    device.listen()
    assert device.ready == [REF.sha256]
    assert device.cache.path(REF.sha256).read_bytes() == DATA
    assert device.link.filters == {}
    assert device.cache.next_wakeup() is None
    assert [path.name for path in tmp_path.iterdir()] == [f"{REF.sha256}.safetensors"]


def test_a_model_on_disk_is_not_fetched_again(tmp_path: Path) -> None:
    device = Device(tmp_path, MemoryBroker())
    device.cache.path(REF.sha256).write_bytes(DATA)
    device.cache.fetch(REF, 0.0)
    assert device.ready == [REF.sha256]


def test_a_damaged_model_on_disk_is_fetched_again(tmp_path: Path) -> None:
    device = Device(tmp_path, seeded())
    device.cache.path(REF.sha256).write_bytes(DATA[:-1] + b"\0")
    device.cache.fetch(REF, 0.0)
    device.listen()
    assert device.ready == [REF.sha256]
    assert device.cache.path(REF.sha256).read_bytes() == DATA


def test_after_power_loss_only_the_rest_is_asked_for(tmp_path: Path) -> None:
    first = Device(tmp_path, seeded(without=(3, 7)))
    first.cache.fetch(REF, 0.0)
    first.listen()
    assert first.ready == []
    broker = seeded()
    second = Device(tmp_path, broker)
    second.cache.fetch(REF, 0.0)
    assert sorted(second.link.filters) == sorted([topic(3), topic(7)])
    second.listen()
    assert second.ready == [REF.sha256]


def test_a_damaged_or_cleared_chunk_is_waited_for(tmp_path: Path) -> None:
    broker = seeded()
    broker.retained[topic(2)] = bytes(128)
    device = Device(tmp_path, broker)
    device.cache.fetch(REF, 0.0)
    device.cache.chunk(REF.sha256, 5, b"", 0.0)
    device.listen()
    assert device.ready == []
    wakeup = device.cache.next_wakeup()
    assert wakeup is not None
    broker.retained[topic(2)] = CHUNKS[2]
    device.cache.tick(wakeup)
    device.listen(wakeup)
    assert device.ready == [REF.sha256]


def test_a_chunk_that_is_published_later_arrives_by_itself(tmp_path: Path) -> None:
    broker = seeded(without=(0,))
    device = Device(tmp_path, broker)
    device.cache.fetch(REF, 0.0)
    device.listen()
    assert device.ready == []
    broker.route("server", topic(0), CHUNKS[0], qos=1, retain=True)
    device.listen()
    assert device.ready == [REF.sha256]


def test_a_lost_link_is_subscribed_anew(tmp_path: Path) -> None:
    broker = seeded(without=(1,))
    device = Device(tmp_path, broker)
    device.cache.fetch(REF, 0.0)
    device.listen()
    broker.cut(device.link)
    broker.restore(device.link)
    broker.retained[topic(1)] = CHUNKS[1]
    device.cache.reconnected(1.0)
    device.listen(1.0)
    assert device.ready == [REF.sha256]


def test_another_model_takes_the_place_of_the_former(tmp_path: Path) -> None:
    broker = seeded()
    device = Device(tmp_path, broker)
    device.cache.fetch(REF, 0.0)
    device.listen()
    other = make_ref(b"another model" * 10, 128)
    device.cache.fetch(other, 0.0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{other.sha256}.part"]
    device.cache.chunk(REF.sha256, 0, CHUNKS[0], 0.0)
    assert sorted(device.link.filters) == sorted([topic(0, other), topic(1, other)])
    device.cache.abandon()
    device.cache.abandon()
    assert device.link.filters == {}


def test_chunks_that_are_promised_but_make_another_whole_are_refused(tmp_path: Path) -> None:
    lying = ObjectRef(
        sha256=hashlib.sha256(b"something else").hexdigest(),
        length=REF.length,
        chunk_bytes=REF.chunk_bytes,
        digests=REF.digests,
    )
    device = Device(tmp_path, MemoryBroker())
    device.cache.fetch(lying, 0.0)
    for index, chunk in enumerate(CHUNKS[:-1]):
        device.cache.chunk(lying.sha256, index, chunk, 0.0)
    with pytest.raises(PeerError) as refused:
        device.cache.chunk(lying.sha256, len(CHUNKS) - 1, CHUNKS[-1], 0.0)
    assert refused.value.code is Rejection.WRONG_HASH
    assert device.ready == []
    assert not list(tmp_path.iterdir())
