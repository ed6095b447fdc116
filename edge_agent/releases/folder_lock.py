"""One process at a time: a lock that the kernel takes back when the process ends, however it ends."""

import fcntl
import os
import time
from pathlib import Path

from federation.errors import ConfigError
from federation.files import disk_error

LOCK_S = 2.0
"""How long to wait for the lock. A process that is killed while it starts a self-test leaves the lock with its child until
that child has become another program."""

_POLL_S = 0.02


class FolderLock:
    """The lock on a folder, held until :meth:`close`.

    Args:
        path: The lock file; created where it is not there.

    Raises:
        ConfigError: If another process holds it, or the disk is not writable.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            _lock(self._handle, path.parent)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have it. Does nothing the second time."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _lock(handle: int, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another `edge-agent infer` or `edge-agent run` uses {folder}: stop it, or give this one its own "
                    "--state"
                ) from error
            time.sleep(_POLL_S)
        else:
            return
