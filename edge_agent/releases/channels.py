"""What the channels say, and what of it counts for this device: versions, age, keys, and releases that failed here.

Versions and expiry are checked as a client of The Update Framework checks them (specification 1.0, section 5), with this
difference: an expired manifest stops what is new, and nothing that runs. A plain table, without I/O.
"""

from dataclasses import dataclass, field
from typing import Final

from edge_agent.releases.rollout_events import Offer, Remember
from federation.errors import ReleaseFault
from federation.release import SignedManifest
from federation.wire.release import Channel, Manifest, Release, draw

PROVEN_REMEMBERED: Final = 16
"""Many times what a device keeps slots of."""


@dataclass(frozen=True, slots=True)
class Known:
    """What an earlier process remembered.

    Attributes:
        keys: Hex release keys, the present one first.
        versions: Newest manifest version seen on each channel.
        newest: The highest of all, and
        issued_at: its time, Unix seconds.
        proven: SHA-256 of models that passed their probation here, the newest last.
        quarantine: SHA-256 of models that must never run here, and why.
    """

    keys: tuple[str, ...]
    versions: dict[Channel, int] = field(default_factory=dict)
    newest: int = 0
    issued_at: float = 0.0
    proven: tuple[str, ...] = ()
    quarantine: dict[str, str] = field(default_factory=dict)


class Channels:
    """The newest manifest of each channel, and what this device knows that bears on it.

    Args:
        federation: Whose manifests.
        agent: This device.
        eager: Whether its operator wants canaries whatever the draw says.
        known: From the disk.

    Attributes:
        keys: Hex release keys, the present one first.
        quarantine: SHA-256 of models that must never run here, and why.
    """

    def __init__(self, federation: str, agent: str, *, eager: bool, known: Known) -> None:
        self._federation, self._agent, self._eager = federation, agent, eager
        self.keys = known.keys
        self.quarantine = dict(known.quarantine)
        self._versions = dict(known.versions)
        self._newest, self._issued_at = known.newest, known.issued_at
        self._learned_at: float | None = None
        self._proven = known.proven
        self._remembered = self._memory()
        self._manifests: dict[Channel, SignedManifest] = {}
        self._declined: dict[str, int] = {}

    def time(self, now: float, wall: float) -> float:
        """Unix seconds, as far as they can be known: a board without a battery wakes up in 1970.

        Manifests are made in the order of their versions, so it cannot be earlier than the newest one was issued. Not the
        latest time ever signed: one wrong clock at the aggregator would outdate all that follows.

        Args:
            now: Monotonic seconds.
            wall: Unix seconds by the device's clock.
        """
        since = 0.0 if self._learned_at is None else now - self._learned_at
        return max(wall, self._issued_at + since)

    def rotate(self, keys: tuple[str, ...]) -> None:
        """Pin other keys, and forget all that manifests of the former ones said.

        Whoever stole the former key may have signed the highest version and the latest time that there are; nothing of the
        owner's would ever be newer (a fast-forward attack; The Update Framework, specification 1.0, section 5.3.11).
        """
        self.keys = keys
        self._versions, self._newest, self._issued_at, self._learned_at = {}, 0, 0.0, None
        self._manifests, self._declined = {}, {}
        self._remembered = self._memory()

    # --- manifests ------------------------------------------------------------------------------------------------

    def seen(self, channel: Channel) -> int:
        """Newest version seen on a channel; 0 for none."""
        return self._versions.get(channel, 0)

    def is_news(self, signed: SignedManifest) -> bool:
        """Whether a manifest says what this process has not heard: each is retained, and comes after every connect."""
        manifest = signed.manifest
        held = manifest.channel in self._manifests
        return manifest.version > self.seen(manifest.channel) or (
            manifest.version == self.seen(manifest.channel) and not held
        )

    def accept(self, signed: SignedManifest, now: float) -> None:
        """Take a manifest that is news as what its channel says."""
        manifest = signed.manifest
        self._manifests[manifest.channel] = signed
        self._versions[manifest.channel] = manifest.version
        if manifest.version >= self._newest:
            self._newest, self._issued_at, self._learned_at = manifest.version, manifest.issued_at, now

    def remember(self) -> list[Remember]:
        """What must go to the disk; nothing where the disk has it already."""
        memory = self._memory()
        if memory == self._remembered:
            return []
        self._remembered = memory
        return [memory]

    def _memory(self) -> Remember:
        return Remember(dict(self._versions), self._newest, self._issued_at, self._proven)

    # --- releases -------------------------------------------------------------------------------------------------

    def is_meant(self, manifest: Manifest) -> bool:
        """Whether a manifest's release is for this device: all take stable, and some the canary."""
        if manifest.channel is Channel.STABLE or self._eager:
            return True
        release = manifest.release
        return release is not None and draw(self._federation, self._agent, release.number) < manifest.share

    def desired(self, current: Offer | None, wall: float) -> Offer | None:
        """What this device should run: the canary if it is meant and usable, else the stable release.

        Args:
            current: What it runs.
            wall: As :meth:`time` returns it.

        Returns:
            None if nothing is on offer: what runs goes on.
        """
        return self._usable(Channel.CANARY, current, wall) or self._usable(Channel.STABLE, current, wall)

    def _usable(self, channel: Channel, current: Offer | None, wall: float) -> Offer | None:
        signed = self._manifests.get(channel)
        if signed is None or signed.manifest.release is None or not self.is_meant(signed.manifest):
            return None
        offer = Offer(signed.manifest.release, signed.manifest.version, signed.envelope)
        if current is not None and current.release == offer.release:
            return offer  # also of an expired manifest: silence takes nothing away
        if signed.manifest.expires_at <= wall or offer.sha256 in self.quarantine:
            return None
        return None if self._declined.get(offer.sha256, 0) >= offer.manifest else offer

    def releases(self) -> list[Release]:
        """What the channels name now, expired or not, meant for this device or not."""
        named = (signed.manifest.release for signed in self._manifests.values())
        return [release for release in named if release is not None]

    def decline(self, offer: Offer) -> None:
        """Refuse a release until a newer manifest names it: its bytes have done nothing wrong."""
        self._declined[offer.sha256] = offer.manifest

    def condemn(self, offer: Offer, fault: ReleaseFault, detail: str) -> None:
        """Never take this model again."""
        self.quarantine[offer.sha256] = f"{fault.value}: {detail}"

    def prove(self, offer: Offer) -> None:
        """Its model has passed its probation here."""
        others = tuple(one for one in self._proven if one != offer.sha256)
        self._proven = (*others, offer.sha256)[-PROVEN_REMEMBERED:]

    def is_proven(self, offer: Offer) -> bool:
        """Whether its model has passed its probation here before."""
        return offer.sha256 in self._proven
