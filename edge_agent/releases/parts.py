"""What is being fetched of releases, and the room for it on the disk."""

import errno
import mmap
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from federation.errors import ConfigError, PeerError, ReleaseError, ReleaseFault
from federation.files import disk_error, sync_folder
from federation.wire.messages import ObjectRef
from federation.wire.objects import PartialObject
from federation.wire.transfer import chunk_span

MARGIN_BYTES = 16 * 2**20
"""Left free on the disk when a release is fetched: the ledger, the outbox and the system's logs live there too."""

_BLOCK_BYTES = 512
"""Unit of ``st_blocks``, whatever the file system's own blocks are (POSIX, sys/stat.h)."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No room: on the disk, in the quota, or below the process's own limit on files."""


class Parts:
    """A folder of objects that are not whole yet, named ``SHA256.part``.

    Args:
        folder: Must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, ref: ObjectRef) -> Path:
        """Where an object is while it is fetched."""
        return self._folder / f"{ref.sha256}.part"

    def open(self, ref: ObjectRef, make_room: Callable[[], None]) -> PartialObject:
        """Go on with an object, or begin it, and reserve its space.

        Args:
            ref: What it will be.
            make_room: Deletes what is of no use; called when there is too little space.

        Raises:
            ReleaseError: ``no_space``, also from ``write`` of what is returned.
            ConfigError: If the disk is not writable.
        """
        path = self.path(ref)
        with full_disk(path):
            if self._lacking(path, ref.length) > 0:
                make_room()
            lacking = self._lacking(path, ref.length)
            if lacking > 0:
                raise ReleaseError(
                    ReleaseFault.NO_SPACE,
                    f"{ref.length} bytes to fetch and {MARGIN_BYTES} to leave free are {lacking} more than the disk of "
                    f"{self._folder} has: free some",
                )
            return _Part(path, ref)

    def finish(self, ref: ObjectRef, target: Path) -> None:
        """Check a whole object and move it to ``target``, durably.

        Raises:
            ReleaseError: ``wrong_hash`` if chunks are missing, or the whole is another object; it is then deleted.
            ConfigError: If the disk is not writable.
        """
        try:
            self._whole(ref).finish(target)
        except PeerError as error:
            raise ReleaseError(ReleaseFault.WRONG_HASH, error.detail) from error

    def make_from_delta(
        self, model: ObjectRef, base: Path, delta: ObjectRef, make_room: Callable[[], None]
    ) -> None:
        """Make a model that is not whole yet whole: out of another one and the difference, whose part is then deleted.

        Args:
            model: What it will be.
            base: The file of the other one.
            delta: Was fetched (``federation.task.model_delta``).
            make_room: As for :meth:`open`.

        Raises:
            ReleaseError: ``malformed`` or ``wrong_hash`` if it does not lead there, ``no_space``.
            ConfigError: If the disk is not writable.
        """
        from federation.task.model_delta import apply_delta

        try:
            with closing(self._whole(delta)) as part:
                made = apply_delta(
                    _mapped(base), _mapped(part.path), length=model.length, sha256=model.sha256
                )
            with closing(self.open(model, make_room)) as part:
                for index in range(model.chunks):
                    offset, length = chunk_span(model, index)
                    part.write(index, memoryview(made)[offset : offset + length])
        finally:
            remove(self.path(delta))

    def collect_garbage(self, fetching: Collection[str]) -> None:
        """Delete all but these objects.

        Raises:
            ConfigError: If one cannot be deleted.
        """
        for part in self._folder.iterdir():
            if part.stem not in fetching:
                remove(part)

    def _whole(self, ref: ObjectRef) -> PartialObject:
        part = PartialObject(self.path(ref), ref)
        if not part.complete:
            part.close()
            raise ReleaseError(
                ReleaseFault.WRONG_HASH,
                f"{ref.chunks - len(part.have)} of {ref.chunks} chunks of {part.path} are missing or damaged",
            )
        return part

    def _lacking(self, path: Path, length: int) -> int:
        """Bytes that the disk is short of to hold a file of ``length`` at ``path``, of which some may be there."""
        there = path.stat().st_blocks * _BLOCK_BYTES if path.exists() else 0
        disk = os.statvfs(self._folder)
        return max(0, length - there) + MARGIN_BYTES - disk.f_bavail * disk.f_frsize


class _Part(PartialObject):
    """A part whose space is reserved, and which says ``no_space`` when the disk is full all the same."""

    def __init__(self, path: Path, ref: ObjectRef) -> None:
        super().__init__(path, ref)
        try:
            os.posix_fallocate(self._file.fileno(), 0, ref.length)
        except BaseException:
            self.close()
            raise

    def write(self, index: int, payload: bytes | memoryview) -> None:
        with full_disk(self.path):
            super().write(index, payload)

    def finish(self, target: Path) -> Path:
        with full_disk(self.path):
            return super().finish(target)


def _mapped(path: Path) -> memoryview:
    """A file as memory that the kernel can take back at any time, until the last reference is gone."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ReleaseError(ReleaseFault.WRONG_HASH, f"cannot read {path}: {error}") from error


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into a release that cannot be taken now, and any other trouble with it into the operator's."""
    try:
        yield
    except (OSError, ConfigError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise ReleaseError(
                ReleaseFault.NO_SPACE,
                f"no space left on the disk that holds {path}: free some, nothing was lost",
            ) from error
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def remove(path: Path) -> None:
    """Delete a file, durably, if it is there.

    Raises:
        ConfigError: If it cannot be deleted.
    """
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
