"""Files that are either the old one or the new one, whatever happens to the power."""

import errno
import os
import tempfile
from pathlib import Path

from federation.errors import ConfigError


def write_whole(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Replace ``path`` by ``data`` atomically and durably: temporary file, fsync, rename, fsync of the folder.

    Args:
        path: Target; its folder must exist.
        data: The whole content.
        mode: Permission bits of the new file.
        durable: Whether to wait for the disk. Without, a power cut within half a minute may leave a torn file: only for
            what is checked where it is read, and can be had again.

    Raises:
        ConfigError: If the disk is full or not writable; the old content is untouched.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), mode)
                if durable:
                    os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make renames and new files in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(error: OSError, path: Path) -> ConfigError:
    """Say what to do about a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(f"no space left on the disk that holds {path}: free some, nothing was lost")
    return ConfigError(f"cannot write {path}: {error.strerror or error}")
