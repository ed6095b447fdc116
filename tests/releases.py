"""Releases made of random bytes: what the aggregator stores, signs and announces never opens a model."""

import random
import time
from pathlib import Path

from aggregator.release_records import DELTA_FILE, StoredRelease
from aggregator.release_store import ReleaseStore
from federation.release import GOLDEN_FILE, MODEL_FILE
from federation.wire.release import ModelFormat, Release, ReleaseDelta, ReleaseMetrics, Requirements
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
