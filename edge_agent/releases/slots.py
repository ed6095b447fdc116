"""The models of a device: fetched, installed, activated and given up so that any power cut leaves a good one.

Every step is durable before the next begins, and each leaves the folder (``slot_files``) in a state from which the
device starts with a model that it had tested, the old one or the new one:

* *Install*: model, then golden set, each checked by its hash; the manifest last. Without a manifest it is no slot.
* *Activate*: the probation's record, then ``previous``, then ``current``. Only the record of ``current`` counts.
* *Roll back*: the quarantine's record, then ``current``. A ``current`` that is in quarantine means that the power went in
  between; opening the folder goes on from there.
"""

import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from edge_agent.releases.folder_lock import FolderLock
from edge_agent.releases.parts import Parts, full_disk, remove
from edge_agent.releases.probation import Probation, Trial
from edge_agent.releases.quarantine import Quarantine
from edge_agent.releases.slot_files import (
    CURRENT,
    LOCK_FILE,
    PARTS,
    PREVIOUS,
    QUARANTINE,
    SLOTS,
    Slot,
    installed,
    link,
    linked,
    read_slot,
)
from federation.errors import ConfigError, ReleaseError, ReleaseFault
from federation.files import disk_error, sync_folder, write_whole
from federation.release import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, check_file, check_files
from federation.wire.messages import ObjectRef
from federation.wire.objects import PartialObject
from federation.wire.release import Release

_log = structlog.get_logger()


