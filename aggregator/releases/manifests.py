"""The manifests of the two channels: signed when what a channel says has changed, renewed, published again."""

import time
from collections.abc import Callable
from math import inf

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.announcements import PLAN_REPEAT_S
from aggregator.releases.keys import ReleaseKeyPair, ReleaseKeys
from aggregator.releases.records import StoredChannel, StoredManifest
from aggregator.releases.store import ReleaseStore
from federation.wire.link import LinkLike
from federation.wire.release import Channel, Manifest, Release
from federation.wire.signing import AGGREGATOR, Purpose, seal
from federation.wire.topics import Topics

log = structlog.get_logger()

RENEW_SHARE = 1 / 3
"""Of its life, after which a manifest is renewed: devices have the other two thirds while the server is away."""

LOOK_S = 10.0
"""Between two looks at expiries and at the release keys, which another process may have rotated."""

DAY_S = 86400.0

ORDER = (Channel.STABLE, Channel.CANARY)
"""In which channels are announced: a canary that became stable is there before the canary channel is emptied."""


class ReleaseManifests:
    """Says on the broker what the store says of the channels. Single-threaded.

    Args:
        store: Channels and manifests.
        topics: Of the federation.
        keys: Sign.
        expiry_days: Life of a manifest.
        link: To publish on.

    Attributes:
        held: Releases that are not announced yet, since the broker does not hold their objects.
    """

    def __init__(
        self, store: ReleaseStore, topics: Topics, keys: ReleaseKeys, expiry_days: float, link: LinkLike
    ) -> None:
        self._store, self._topics, self._keys, self._link = store, topics, keys, link
        self._life_s = expiry_days * DAY_S
        self._repeat: dict[Channel, float] = {}
        has_any = any(store.channel(channel) is not None for channel in ORDER)
        self._look_due = -inf if has_any else 0.0
        self.held: set[int] = set()

    @property
    def due(self) -> float:
        """When :meth:`refresh` has something to do, monotonic seconds."""
        return min([self._look_due, *self._repeat.values()])

    @property
    def settled(self) -> bool:
        """Whether everything that can be said has been said, and said again."""
        return not self._repeat and self._look_due != -inf

    def changed(self) -> None:
        """A channel may have something new to say, or its objects have arrived on the broker."""
        self._look_due = -inf

    def connected(self, now: float) -> None:
        """Publish again what is in force: the broker may have lost it."""
        for channel in ORDER:
            if self._store.manifest(channel) is not None:
                self._publish(channel, now)
        self.changed()

    def refresh(self, now: float, present: Callable[[Release], bool]) -> None:
        """Sign and publish what is new or getting old; publish once more what was new a second ago.

        Args:
            now: Monotonic seconds.
            present: Whether the broker holds a release's objects: devices that ask too early must wait for a retry.
        """
        if now >= self._look_due:
            self._look_due = now + LOOK_S
            pair = self._keys.pair()
            self.held.clear()
            for channel in ORDER:
                self._settle(channel, pair, now, present)
        for channel in [channel for channel, at in self._repeat.items() if now >= at]:
            self._publish(channel, now)
            # As a plan (aggregator.announcements): nats-server may have delivered only the former one to somebody.
            del self._repeat[channel]

    def _settle(
        self, channel: Channel, pair: ReleaseKeyPair, now: float, present: Callable[[Release], bool]
    ) -> None:
        wanted, newest = self._store.channel(channel), self._store.manifest(channel)
        if wanted is None:
            return
        stored = None if wanted.number is None else self._store.release(wanted.number)
        release = None if stored is None else stored.release
        if newest is not None and _says(newest.manifest, wanted, pair.successor) and not self._old(newest):
            return
        named = None if newest is None else newest.manifest.release
        if release is not None and release != named and not present(release):
            self.held.add(release.number)
            return
        issued_at = time.time()
        manifest = Manifest(
            version=self._store.next_manifest_version(),
            channel=channel,
            issued_at=issued_at,
            expires_at=issued_at + self._life_s,
            release=release,
            share=wanted.share,
            next_key=pair.successor.public_bytes_raw(),
        )
        envelope = seal(
            manifest,
            purpose=Purpose.RELEASE,
            federation=self._topics.federation,
            sender=AGGREGATOR,
            key=pair.present,
        )
        self._store.record_manifest(manifest, envelope)
        log.info(
            "manifest_published",
            channel=channel.value,
            version=manifest.version,
            release=wanted.number,
            share=round(manifest.share, 4),
        )
        self._publish(channel, now)

    def _old(self, newest: StoredManifest) -> bool:
        """By a wall clock that may have been wrong when it was signed, or may be now."""
        manifest, wall = newest.manifest, time.time()
        renew_at = manifest.issued_at + RENEW_SHARE * min(
            self._life_s, manifest.expires_at - manifest.issued_at
        )
        return wall >= renew_at

    def _publish(self, channel: Channel, now: float) -> None:
        newest = self._store.manifest(channel)
        assert newest is not None, "called for a channel that has a manifest"
        self._link.publish(self._topics.release(channel.value), newest.envelope, qos=1, retain=True)
        self._repeat[channel] = now + PLAN_REPEAT_S


def _says(manifest: Manifest, wanted: StoredChannel, successor: Ed25519PublicKey) -> bool:
    number = None if manifest.release is None else manifest.release.number
    said = number, manifest.share, manifest.next_key
    return said == (wanted.number, wanted.share, successor.public_bytes_raw())
