"""aggregator.releases.manifests: what a channel says is signed anew when it changes, gets old, or the keys do."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_link import ADDRESS, MemoryBroker
from releases import add_release

from aggregator.releases.keys import ReleaseKeys
from aggregator.releases.manifests import LOOK_S, RENEW_SHARE, ReleaseManifests
from aggregator.releases.rollout_events import Announce
from aggregator.releases.store import ReleaseStore
from aggregator.store import Store
from federation.errors import ReleaseError, ReleaseFault
from federation.release import SignedManifest, open_manifest
from federation.wire.release import Channel, Release
from federation.wire.topics import Topics

TOPICS = Topics("home")
DAYS = 90.0
DAY_S = 86400.0
CANARY, STABLE = Channel.CANARY, Channel.STABLE


class Publisher:
    """Manifests of a store over a broker in memory, with both clocks in hand."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.now, self.wall = 100.0, time.time()
        monkeypatch.setattr(time, "time", lambda: self.wall)
        self.database = Store(folder / "state", "home", create=True)
        self.store = ReleaseStore(self.database)
        self.keys = ReleaseKeys(folder / "state")
        self.pinned = self.keys.present.public_key(), self.keys.successor
        self.broker = MemoryBroker()
        self.link = self.broker.make_link(ADDRESS, "server", on_event=lambda _: None)
        self.link.start()
        self.present: set[int] = set()
        self.start()

    def start(self) -> None:
        self.manifests = ReleaseManifests(self.store, TOPICS, self.keys, DAYS, self.link)

    def announce(self, channel: Channel, number: int | None, share: float = 1.0) -> None:
        self.store.carry_out([Announce(channel, number, share, 1)])
        self.manifests.changed()
        self.refresh()

    def refresh(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.wall += seconds
        self.manifests.refresh(self.now, lambda release: release.number in self.present)

    def add(self) -> Release:
        release = add_release(self.store, self.folder).release
        self.present.add(release.number)
        return release

    def reads(self, channel: Channel) -> SignedManifest | None:
        """As a device that was enrolled at the beginning."""
        payload = self.broker.retained.get(TOPICS.release(channel.value))
        if payload is None:
            return None
        return open_manifest(payload, federation="home", keys=self.pinned, channel=channel)

    def read(self, channel: Channel) -> SignedManifest:
        signed = self.reads(channel)
        assert signed is not None
        return signed

    def settled(self) -> bool:
        return self.manifests.settled

    def published(self, channel: Channel) -> int:
        return sum(topic == TOPICS.release(channel.value) for _, topic, _ in self.broker.log)


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    one = Publisher(tmp_path, monkeypatch)
    yield one
    one.database.close()


def test_a_channel_without_a_release_says_nothing(publisher: Publisher) -> None:
    publisher.refresh()
    assert publisher.broker.log == []
    assert publisher.settled()


def test_a_manifest_says_what_was_announced_and_pins_the_successor(publisher: Publisher) -> None:
    release = publisher.add()
    publisher.announce(STABLE, 1)
    signed = publisher.read(STABLE)
    manifest = signed.manifest
    assert signed.signer == 0
    assert manifest.release == release
    assert manifest.share == 1
    assert manifest.issued_at == publisher.wall
    assert manifest.expires_at == publisher.wall + DAYS * DAY_S
    assert manifest.next_key == publisher.keys.pair().successor.public_bytes_raw()


def test_it_is_published_once_more_and_then_left_alone(publisher: Publisher) -> None:
    """nats-server may have delivered only the former one to somebody who subscribed just then."""
    publisher.add()
    publisher.announce(STABLE, 1)
    assert publisher.published(STABLE) == 1
    assert not publisher.settled()
    while not publisher.settled():
        publisher.refresh(publisher.manifests.due - publisher.now)
    assert publisher.published(STABLE) == 2
    version = publisher.read(STABLE).manifest.version
    for _ in range(10):
        publisher.refresh(LOOK_S)
    assert publisher.published(STABLE) == 2
    assert publisher.read(STABLE).manifest.version == version


def test_it_waits_until_the_broker_holds_the_objects(publisher: Publisher) -> None:
    publisher.add()
    publisher.present.clear()
    publisher.announce(STABLE, 1)
    assert publisher.reads(STABLE) is None
    assert publisher.manifests.held == {1}
    publisher.present.add(1)
    publisher.manifests.changed()
    publisher.refresh()
    assert publisher.read(STABLE).manifest.release is not None
    assert publisher.manifests.held == set()


def test_emptying_a_channel_and_other_shares_wait_for_no_objects(publisher: Publisher) -> None:
    publisher.add()
    publisher.announce(CANARY, 1, 0.1)
    publisher.present.clear()
    publisher.announce(CANARY, 1, 0.5)
    assert publisher.read(CANARY).manifest.share == 0.5
    publisher.announce(CANARY, None, 0.0)
    assert publisher.read(CANARY).manifest.release is None


def test_versions_rise_over_both_channels(publisher: Publisher) -> None:
    publisher.add()
    publisher.add()
    versions = []
    for channel, number, share in ((STABLE, 1, 1.0), (CANARY, 2, 0.1), (CANARY, 2, 0.3), (STABLE, 2, 1.0)):
        publisher.announce(channel, number, share)
        versions.append(publisher.read(channel).manifest.version)
    assert versions == sorted(set(versions))


def test_it_is_renewed_long_before_it_expires(publisher: Publisher) -> None:
    publisher.add()
    publisher.announce(STABLE, 1)
    first = publisher.read(STABLE).manifest
    publisher.refresh(RENEW_SHARE * DAYS * DAY_S - 1)
    assert publisher.read(STABLE).manifest == first
    publisher.refresh(LOOK_S)
    renewed = publisher.read(STABLE).manifest
    assert renewed.version > first.version
    assert renewed.release == first.release
    assert renewed.expires_at == publisher.wall + DAYS * DAY_S


def test_one_that_was_signed_while_the_clock_was_in_the_past_is_signed_again_when_it_is_right(
    publisher: Publisher,
) -> None:
    """A server without a battery for its clock."""
    publisher.add()
    right, publisher.wall = publisher.wall, 1000.0
    publisher.announce(STABLE, 1)
    assert publisher.read(STABLE).manifest.expires_at < right
    publisher.wall = right
    publisher.refresh(LOOK_S)
    assert publisher.read(STABLE).manifest.expires_at > right


def test_the_next_server_goes_on_with_the_same_manifest_unless_a_channel_has_changed(
    publisher: Publisher,
) -> None:
    publisher.add()
    publisher.add()
    publisher.announce(STABLE, 1)
    version = publisher.read(STABLE).manifest.version
    publisher.start()
    publisher.refresh()
    assert publisher.read(STABLE).manifest.version == version
    # a server that was killed between a decision and its manifest
    publisher.store.carry_out([Announce(STABLE, 2, 1.0, 1)])
    publisher.start()
    assert not publisher.settled()
    publisher.refresh()
    named = publisher.read(STABLE).manifest.release
    assert named is not None
    assert named.number == 2


def test_a_broker_that_lost_everything_gets_both_manifests_at_once(publisher: Publisher) -> None:
    publisher.add()
    publisher.add()
    publisher.announce(STABLE, 1)
    publisher.announce(CANARY, 2, 0.1)
    before = publisher.read(STABLE), publisher.read(CANARY)
    publisher.broker.crash()
    publisher.manifests.connected(publisher.now)
    assert (publisher.read(STABLE), publisher.read(CANARY)) == before


def test_after_a_rotation_of_keys_both_are_signed_by_the_successor(publisher: Publisher) -> None:
    publisher.add()
    publisher.announce(STABLE, 1)
    assert publisher.read(STABLE).signer == 0
    publisher.keys.rotate()
    publisher.refresh(LOOK_S)
    signed = publisher.read(STABLE)
    assert signed.signer == 1, "by the key that devices have pinned as the successor"
    assert signed.manifest.next_key == publisher.keys.pair().successor.public_bytes_raw()
    publisher.keys.rotate()
    publisher.refresh(LOOK_S)
    with pytest.raises(ReleaseError) as caught:  # a device that slept through the first rotation
        publisher.read(STABLE)
    assert caught.value.fault is ReleaseFault.BAD_SIGNATURE
