"""Objects and partial objects on disk.

A partial object has no state file: on opening, the chunks that are there are found by their hashes, so a write
that the power cut in half is simply a missing chunk.
"""

import os
from collections.abc import Iterator
from hashlib import file_digest
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from federation.errors import ConfigError, PeerError, Rejection, VerificationError
from federation.files import disk_error, sync_folder
from federation.wire.messages import ObjectRef
from federation.wire.transfer import check_chunk, check_cut, chunk_span, ref_of_chunks


class PartialObject:
    """An object that arrives chunk by chunk, in any order, in a file of its final size.

    Chunks are not synced one by one (SD cards wear); :meth:`finish` checks and syncs the whole.

    Args:
        path: The file; created, sparse, where it does not exist. Its folder must exist.
        ref: What it will be. The caller has bounded ``ref.length``: so much disk is going to be used.

    Attributes:
        path: The file.
        ref: What it will be.
        have: Indices of the chunks that are there and match their digests.

    Raises:
        ConfigError: If the disk is full or not writable.
    """

    def __init__(self, path: Path, ref: ObjectRef) -> None:
        self.path = path
        self.ref = ref
        try:
            path.touch(0o600)
            self._file: FileIO = path.open("r+b", buffering=0)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            self.have = self._discover()
            self._file.truncate(ref.length)
        except OSError as error:
            self._file.close()
            raise disk_error(error, path) from error

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return len(self.have) == self.ref.chunks

    def write(self, index: int, payload: bytes | memoryview) -> None:
        """Put a chunk that was checked (``transfer.check_chunk``) at its place.

        Raises:
            PeerError: ``malformed`` or ``wrong_length`` if it has no place in the object.
            ConfigError: If the disk is full; chunks already written stay.
        """
        offset, length = chunk_span(self.ref, index)
        if len(payload) != length:
            raise PeerError(
                Rejection.WRONG_LENGTH, f"chunk {index} has {len(payload)} bytes instead of {length}"
            )
        view = memoryview(payload)
        try:
            while view:
                written = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            self.have.discard(index)
            raise disk_error(error, self.path) from error
        self.have.add(index)

    def finish(self, target: Path) -> Path:
        """Check the whole, make it durable and move it to ``target``, atomically. Closes this object.

        Args:
            target: On the same file system; replaced if it exists.

        Returns:
            ``target``.

        Raises:
            ValueError: If chunks are missing.
            PeerError: ``wrong_hash`` if the whole is not the object; the file is then removed.
            ConfigError: If the disk is full or not writable.
        """
        self._require_all()
        try:
            self._file.seek(0)
            if file_digest(self._file, "sha256").hexdigest() != self.ref.sha256:
                self.discard()
                raise PeerError(
                    Rejection.WRONG_HASH, f"all chunks match but the whole is not {self.ref.sha256[:12]}"
                )
            os.fsync(self._file.fileno())
            self.path.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            raise disk_error(error, target) from error
        finally:
            self.close()
        return target

    def set_aside(self, target: Path) -> Path:
        """Move the whole to ``target`` as it is, atomically. Closes this object.

        For what can be fetched again and is checked as a whole where it is used: the chunks were checked one by one, so
        nothing is hashed once more, and nothing is synced (SD cards wear). After a power cut the file may be torn.

        Args:
            target: On the same file system; replaced if it exists.

        Returns:
            ``target``.

        Raises:
            ValueError: If chunks are missing.
            ConfigError: If the disk is not writable.
        """
        self._require_all()
        try:
            self.path.replace(target)
        except OSError as error:
            raise disk_error(error, target) from error
        finally:
            self.close()
        return target

    def discard(self) -> None:
        """Close and delete the file.

        Raises:
            ConfigError: If it cannot be deleted.
        """
        self.close()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def close(self) -> None:
        """Close the file and keep it for another time. Does nothing the second time."""
        self._file.close()

    def _require_all(self) -> None:
        if not self.complete:
            raise ValueError(f"{self.path}: {self.ref.chunks - len(self.have)} chunks are missing")

    def _discover(self) -> set[int]:
        size = os.fstat(self._file.fileno()).st_size
        have = set()
        for index in range(self.ref.chunks):
            offset, length = chunk_span(self.ref, index)
            if offset + length > size:
                break
            try:
                check_chunk(self.ref, index, os.pread(self._file.fileno(), length, offset))
            except PeerError:
                continue
            have.add(index)
        return have


def read_chunk(path: Path, ref: ObjectRef, index: int, *, check: bool = True) -> bytes:
    """Read one chunk of an object that is whole on disk, to send it.

    Args:
        path: The file.
        ref: What it holds.
        index: Of the chunk.
        check: Whether to compare the chunk with its digest, as every receiver does.

    Raises:
        PeerError: ``malformed`` if the object has no such chunk.
        VerificationError: If the file is not (or no longer) what ``ref`` describes.
        ConfigError: If the file cannot be read.
    """
    offset, length = chunk_span(ref, index)
    try:
        with path.open("rb", buffering=0) as file:
            payload = os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    if not check:
        return payload
    try:
        check_chunk(ref, index, payload)
    except PeerError as error:
        raise VerificationError(
            f"{path} changed since it was hashed ({error.detail}): delete it, it will be made again"
        ) from error
    return payload


def ref_of_file(path: Path, chunk_bytes: int) -> ObjectRef:
    """Describe a file cut into chunks of ``chunk_bytes``, without loading it.

    Raises:
        ConfigError: If the file cannot be read, is empty, or makes too many chunks.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            check_cut(length, chunk_bytes)
            return ref_of_chunks(_pieces(file, chunk_bytes), length, chunk_bytes)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def _pieces(file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    while piece := file.read(chunk_bytes):
        yield piece
