"""Making a release: from a checkpoint or an exported folder to files in the release store. It announces nothing.

Runs in a process of its own (``aggregator release``), which imports torch when it exports, beside a server that does not.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from aggregator.config import AggregatorConfig
from aggregator.releases.checks import (
    Comparison,
    Order,
    check_regression,
    compare,
    data_of,
    examine,
    metrics_of,
    same_labels,
)
from aggregator.releases.privacy import privacy_of
from aggregator.releases.records import DELTA_FILE, StoredRelease
from aggregator.releases.store import FOLDER, ReleaseStore
from aggregator.store import Store
from federation.errors import ConfigError
from federation.files import disk_error, write_whole
from federation.release import GOLDEN_FILE, MODEL_FILE
from federation.task.checkpoint import find_checkpoint
from federation.task.model_card import ModelCard
from federation.task.model_delta import apply_delta, make_delta
from federation.wire.objects import ref_of_file
from federation.wire.release import Channel, ModelFormat, Release, ReleaseDelta, ReleaseMetrics

WORTH_IT = 0.8
"""A delta that is a larger share of the model saves devices less than the second download costs when it goes wrong."""

MAX_NOTES = 1000
"""Characters; the bound of ``Release.notes``."""

_WORKSHOP = ".making-"
_ABANDONED_S = 86_400.0
"""After a day, what a killed process has left behind is deleted."""


@dataclass(frozen=True, slots=True)
class MadeRelease:
    """A release that is in the store now.

    Attributes:
        stored: As the store knows it.
        remarks: What its maker should know, in whole sentences.
        found: How it does beside the stable release.
    """

    stored: StoredRelease
    remarks: tuple[str, ...]
    found: Comparison


def make_release(store: Store, config: AggregatorConfig, order: Order) -> MadeRelease:
    """Export if that is asked for, check, measure, describe, and put the files into the store.

    Args:
        store: Of the state folder; a server may be running on it.
        config: The server's settings.
        order: What is wanted.

    Raises:
        ConfigError: If there is no such checkpoint or folder, it belongs to another federation, its labels are others than the
            stable release's, it is a release already, or the disk is full.
        VerificationError: If the model is not what it says, answers with NaN, or is worse than the gate allows.
    """
    if len(order.notes) > MAX_NOTES:
        raise ConfigError(f"the notes have {len(order.notes)} characters, at most {MAX_NOTES}: shorten them")
    releases = ReleaseStore(store)
    stable = releases.current(Channel.STABLE)
    remarks: list[str] = []
    with _workshop(store.folder / FOLDER) as folder:
        if order.folder is None:
            measured = _export(store, config, order, folder, remarks)
        else:
            measured = None
            _copy(order.folder, folder)
        card = examine(folder, store.federation, order.folder or store.folder)
        former = None if stable is None or not stable.on_disk else stable
        known = former is not None and same_labels(card, former, order, remarks)
        model = folder / MODEL_FILE
        found = compare(model, card, former if known else None, data_of(config, order))
        if order.gated:
            check_regression(found, stable, config.release.max_regression)
        release = _describe(
            store,
            releases,
            folder,
            card,
            chunk_bytes=config.broker.chunk_bytes,
            metrics=measured or metrics_of(card, found, remarks),
            notes=order.notes,
            remarks=remarks,
        )
        _refuse_again(release, releases)
        if former is not None:
            release = _with_delta(release, former, folder, config.broker.chunk_bytes)
        if found.now is not None and found.before is not None and found.now < found.before:
            remarks.append(
                f"on the same {found.samples} pictures the stable release has {found.before:.2%}, this one {found.now:.2%}"
            )
        stored = releases.add(release, folder)
    return MadeRelease(stored, tuple(remarks), found)


@contextmanager
def _workshop(releases: Path) -> Iterator[Path]:
    """A folder on the disk of the store, so that files can be moved in."""
    try:
        releases.mkdir(exist_ok=True)
        for left_over in releases.glob(f"{_WORKSHOP}*"):
            if time.time() - left_over.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left_over, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=_WORKSHOP, dir=releases))
    except OSError as error:
        raise disk_error(error, releases) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _export(
    store: Store, config: AggregatorConfig, order: Order, folder: Path, remarks: list[str]
) -> ReleaseMetrics | None:
    from export.convert import export_model

    checkpoint = find_checkpoint(store.folder, order.round)
    wanted, data = order.format or config.release.format, data_of(config, order)
    if wanted is ModelFormat.INT8 and data is None and order.format is None:
        wanted = ModelFormat.FP32
        remarks.append(
            "released in fp32: int8 is calibrated with pictures, and neither release.data nor task.holdout names any"
        )
    report = export_model(
        checkpoint,
        folder,
        format=wanted,
        preprocess=config.release.preprocess,
        data=data,
        max_drop=config.release.max_drop if order.max_drop is None else order.max_drop,
    )
    remarks.extend(report.reasons)
    return report.metrics


def _copy(source: Path, folder: Path) -> None:
    """Take the files as they are now: what is checked is what is released."""
    origin = source.parent if source.is_file() else source
    for name in (MODEL_FILE, GOLDEN_FILE):
        if not (origin / name).is_file():
            raise ConfigError(
                f"{source} is not a release folder: there is no {name} in {origin}; make one with `model-export onnx`"
            )
        try:
            shutil.copyfile(origin / name, folder / name)
        except OSError as error:
            raise disk_error(error, folder / name) from error


def _describe(
    store: Store,
    releases: ReleaseStore,
    folder: Path,
    card: ModelCard,
    *,
    chunk_bytes: int,
    metrics: ReleaseMetrics | None,
    notes: str,
    remarks: list[str],
) -> Release:
    assert card.requirements is not None  # checked when it was examined
    privacy, remark = privacy_of(store, card.provenance.round)
    if remark:
        remarks.append(remark)
    return Release(
        number=releases.next_number(),
        run=store.run,
        round=card.provenance.round,
        created_at=time.time(),
        format=card.provenance.weights,
        model=ref_of_file(folder / MODEL_FILE, chunk_bytes),
        golden=ref_of_file(folder / GOLDEN_FILE, chunk_bytes),
        requirements=card.requirements,
        metrics=metrics,
        privacy=privacy,
        notes=notes,
    )


def _refuse_again(release: Release, releases: ReleaseStore) -> None:
    for row in releases.releases():
        if row.release.model.sha256 == release.model.sha256:
            raise ConfigError(
                f"this model is release {row.number} already ({row.state.value}): announce that one with `aggregator release "
                f"--number {row.number}`, or go back to it with `aggregator rollback --to {row.number}`"
            )


def _with_delta(release: Release, stable: StoredRelease, folder: Path, chunk_bytes: int) -> Release:
    """Add the difference from the stable release, where it is worth it."""
    base, new = (stable.folder / MODEL_FILE).read_bytes(), (folder / MODEL_FILE).read_bytes()
    delta = make_delta(base, new)
    if len(delta) > WORTH_IT * len(new):
        return release
    # Devices fetch the whole model if this goes wrong, at twice the price: so it is tried here.
    apply_delta(base, delta, length=release.model.length, sha256=release.model.sha256)
    write_whole(folder / DELTA_FILE, delta)
    made = ReleaseDelta(
        base=stable.release.model.sha256, object=ref_of_file(folder / DELTA_FILE, chunk_bytes)
    )
    return msgspec.structs.replace(release, delta=made)
