"""The process that tries a release and may die of it; started by ``self_test``, which says how it is bounded."""

import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_agent.releases.self_test import MAX_DETAIL, NO_MEMORY, REPEATS, Outcome, TestReport
from federation.errors import ConfigError, NonFiniteError, ReleaseError, ReleaseFault, VerificationError
from federation.release import GOLDEN_FILE, MODEL_FILE

if TYPE_CHECKING:
    import numpy as np

    from federation.task.engine import Engine, Prediction

MEASURE_S = 5.0
"""All frames together are timed for no longer than this; each at least once."""

_NICE = 10
_GRACE_S = 5
"""Seconds that this process lives on when nobody has killed it in time."""

_TOP = 5
"""Classes of an answer that are compared: the right one, and those with which it may be tied."""

_SLACK_BYTES = 8 * 2**20
"""Data beyond the allowance for what is never resident: the stack that each further thread reserves."""


def try_release(folder: Path, *, threads: int, max_latency_ms: float, max_memory_mb: int) -> Outcome:
    """Test a release in this process, whose memory is limited from then on."""
    from federation.task.engine import Engine
    from federation.task.golden import check_answers, read_golden

    libraries_mb = _peak_mb()
    allowed_mb = _limit_memory(max_memory_mb)
    try:
        golden = read_golden(folder / GOLDEN_FILE)
        try:
            engine = Engine(folder / MODEL_FILE, threads=threads, top=_TOP)
        except (ConfigError, VerificationError, MemoryError) as error:
            raise ReleaseError(_fault_of(error), str(error)) from error
        predictions, best_ms = _answer(engine, golden.frames)
        check_answers(golden, predictions)
        report = _report(best_ms)
        if report.rss_mb > allowed_mb:
            raise ReleaseError(ReleaseFault.TOO_BIG, f"{report.rss_mb:.0f} MiB")
    except ReleaseError as error:
        detail = " ".join(error.detail.split())  # onnxruntime writes several lines
        if error.fault is ReleaseFault.TOO_BIG:
            why = "max_memory_mb" if allowed_mb == max_memory_mb else "all that this device has free now"
            detail += (
                f"; may use {allowed_mb} MiB ({why}), of which Python and onnxruntime take {libraries_mb:.0f}"
            )
        return Outcome(fault=error.fault, detail=detail[-MAX_DETAIL:])
    if max_latency_ms and report.p99_ms > max_latency_ms:
        return Outcome(
            fault=ReleaseFault.TOO_SLOW,
            detail=f"{report.p99_ms:.1f} ms from frame to label (99th percentile, undisturbed), at most {max_latency_ms:g} "
            "(max_latency_ms)",
        )
    return Outcome(report=report)


def _be_modest(timeout_s: float) -> None:
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would fill the card
    signal.alarm(int(timeout_s) + _GRACE_S)
    with suppress(
        OSError
    ):  # not Linux, or a container that shows no such thing: the kernel chooses by size then
        Path("/proc/self/oom_score_adj").write_text("1000")


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


def _answer(engine: "Engine", frames: "Sequence[np.ndarray]") -> "tuple[list[Prediction], list[float]]":
    """What the model says about each frame, and the milliseconds of the fastest run over each."""
    predictions: list[Prediction] = []
    best_ms = [float("inf")] * len(frames)
    started = time.perf_counter()
    for repeat in range(REPEATS):
        for number, frame in enumerate(frames):
            before = time.perf_counter()
            try:
                prediction = engine.predict(frame)
            except (VerificationError, MemoryError) as error:
                raise ReleaseError(_fault_of(error), str(error)) from error
            after = time.perf_counter()
            best_ms[number] = min(best_ms[number], (after - before) * 1000)
            if repeat == 0:
                predictions.append(prediction)
            elif after - started > MEASURE_S:
                return predictions, best_ms
    return predictions, best_ms


def _fault_of(error: BaseException) -> ReleaseFault:
    """What a model has done that cannot be loaded, or cannot answer (``federation.task.engine``)."""
    if NO_MEMORY.search(f"{type(error).__name__}: {error}"):
        return ReleaseFault.TOO_BIG
    if isinstance(error, ConfigError) or error.__cause__ is not None:  # onnxruntime's own
        return ReleaseFault.BROKEN
    return ReleaseFault.NON_FINITE if isinstance(error, NonFiniteError) else ReleaseFault.WRONG_SHAPE


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
    """Print the outcome as JSON."""
    folder, threads, max_latency_ms, max_memory_mb, timeout_s = arguments
    _be_modest(float(timeout_s))  # before the libraries are loaded: that takes seconds of CPU
    outcome = try_release(
        Path(folder),
        threads=int(threads),
        max_latency_ms=float(max_latency_ms),
        max_memory_mb=int(max_memory_mb),
    )
    sys.stdout.buffer.write(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main(sys.argv[1:])
