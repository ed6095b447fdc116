"""Whether a release works on this very device, found out in a process that may die of it.

``self_test`` is the parent's side. The child (``python -m edge_agent.inference.self_test FOLDER ...``) answers the golden
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
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Never

import msgspec
from msgspec import Struct

from federation.errors import ConfigError, FedgeError, ReleaseError, ReleaseFault, VerificationError

if TYPE_CHECKING:
    import threading

    import numpy as np

    from federation.task.engine import Engine, Prediction

DEFAULT_TIMEOUT_S = 120.0
"""Python and onnxruntime take ten seconds to load on a Raspberry Pi whose card is busy."""

REPEATS = 20
MEASURE_S = 5.0
"""A frame is timed up to so often, as long as all together take no more than this; every frame at least once."""

_NICE = 10
_POLL_S = 0.2
_GRACE_S = 5
"""Seconds that the child lives on when nobody has killed it in time."""

_TOP = 5
"""Classes of an answer that are compared: the right one, and those with which it may be tied."""

_SLACK_BYTES = 8 * 2**20
"""Data beyond the allowance for what is never resident: the stack that each further thread reserves."""

_MAX_DETAIL = 600
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NO_MEMORY = re.compile(r"bad_alloc|bad allocation|allocate memory|MemoryError", re.IGNORECASE)
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


class _Outcome(Struct, frozen=True):
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
            [sys.executable, "-m", "edge_agent.inference.self_test", str(folder.absolute()), *limits],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"cannot start the self-test of a release: {error.strerror or error}") from error
    try:
        output, complaints = _wait(child, timeout_s, stop)
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
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
            outcome = msgspec.json.decode(output, type=_Outcome)
        except msgspec.DecodeError:
            outcome = _Outcome(fault=ReleaseFault.CRASHED, detail="the self-test ended without a result")
        if outcome.report is not None:
            return outcome.report
        raise ReleaseError(outcome.fault or ReleaseFault.CRASHED, outcome.detail)
    last = complaints.strip()[-_MAX_DETAIL:]
    how = f"exit status {status}" if status > 0 else f"signal {-status} ({signal.strsignal(-status)})"
    fault = ReleaseFault.CRASHED
    if _NO_MEMORY.search(complaints) or -status == signal.SIGKILL:  # the kernel's, when memory runs out
        fault = ReleaseFault.TOO_BIG
    elif -status == signal.SIGALRM:
        fault = ReleaseFault.TOO_SLOW
    raise ReleaseError(fault, f"the self-test ended with {how}: {last}")


def _run_child(
    folder: Path, *, threads: int, max_latency_ms: float, max_memory_mb: int, timeout_s: float
) -> _Outcome:
    """Test a release in this process, which is the child's."""
    _be_modest(timeout_s)
    from federation.release import GOLDEN_FILE, MODEL_FILE
    from federation.task.engine import Engine
    from federation.task.golden import check_answers, read_golden

    libraries_mb = _peak_mb()
    allowed_mb = _limit_memory(max_memory_mb)
    try:
        golden = read_golden(folder / GOLDEN_FILE)
        engine = _load(lambda: Engine(folder / MODEL_FILE, threads=threads, top=_TOP))
        predictions, best_ms = _answer(engine, golden.frames)
        check_answers(golden, predictions)
        report = _report(best_ms)
        if report.rss_mb > allowed_mb:
            raise ReleaseError(ReleaseFault.TOO_BIG, f"{report.rss_mb:.0f} MiB")
    except ReleaseError as error:
        detail = error.detail
        if error.fault is ReleaseFault.TOO_BIG:
            why = "max_memory_mb" if allowed_mb == max_memory_mb else "all that this device has free now"
            detail += (
                f"; may use {allowed_mb} MiB ({why}), of which Python and onnxruntime take {libraries_mb:.0f}"
            )
        return _Outcome(fault=error.fault, detail=detail[-_MAX_DETAIL:])
    if max_latency_ms and report.p99_ms > max_latency_ms:
        return _Outcome(
            fault=ReleaseFault.TOO_SLOW,
            detail=f"{report.p99_ms:.1f} ms from frame to label (99th percentile, undisturbed), at most {max_latency_ms:g} "
            "(max_latency_ms)",
        )
    return _Outcome(report=report)


def _be_modest(timeout_s: float) -> None:
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would fill the card
    signal.alarm(int(timeout_s) + _GRACE_S)
    adjust = Path("/proc/self/oom_score_adj")
    if adjust.exists():
        adjust.write_text("1000")


def _limit_memory(max_memory_mb: int) -> int:
    """Have more refused than this process may take, and return that, in MiB: no more than the device has free."""
    status = _sizes("/proc/self/status")
    if "VmData" not in status:  # not Linux: only the comparison in the end is left
        return max_memory_mb
    free_mb = (status["VmRSS"] + _sizes("/proc/meminfo")["MemAvailable"]) >> 20
    allowed_mb = min(max_memory_mb, free_mb)
    left = max(0, (allowed_mb << 20) - status["VmRSS"])
    limit = status["VmData"] + left + _SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return allowed_mb


def _load(make: "Callable[[], Engine]") -> "Engine":
    try:
        return make()
    except VerificationError as error:
        raise ReleaseError(ReleaseFault.WRONG_SHAPE, str(error)) from error
    except (ConfigError, MemoryError) as error:
        _refuse(error)


def _answer(engine: "Engine", frames: "Sequence[np.ndarray]") -> "tuple[list[Prediction], list[float]]":
    """What the model says about each frame, and the milliseconds of the fastest run over each."""
    predictions: list[Prediction] = []
    best_ms = [float("inf")] * len(frames)
    started = time.perf_counter()
    try:
        for repeat in range(REPEATS):
            for number, frame in enumerate(frames):
                before = time.perf_counter()
                prediction = engine.predict(frame)
                after = time.perf_counter()
                best_ms[number] = min(best_ms[number], (after - before) * 1000)
                if repeat == 0:
                    predictions.append(prediction)
                elif after - started > MEASURE_S:
                    return predictions, best_ms
    except VerificationError as error:
        raise ReleaseError(ReleaseFault.NON_FINITE, str(error)) from error
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no base class
        _refuse(error)
    return predictions, best_ms


def _refuse(error: BaseException) -> Never:
    text = f"{type(error).__name__}: {error}"
    fault = ReleaseFault.TOO_BIG if _NO_MEMORY.search(text) else ReleaseFault.BROKEN
    raise ReleaseError(fault, str(error)) from error


def _report(best_ms: list[float]) -> TestReport:
    import numpy as np

    p50, p99 = np.quantile(best_ms, [0.5, 0.99])
    return TestReport(p50_ms=float(p50), p99_ms=float(p99), rss_mb=_peak_mb())


def _peak_mb() -> float:
    """Largest resident size so far, MiB. Not ``ru_maxrss``, in which that of the process that made this one is left."""
    status = _sizes("/proc/self/status")
    peak = status.get("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
    return peak / 2**20


def _sizes(path: str) -> dict[str, int]:
    """The sizes that Linux tells in one of its tables, in bytes; nothing elsewhere."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    sized = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(kib) << 10 for name, kib, _ in sized}


def main(arguments: Sequence[str]) -> None:
    """The child."""
    folder, threads, max_latency_ms, max_memory_mb, timeout_s = arguments
    outcome = _run_child(
        Path(folder),
        threads=int(threads),
        max_latency_ms=float(max_latency_ms),
        max_memory_mb=int(max_memory_mb),
        timeout_s=float(timeout_s),
    )
    sys.stdout.buffer.write(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main(sys.argv[1:])