class Slots:
    """The folder of models, owned by one process and used by one of its threads.

    Args:
        folder: Created where it is not there.
        clock: Unix seconds.

    Attributes:
        folder: Where everything is.
        current: The slot to run, its model checked against its hash when the folder was opened; None: there is none.

    Raises:
        ConfigError: If another process uses the folder, or the disk is not writable.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.current: Slot | None = None
        self._parts = Parts(folder / PARTS)
        self._fetching: set[str] = set()
        self._quarantine = Quarantine(folder, clock)
        self._probation = Probation(folder, clock)
        try:
            for name in (SLOTS, PARTS, QUARANTINE):
                (folder / name).mkdir(parents=True, exist_ok=True)
            sync_folder(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise disk_error(error, folder) from error
        self._lock = FolderLock(folder / LOCK_FILE)
        try:
            self._sweep()
            self._start()
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let another process have the folder. Does nothing the second time."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def trial(self) -> Trial | None:
        """The probation of ``current``; None if it was confirmed, or there is none."""
        return self._probation.trial

    @property
    def previous(self) -> Slot | None:
        """The slot to go back to; None if there is none, it is ``current`` itself, or it is in quarantine."""
        slot = self._linked(PREVIOUS)
        if slot is None or self.quarantined(slot.sha256) is not None:
            return None
        return None if self.current is not None and slot.sha256 == self.current.sha256 else slot

    def find(self, sha256: str) -> Slot | None:
        """The slot with a model, or None."""
        try:
            return read_slot(self.folder / SLOTS / sha256)
        except ReleaseError:
            return None

    def check(self, slot: Slot) -> None:
        """Compare the files of a slot with what was signed.

        Raises:
            ReleaseError: ``wrong_hash``.
        """
        check_files(slot.folder, slot.release)

    # Fetch and install.

    def missing(self, release: Release) -> tuple[ObjectRef, ...]:
        """What must still be fetched to install a release: its model, its golden set, both or nothing.

        It is the one that is fetched from now on: when space is short, parts of others are deleted for it.
        """
        delta = [] if release.delta is None else [release.delta.object]
        self._fetching = {ref.sha256 for ref in (release.model, release.golden, *delta)}
        folder = self.folder / SLOTS / release.model.sha256
        wanted = ((folder / MODEL_FILE, release.model), (folder / GOLDEN_FILE, release.golden))
        return tuple(ref for path, ref in wanted if not _is(path, ref))

    def open_part(self, ref: ObjectRef) -> PartialObject:
        """Go on fetching an object of the release that :meth:`missing` was last asked about, or begin; reserves its space.

        Raises:
            ReleaseError: ``no_space``; also from ``write`` of what is returned. Nothing is lost.
            ConfigError: If the disk is not writable.
        """
        return self._parts.open(ref, self._make_room)

    def make_from_delta(self, release: Release) -> None:
        """Make the model of a release out of its delta, which was fetched, and the slot that it starts from.

        Afterwards the model is a part that is complete, as if it had been fetched itself. The delta's part is deleted either
        way: after an error the model itself is to be fetched.

        Raises:
            ReleaseError: ``malformed`` or ``wrong_hash`` if they do not make the model, or the slot is not there
                (``release.delta.base`` names it); ``no_space``.
            ConfigError: If the disk is not writable.
        """
        assert release.delta is not None
        base = self.folder / SLOTS / release.delta.base / MODEL_FILE
        self._parts.make_from_delta(release.model, base, release.delta.object, self._make_room)

    def install(self, release: Release, envelope: bytes) -> Slot:
        """Make a slot of what was fetched. Where it is installed already, the newer manifest takes the older's place.

        Args:
            release: Of a manifest that was verified.
            envelope: That manifest's.

        Raises:
            ReleaseError: ``wrong_hash`` if something is missing or is not what was signed: what is wrong was deleted,
                fetch it again; ``no_space``.
            ConfigError: If the disk is not writable.
        """
        folder = self.folder / SLOTS / release.model.sha256
        with full_disk(folder):
            if not folder.is_dir():
                folder.mkdir()
                sync_folder(folder.parent)
            for name, ref in ((MODEL_FILE, release.model), (GOLDEN_FILE, release.golden)):
                if not _is(folder / name, ref):
                    self._parts.finish(ref, folder / name)
            write_whole(folder / MANIFEST_FILE, envelope)
        slot = read_slot(folder)
        if self.current is not None and self.current.sha256 == slot.sha256:
            self.current = slot
        return slot

    # Activate, and go back.

    def activate(self, slot: Slot) -> None:
        """Make a slot the current one, on probation; the one that was becomes the previous one.

        Does nothing to the slot that is current already.

        Raises:
            ReleaseError: ``wrong_hash`` if the slot is damaged, ``quarantined``, ``no_space``: the old one stays current.
            ConfigError: If the disk is not writable.
        """
        if self.current is not None and self.current.sha256 == slot.sha256:
            return
        reason = self.quarantined(slot.sha256)
        if reason is not None:
            raise ReleaseError(ReleaseFault.QUARANTINED, reason)
        check_file(slot.model, slot.release.model)
        with full_disk(self.folder):
            self._probation.prepare(slot.sha256)
            if self.current is not None:
                link(self.folder, PREVIOUS, self.current)
            link(self.folder, CURRENT, slot)
        self.current = slot
        self._probation.resume(slot.sha256)

    def roll_back(self) -> Slot | None:
        """Make the previous slot the current one. What failed has been put into quarantine before.

        A full or broken disk does not keep this process from going back: the next start finds the quarantine, or the
        probation, and goes back too.

        Returns:
            The slot that is current now; None if there is nothing to go back to, so that this device has no model.
        """
        target = self._usable(PREVIOUS)
        if target is not None and self.current is not None and target.sha256 == self.current.sha256:
            target = None
        try:
            if target is not None:
                link(self.folder, CURRENT, target)
            else:
                remove(self.folder / CURRENT)
        except (OSError, ConfigError) as error:
            _log.warning("roll_back_not_written", folder=str(self.folder), error=str(error))
        self.current = target
        self._probation.resume(None if target is None else target.sha256)
        return target

    # Probation.

    def count_start(self) -> bool:
        """Count a start of the process, before the model is loaded.

        Returns:
            True if ``current`` is on probation and has made the process crash too often.
        """
        return self._probation.count_start()

    def count_stop(self) -> None:
        """Take the last start back: the process stops because it was told to."""
        self._probation.count_stop()

    def end_probation(self) -> None:
        """Keep ``current`` from now on.

        Raises:
            ConfigError: If the disk is not writable.
        """
        self._probation.end()

    # Quarantine.

    def quarantine(self, sha256: str, fault: ReleaseFault, detail: str) -> None:
        """Never take a model again, until somebody forgives it. If the disk is full, until this process ends."""
        slot = self.find(sha256)
        self._quarantine.add(sha256, slot.release.number if slot else None, fault, detail)

    def quarantined(self, sha256: str) -> str | None:
        """Why a model is in quarantine; None if it is not. Reads the disk: an operator may forgive meanwhile."""
        record = self._quarantine.find(sha256)
        return None if record is None else f"{record.fault.value}: {record.detail}"

    # Order.

    def collect_garbage(self, keep: int, fetching: Collection[str] = ()) -> None:
        """Delete slots and parts that are of no more use.

        Args:
            keep: Slots to keep; ``current`` and ``previous`` always are, then the newest by number, never those in
                quarantine.
            fetching: SHA-256 of models and other objects that are being fetched, installed or tested.

        Raises:
            ConfigError: If something cannot be deleted.
        """
        self._fetching = set(fetching)
        kept = {slot.sha256 for slot in (self.current, self.previous) if slot is not None}
        newest = sorted(installed(self.folder), key=lambda slot: slot.release.number, reverse=True)
        for slot in newest:
            if len(kept) < keep and self.quarantined(slot.sha256) is None:
                kept.add(slot.sha256)
        kept |= self._fetching
        for folder in (self.folder / SLOTS).iterdir():
            if folder.name not in kept:
                self._delete_slot(folder)
        self._parts.collect_garbage(self._fetching)

    def _make_room(self) -> None:
        self.collect_garbage(0, self._fetching)

    def _sweep(self) -> None:
        """Delete what a power cut in the middle of a write has left."""
        for folder in (
            self.folder,
            self.folder / QUARANTINE,
            *(self.folder / SLOTS).iterdir(),
        ):
            for leftover in folder.glob(".*"):
                remove(leftover)

    def _start(self) -> None:
        self.current = self._usable(CURRENT)
        if self.current is None and linked(self.folder, CURRENT) is not None:
            self._recover()
        self._probation.resume(None if self.current is None else self.current.sha256)

    def _recover(self) -> None:
        """Go on with ``previous`` because ``current`` is damaged, or was given up when the power went."""
        self.current = self._usable(PREVIOUS)
        if self.current is None:
            _log.error("no_usable_model", folder=str(self.folder), remedy="waiting for a release")
            return
        _log.warning("previous_model_taken", number=self.current.release.number)
        try:
            link(self.folder, CURRENT, self.current)
        except OSError as error:  # a full or broken disk must not keep a good model from running
            _log.warning("link_not_written", link=CURRENT, error=str(error))

    def _usable(self, name: str) -> Slot | None:
        slot = self._linked(name)
        if slot is None:
            return None
        reason = self.quarantined(slot.sha256)
        try:
            if reason is not None:
                raise ReleaseError(ReleaseFault.QUARANTINED, reason)
            check_file(slot.model, slot.release.model)
        except ReleaseError as error:
            _log.warning("model_not_usable", link=name, number=slot.release.number, error=str(error))
            return None
        return slot

    def _linked(self, name: str) -> Slot | None:
        folder = linked(self.folder, name)
        if folder is None:
            return None
        try:
            return read_slot(folder)
        except ReleaseError as error:
            _log.debug("slot_not_usable", link=name, error=str(error))
            return None

    def _delete_slot(self, folder: Path) -> None:
        remove(folder / MANIFEST_FILE)  # first: what is half deleted is no slot
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise disk_error(error, folder) from error


def _is(path: Path, ref: ObjectRef) -> bool:
    try:
        check_file(path, ref)
    except ReleaseError:
        return False
    return True
