"""``edge-agent infer`` as a child of ``edge-agent run``: one service trains and labels, in two processes.

Inference never shares a process with PyTorch: neither its memory, nor its crashes, nor its locks.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog

from edge_agent.watchdog import ChildWatch
from federation.children import dying_with_us
from federation.errors import ConfigError

log = structlog.get_logger()

RETRY_MIN_S: Final = 1.0
"""After a crash: a release that crashes the process is given up after a few starts, so these should come soon."""

RETRY_MAX_S: Final = 300.0

STEADY_S: Final = 60.0
"""A process that lived this long was a good one: the next wait is short again."""

STOP_S: Final = 20.0
"""After SIGTERM, before SIGKILL: it says goodbye to the broker, and may be in the middle of an activation."""

SILENT_S: Final = 60.0
"""Twelve turns of its loop without one sign of life: its model hangs, or its camera has been stuck for a minute before."""

START_S: Final = 300.0
"""Until its first sign: imports from a worn SD card, beside PyTorch that does the same."""

LOOK_S: Final = 0.2
"""Between two looks at whether it has ended or hangs."""

ABORT_S: Final = 5.0
"""After SIGABRT, at which it prints where each thread is, before SIGKILL."""


class InferenceChild:
    """Keeps one process running until it is told to end, or the process ends by itself without a fault.

    Args:
        arguments: Of ``edge-agent infer``.
        command: What is run with them.
        retry_min_s: First wait after a crash, seconds; it doubles.
        silent_s: Seconds without a sign of life (``edge_agent.watchdog``) after which it hangs, and is started again.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        command: Sequence[str] = (sys.executable, "-m", "edge_agent.cli", "infer"),
        retry_min_s: float = RETRY_MIN_S,
        silent_s: float = SILENT_S,
    ) -> None:
        self._command = dying_with_us([*command, *arguments])
        self._retry_min_s = retry_min_s
        self._watch = ChildWatch(silent_s, START_S)
        self._child: subprocess.Popen[bytes] | None = None
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            self._stopping.set()
            child = self._child
        if child is not None:
            _end(child)
        self._thread.join()
        self._watch.close()

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        child = self._child
        return None if child is None or child.poll() is not None else child.pid

    def _run(self) -> None:
        pause_s = self._retry_min_s
        while not self._stopping.is_set():
            started = time.monotonic()
            reason = self._live_once()
            if reason is None or self._stopping.is_set():
                return
            if time.monotonic() > started + STEADY_S:
                pause_s = self._retry_min_s
            log.error(
                "inference_ended",
                reason=reason,
                lost="labels, until it runs again; training goes on",
                retry_s=pause_s,
                remedy="what it printed before says why",
            )
            self._stopping.wait(pause_s)
            pause_s = min(RETRY_MAX_S, 2 * pause_s)

    def _live_once(self) -> str | None:
        """Run the process to its end.

        Returns:
            Why it must run again; None if its source has ended.
        """
        try:
            with self._guard:
                if self._stopping.is_set():
                    return None
                self._watch.started()
                # Its log goes where ours goes. What it would print for a person has no reader here.
                self._child = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=self._watch.environment(os.environ) | {"PYTHONFAULTHANDLER": "1"},
                    start_new_session=True,  # Ctrl-C is for the agent, which ends it in order
                )
        except OSError as error:
            return f"it cannot be started: {error.strerror or error}"
        log.info("inference_started", pid=self._child.pid)
        status = self._until_it_ends(self._child)
        if status is None:
            return "it hung"
        if status == 0:
            log.info("inference_source_ended")
            return None
        return f"killed by signal {-status}" if status < 0 else f"exit code {status}"

    def _until_it_ends(self, child: "subprocess.Popen[bytes]") -> int | None:
        """Its exit status; None if it hung and was killed."""
        while child.poll() is None:
            if self._stopping.wait(LOOK_S):
                return child.wait()  # it is ended by who has set this
            if self._watch.hung():
                log.error(
                    "inference_hung", pid=child.pid, remedy="where each of its threads was is printed next"
                )
                _end(child, signal.SIGABRT, ABORT_S)
                return None
        return child.returncode


def inference_beside(
    bundle: Path, source: str, flags: Mapping[str, object]
) -> "InferenceChild | nullcontext[None]":
    """What labels frames while this process trains.

    Args:
        bundle: Of the device.
        source: Of frames; empty where nothing is to be labelled.
        flags: Flags of ``edge-agent infer`` and their values; those that are None were not given.

    Raises:
        ConfigError: If the source is stdin, which a service does not have.
    """
    if not source:
        return nullcontext()
    if source == "-":
        raise ConfigError(
            "--source - reads paths from stdin, which `run` does not: name a camera, stream, file or folder, or use `infer`"
        )
    given = [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]
    return InferenceChild([str(bundle), *given])


def _end(
    child: "subprocess.Popen[bytes]", number: signal.Signals = signal.SIGTERM, patience_s: float = STOP_S
) -> None:
    child.send_signal(number)
    try:
        child.wait(patience_s)
    except subprocess.TimeoutExpired:
        log.warning("inference_killed", pid=child.pid, after_s=patience_s, lost="nothing")
        child.kill()
        child.wait()
