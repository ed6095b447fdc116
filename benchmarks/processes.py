"""Child processes of a benchmark: their logs, their peak memory, and an end for all of them whatever happens."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.runner import REPOSITORY, BenchmarkError

POLL_S = 0.05
"""Between two readings of every child's high-water mark; what a process takes in its last moment may be missed."""

TERMINATE_S = 20.0
_TAIL_LINES = 15
_KIB_PER_MIB = 1024


@dataclass(slots=True)
class Child:
    """A process and what is known of it.

    Attributes:
        name: Also of its log.
        process: It.
        log: What it printed.
        peak_mb: High-water mark of its resident memory (Linux' VmHWM), MiB; 0 where the system does not tell.
    """

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    peak_mb: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.process.poll() is not None

    def look(self) -> None:
        """Read its high-water mark."""
        self.peak_mb = max(self.peak_mb, peak_mb(self.process.pid))

    def failure(self) -> str:
        """The end of its log, for a message."""
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return f"{self.name} ended with exit code {self.process.returncode}:\n" + "\n".join(lines)


class Children:
    """Starts, watches and ends processes; a context manager.

    Args:
        folder: For the logs; created.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._running: list[Child] = []
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(*self._running)
        self._over.set()
        self._watch.join()

    def start(
        self, name: str, *command: str, threads: int = 1, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Start a process whose output goes to ``NAME.log``.

        Args:
            name: Of the log; an earlier one of that name is added to.
            command: Program and arguments.
            threads: CPU threads that its numerical libraries may use.
            environment: Variables beyond those of this process.
        """
        log = self._folder / f"{name}.log"
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,  # Opacus installs a package of its own that is called benchmarks: ours is found first
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | limits | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),
                start_new_session=True,  # Ctrl-C reaches the benchmark, which then stops its children in order
            )
        child = Child(name, process, log)
        self._running.append(child)
        return child

    def wait(self, child: Child, timeout_s: float) -> None:
        """Wait until ``child`` has ended well, while no other one ends badly.

        Raises:
            BenchmarkError: If one ends with an error, or at the timeout.
        """
        self.until(lambda: child.ended, timeout_s, f"{child.name} ended")

    def until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Poll until ``condition`` is true, while no child ends badly.

        Raises:
            BenchmarkError: If one does, or at the timeout.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            self._check()
            if time.monotonic() > deadline:
                raise BenchmarkError(f"not within {timeout_s:.0f} s: {what}")
            time.sleep(POLL_S)
        self._check()

    def stop(self, *children: Child) -> None:
        """End processes, politely first."""
        for child in children:
            child.look()
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
        for child in children:
            try:
                child.process.wait(TERMINATE_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._running = [child for child in self._running if child not in children]

    def _check(self) -> None:
        for child in self._running:
            if child.ended and child.process.returncode:
                raise BenchmarkError(child.failure())

    def _look(self) -> None:
        while not self._over.wait(POLL_S):
            for child in list(self._running):
                child.look()


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a Python module in this environment."""
    return [sys.executable, "-m", name, *arguments]


def python(code: str, *arguments: str) -> list[str]:
    """The command that runs a few lines of Python in this environment."""
    return [sys.executable, "-c", code, *arguments]


def peak_mb(pid: int) -> float:
    """High-water mark of a process's resident memory, MiB; 0 if it is gone, or the system is not Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / _KIB_PER_MIB
    return 0.0
