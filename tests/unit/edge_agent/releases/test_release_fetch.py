"""edge_agent.releases.release_fetch: a release comes whole into a slot, or its failure is told."""

import errno
import os
from pathlib import Path

import msgspec
import pytest
from memory_link import ADDRESS, MemoryBroker, MemoryLink
from release_authority import Authority

from edge_agent.releases.release_fetch import ReleaseFetch
from edge_agent.releases.rollout_events import Failed, Fetch, Fetched, Offer
from edge_agent.releases.slots import Slots
from federation.errors import ReleaseFault
from federation.task.model_delta import make_delta
from federation.wire.inbox import LinkEvent, Message
from federation.wire.release import Release
from federation.wire.topics import Topics

TOPICS = Topics("garden")


class Device:
    """A fetch whose link is served by hand: messages wait until :meth:`listen`."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority()
        self.broker = MemoryBroker()
        self.heard: list[Message] = []
        self.told: list[Fetched | Failed] = []
        self.slots = Slots(folder)
        self.link: MemoryLink = self.broker.make_link(ADDRESS, "device", on_event=self.hear)
        self.link.start()
        self.fetch = ReleaseFetch(self.slots, self.link, TOPICS, self.told.append, None)

    def hear(self, event: LinkEvent) -> None:
        if isinstance(event, Message):
            self.heard.append(event)

    def listen(self, now: float = 0.0) -> None:
        while self.heard:
            message = self.heard.pop(0)
            chunk = TOPICS.parse_object_chunk(message.topic)
            assert chunk is not None
            self.fetch.chunk(*chunk, message.payload, now)

    def seed(self, release: Release) -> None:
        self.broker.retained |= dict(self.authority.chunks(release))

    def offer(self, release: Release) -> Offer:
        manifest = self.authority.manifest(release)
        return Offer(release, manifest.version, self.authority.sign(manifest))

    def begin(self, release: Release, *, delta: bool = False) -> None:
        self.fetch.begin(Fetch(self.offer(release), release.delta if delta else None), 0.0)
        self.listen()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "models")


def test_a_release_comes_into_a_slot_and_what_is_there_is_not_fetched_again(device: Device) -> None:
    release = device.authority.release(1)
    device.seed(release)
    device.begin(release)
    assert device.told == [Fetched(release.model.sha256)]
    slot = device.slots.find(release.model.sha256)
    assert slot is not None
    device.slots.check(slot)
    assert device.link.filters == {}
    assert device.fetch.next_wakeup() is None
    device.broker.retained.clear()
    device.begin(release)
    assert len(device.told) == 2


def test_a_delta_saves_the_model(device: Device) -> None:
    first = device.authority.release(1)
    device.seed(first)
    device.begin(first)
    old = device.authority.objects[first.model.sha256]
    new = old + b"a few bytes more"
    second = device.authority.release(2, model=new, delta=(first.model.sha256, make_delta(old, new)))
    device.seed(second)
    device.link.heard.clear()
    device.begin(second, delta=True)
    assert device.told[-1] == Fetched(second.model.sha256)
    assert not [topic for topic, _ in device.link.heard if second.model.sha256 in topic]


@pytest.mark.parametrize("rubbish", [b"no delta at all", b"FEDGEDLT" * 50])
def test_a_delta_that_leads_nowhere_is_told_as_a_wrong_hash_so_that_the_whole_is_fetched(
    device: Device, rubbish: bytes
) -> None:
    first = device.authority.release(1)
    device.seed(first)
    device.begin(first)
    second = device.authority.release(2, delta=(first.model.sha256, rubbish))
    device.seed(second)
    device.begin(second, delta=True)
    failed = device.told[-1]
    assert isinstance(failed, Failed)
    assert failed.fault is ReleaseFault.WRONG_HASH
    device.begin(second)
    assert device.told[-1] == Fetched(second.model.sha256)


def test_chunks_that_match_and_a_whole_that_does_not_are_a_wrong_hash(device: Device) -> None:
    release = device.authority.release(1)
    lying = device.authority.put(b"something else" * 50)
    model = msgspec.structs.replace(lying, sha256="ab" * 32)
    release = msgspec.structs.replace(release, model=model)
    device.authority.objects[model.sha256] = b"something else" * 50
    device.seed(release)
    device.begin(release)
    failed = device.told[-1]
    assert isinstance(failed, Failed)
    assert failed.fault is ReleaseFault.WRONG_HASH
    assert device.slots.find(model.sha256) is None


def test_a_full_disk_is_told_and_what_came_is_kept_for_the_next_try(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = device.authority.release(1)
    device.seed(release)
    writes = 0
    pwrite = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    device.begin(release)
    failed = device.told[-1]
    assert isinstance(failed, Failed)
    assert failed.fault is ReleaseFault.NO_SPACE
    assert device.link.filters == {}
    monkeypatch.setattr(os, "pwrite", pwrite)
    device.link.heard.clear()
    device.begin(release)
    assert device.told[-1] == Fetched(release.model.sha256)
    chunks = release.golden.chunks + release.model.chunks
    assert len(device.link.heard) == chunks - 3


def test_a_lost_link_is_subscribed_anew(device: Device) -> None:
    release = device.authority.release(1)
    device.begin(release)
    device.broker.cut(device.link)
    device.seed(release)
    device.broker.restore(device.link)
    device.fetch.reconnected(1.0)
    device.listen(1.0)
    assert device.told == [Fetched(release.model.sha256)]


def test_what_is_given_up_stays_on_disk_and_leaves_no_subscription(device: Device) -> None:
    release = device.authority.release(1)
    device.begin(release)
    assert release.model.sha256 in device.fetch.objects
    assert device.link.filters
    device.fetch.stop()
    device.fetch.stop()
    assert device.link.filters == {}
    assert device.fetch.objects == frozenset()
    device.seed(release)
    device.fetch.chunk(release.golden.sha256, 0, b"late", 0.0)
    assert device.told == []
