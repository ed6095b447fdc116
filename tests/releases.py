"""Releases made of random bytes: what the aggregator stores, signs and announces never opens a model."""

import random
import secrets
import time
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.releases.records import DELTA_FILE, StoredRelease
from aggregator.releases.store import ReleaseStore
from federation.bundle import Bundle
from federation.errors import ReleaseFault
from federation.release import GOLDEN_FILE, MODEL_FILE
from federation.wire.link import LinkLike
from federation.wire.messages import encode_json
from federation.wire.predictions import ModelState
from federation.wire.release import (
    Manifest,
    ModelFormat,
    Release,
    ReleaseDelta,
    ReleaseMetrics,
    ReleaseReport,
    Requirements,
    RolloutState,
    draw,
)
from federation.wire.signing import Purpose, private_key, seal
from federation.wire.topics import Topics
from federation.wire.transfer import make_ref

CHUNK_BYTES = 512
MODEL_BYTES = 3 * CHUNK_BYTES + 7

REQUIREMENTS = Requirements(opset=20, ir_version=10, min_runtime="1.18", card_format="1")


def make_release(folder: Path, number: int, *, delta: bool = False, round_number: int = 3) -> Release:
    """Write the files of a release, its own for each number."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(number)
    names = [MODEL_FILE, GOLDEN_FILE, *([DELTA_FILE] if delta else [])]
    data = {name: draw.randbytes(MODEL_BYTES) for name in names}
    refs = {name: make_ref(content, CHUNK_BYTES) for name, content in data.items()}
    for name, content in data.items():
        (folder / name).write_bytes(content)
    return Release(
        number=number,
        run="0" * 16,
        round=round_number,
        created_at=time.time(),
        format=ModelFormat.INT8,
        model=refs[MODEL_FILE],
        golden=refs[GOLDEN_FILE],
        requirements=REQUIREMENTS,
        delta=ReleaseDelta(base="a" * 64, object=refs[DELTA_FILE]) if delta else None,
        metrics=ReleaseMetrics(accuracy=0.9, samples=100, drop_points=0.1),
    )


def add_release(store: ReleaseStore, folder: Path, *, delta: bool = False) -> StoredRelease:
    """Put another release into the store."""
    number = store.next_number()
    place = folder / f"made-{number}"
    return store.add(make_release(place, number, delta=delta), place)


class Follower:
    """A device that runs models, as far as the aggregator can tell: it says so, and reports what its owner wants.

    Args:
        bundle: Its identity.
        link: Started by the caller.
    """

    def __init__(self, bundle: Bundle, link: LinkLike) -> None:
        self.name, self.link = bundle.agent, link
        self.topics = Topics(bundle.federation)
        self.key = private_key(bundle.private_key)
        self.session = secrets.token_hex(8)

    def show(self, *, online: bool = True, installed: str = "") -> None:
        """Say which model it runs."""
        model = ModelState(
            installed_version=installed,
            latest_version=installed,
            in_progress=False,
            title=self.topics.federation,
            online=online,
            session=self.session,
        )
        self.link.publish(self.topics.model(self.name), encode_json(model), qos=1, retain=True)

    def says(
        self,
        manifest: Manifest,
        state: RolloutState,
        fault: ReleaseFault | None = None,
        **fields: object,
    ) -> ReleaseReport:
        """What it would report about a manifest's release."""
        assert manifest.release is not None
        report = ReleaseReport(
            session=self.session,
            number=manifest.release.number,
            sha256=manifest.release.model.sha256,
            manifest=manifest.version,
            state=state,
            time=time.time(),
            fault=fault,
            running=manifest.release.number if state is RolloutState.CONFIRMED else None,
        )
        return msgspec.structs.replace(report, **fields)

    def send(self, report: ReleaseReport, key: Ed25519PrivateKey | None = None) -> None:
        """Sign a report and publish it; with another key to forge one."""
        envelope = seal(
            report,
            purpose=Purpose.RELEASE_REPORT,
            federation=self.topics.federation,
            sender=self.name,
            key=key or self.key,
        )
        self.link.publish(self.topics.release_report(self.name), envelope, qos=1, retain=True)

    def report(self, manifest: Manifest, state: RolloutState, fault: ReleaseFault | None = None) -> None:
        """Report honestly."""
        self.send(self.says(manifest, state, fault))


def share_between(federation: str, number: int, inside: str, outside: str) -> float:
    """A share of the devices that takes the one and not the other."""
    low, high = draw(federation, inside, number), draw(federation, outside, number)
    assert low < high, f"{outside} comes before {inside} in release {number}"
    return (low + high) / 2


def in_order(federation: str, number: int, names: list[str]) -> list[str]:
    """The devices as a canary takes them."""
    return sorted(names, key=lambda name: draw(federation, name, number))
