"""Bytes that are on disk when a call returns."""

import os
import tempfile
from pathlib import Path


def replace(path: Path, data: bytes) -> None:
    """Replace a file's content atomically: temporary file, fsync, rename, fsync of the folder.

    Raises:
        OSError: The old content is untouched, unless it was the last fsync that failed.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append(handle: int, data: bytes) -> None:
    """Append to an open file and wait for the disk.

    Args:
        handle: Opened with ``O_APPEND``.
        data: Some of it may be there after a failure.

    Raises:
        OSError: If the disk is full or fails.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
