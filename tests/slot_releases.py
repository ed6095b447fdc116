"""Signed releases of any bytes, and the way they take into a device's slots when no broker is in between."""

import random
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.releases.slot_files import Slot
from edge_agent.releases.slots import Slots
from federation.wire.messages import ObjectRef
from federation.wire.release import Channel, Manifest, ModelFormat, Release, ReleaseDelta, Requirements
from federation.wire.signing import AGGREGATOR, Purpose, private_key_bytes, seal
from federation.wire.transfer import chunk_span, make_ref

CHUNK_BYTES = 256
KEY = Ed25519PrivateKey.from_private_bytes(b"r" * 32)
REQUIREMENTS = Requirements(opset=20, ir_version=10, min_runtime="1.18", card_format="1")


@dataclass(frozen=True)
class Made:
    """A release, its envelope, and the bytes of its objects by their SHA-256."""

    release: Release
    envelope: bytes
    objects: dict[str, bytes]

    @property
    def sha256(self) -> str:
        return self.release.model.sha256


def made(
    number: int,
    *,
    model: bytes | None = None,
    golden: bytes | None = None,
    delta: tuple[str, bytes] | None = None,
    version: int | None = None,
) -> Made:
    """A release of these bytes, or of random ones that are its own; ``delta`` is the SHA-256 of its base and its bytes."""
    draw = random.Random(number)
    model = draw.randbytes(3 * CHUNK_BYTES // 2) if model is None else model
    golden = draw.randbytes(CHUNK_BYTES) if golden is None else golden
    parts = [model, golden, *([delta[1]] if delta else [])]
    refs = [make_ref(part, CHUNK_BYTES) for part in parts]
    release = Release(
        number=number,
        run="ab" * 8,
        round=number,
        created_at=1.0,
        format=ModelFormat.FP32,
        model=refs[0],
        golden=refs[1],
        requirements=REQUIREMENTS,
        delta=ReleaseDelta(base=delta[0], object=refs[2]) if delta else None,
    )
    manifest = Manifest(
        version=version or number,
        channel=Channel.STABLE,
        issued_at=1.0,
        expires_at=2e9,
        release=release,
        share=1.0,
        next_key=private_key_bytes(KEY),
    )
    envelope = seal(manifest, purpose=Purpose.RELEASE, federation="garden", sender=AGGREGATOR, key=KEY)
    return Made(release, envelope, {ref.sha256: part for ref, part in zip(refs, parts, strict=True)})


def fetch(slots: Slots, one: Made, ref: ObjectRef) -> None:
    """What a device does with chunks as they come."""
    part = slots.open_part(ref)
    try:
        for index in sorted(set(range(ref.chunks)) - part.have):
            offset, length = chunk_span(ref, index)
            part.write(index, one.objects[ref.sha256][offset : offset + length])
    finally:
        part.close()


def put(slots: Slots, one: Made) -> Slot:
    """Fetch what is missing, and install."""
    for ref in slots.missing(one.release):
        fetch(slots, one, ref)
    return slots.install(one.release, one.envelope)
