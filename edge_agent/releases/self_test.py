"""Whether a release works on this very device, found out in a process that may die of it.

``self_test`` is the parent's side. The child (``self_test_child``) answers the golden
set, compares, and measures. What it uses is bounded:

* *Memory*: ``RLIMIT_DATA``, set once the libraries are loaded, to what they have plus what is left of the allowance. It
  counts writable private memory when it is asked for, so onnxruntime is told no (and says so) before the device swaps.
  ``RLIMIT_AS`` would count address space that nobody uses, and looking at the resident size now and then comes too late
  for a model that takes a gigabyte at once. In the end the largest resident size is compared too.
* *Time*: the parent kills it; if the parent is gone, an alarm of its own does.
* *The camera's part of the CPU*: it is nice, and the first that the kernel takes when memory runs out all the same.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from federation.errors import ConfigError, FedgeError, ReleaseError, ReleaseFault

if TYPE_CHECKING:
    import threading

DEFAULT_TIMEOUT_S = 120.0
"""Python and onnxruntime take ten seconds to load on a Raspberry Pi whose card is busy."""

REPEATS = 20
"""Runs over each golden frame, if there is time for so many."""

MAX_DETAIL = 600

_POLL_S = 0.2
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NO_MEMORY = re.compile(r"bad_alloc|bad allocation|allocate memory|MemoryError", re.IGNORECASE)
"""How C++, onnxruntime's arena and Python say that they were given no memory."""

_KEPT_ENVIRONMENT = re.compile(
    r"PATH|HOME|TMPDIR|TZ|LANG|LC_\w+|LD_LIBRARY_PATH|PYTHON\w*|VIRTUAL_ENV|COVERAGE\w*"
)
"""What Python needs to start. Passwords may stand in the rest."""


class TestReport(Struct, frozen=True, kw_only=True):
    """What a release needs on this device.

    Attributes:
        p50_ms: Milliseconds from frame to label, undisturbed: of each golden frame the fastest of up to :data:`REPEATS` runs,
            and of these the median.
        p99_ms: Of these the 99th percentile. A hiccup does not count here; in real operation it does, while on probation.
        rss_mb: Largest resident size of the child, MiB; Python and onnxruntime included.
    """

    __test__ = False  # pytest would take it for a test

    p50_ms: float
    p99_ms: float
    rss_mb: float


class TestStoppedError(FedgeError):
    """The self-test was ended because the process stops: nothing is known about the release."""

    __test__ = False


class Outcome(Struct, frozen=True):
    """What the child prints."""

    report: TestReport | None = None
    fault: ReleaseFault | None = None
    detail: str = ""


def self_test(
    folder: Path,
    *,
    threads: int,
    max_latency_ms: float,
    max_memory_mb: int,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    stop: "threading.Event | None" = None,
) -> TestReport:
    """Test a release folder in a process of its own.

    Args:
        folder: Whose model and golden set have the hashes that were signed.
        threads: CPU threads for the model, as it will have in operation.
        max_latency_ms: Refused with a larger ``p99_ms``; 0 is no limit.
        max_memory_mb: Refused with a larger ``rss_mb``.
        timeout_s: Killed after so many seconds.
        stop: Ends the test when it is set.

    Raises:
        ReleaseError: ``broken``, ``wrong_shape``, ``wrong_answer``, ``non_finite``, ``too_slow``, ``too_big``, ``crashed``,
            or ``malformed`` for a golden set that is none.
        TestStoppedError: If ``stop`` was set.
        ConfigError: If the process cannot be started.
    """
    limits = [str(number) for number in (threads, max_latency_ms, max_memory_mb, timeout_s)]
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.releases.self_test_child", str(folder.absolute()), *limits],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"cannot start the self-test of a release: {error.strerror or error}") from error
    with child:
        try:
            output, complaints = _wait(child, timeout_s, stop)
        except BaseException:
            child.kill()
            raise
    return _judge(child.returncode, output, complaints)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if _KEPT_ENVIRONMENT.fullmatch(name)}
    # numpy's linear algebra would reserve memory for a thread per core and use none of it.
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _wait(
    child: "subprocess.Popen[bytes]", timeout_s: float, stop: "threading.Event | None"
) -> tuple[bytes, str]:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            output, complaints = child.communicate(
                timeout=min(_POLL_S, max(0.0, deadline - time.monotonic()))
            )
        except subprocess.TimeoutExpired as error:
            if stop is not None and stop.is_set():
                raise TestStoppedError("the self-test was stopped") from error
            if time.monotonic() >= deadline:
                raise ReleaseError(
                    ReleaseFault.TOO_SLOW, f"the self-test took more than {timeout_s:g} s"
                ) from error
        else:
            return output, _COLOUR.sub("", complaints.decode(errors="replace"))


def _judge(status: int, output: bytes, complaints: str) -> TestReport:
    if status == 0:
        try:
            outcome = msgspec.json.decode(output, type=Outcome)
        except msgspec.DecodeError:
            outcome = Outcome(fault=ReleaseFault.CRASHED, detail="the self-test ended without a result")
        if outcome.report is not None:
            return outcome.report
        raise ReleaseError(outcome.fault or ReleaseFault.CRASHED, outcome.detail)
    last = " ".join(complaints.split())[-MAX_DETAIL:]
    how = f"exit status {status}" if status > 0 else f"signal {-status} ({signal.strsignal(-status)})"
    fault = ReleaseFault.CRASHED
    if NO_MEMORY.search(complaints) or -status == signal.SIGKILL:  # the kernel's, when memory runs out
        fault = ReleaseFault.TOO_BIG
    elif -status == signal.SIGALRM:
        fault = ReleaseFault.TOO_SLOW
    raise ReleaseError(fault, f"the self-test ended with {how}: {last}")
