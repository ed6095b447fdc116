"""What an exported model is worth on this machine: size, accuracy, latency, memory, beside PyTorch's eager mode.

Each model runs in a process of its own (:mod:`export.benchmark_worker`), which tells its memory. The processes are asked
in turn, burst by burst, so that what else the machine does hits all of them alike; a ratio of two of them is then steadier
than either. Works on a device, without torch and onnx.
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import IO, Self, TypeVar

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from export.benchmark_messages import Answer, Burst, Failed, Latencies, Load, Loaded, Request, Score, Scored
from federation.errors import ConfigError, ExitCode, VerificationError
from federation.release import MODEL_FILE
from federation.task.checkpoint import FOLDER, find_checkpoint

BURSTS = 5
"""Of each model. A figure is the median over them, and its spread is theirs."""

DEFAULT_SECONDS = 4.0
"""For each model, over all bursts: a hundred runs of a model of 40 ms."""

DEFAULT_LIMIT = 2000
"""Test images: accuracy to within a point or two, and differences of models on the same images more closely."""

HEADINGS = (
    *("file", "format", "MB", "top-1", "frame", "p50 ms", "p99 ms", "model ms", "speed"),
    *("RSS MB", "peak MB"),
)
TEXT_COLUMNS = 2
"""The first ones; numbers stand at the right."""

T = TypeVar("T", Loaded, Latencies, Scored)


class Row(Struct, frozen=True, kw_only=True):
    """What was measured of one model.

    Attributes:
        file: As it was named.
        runtime: ``onnxruntime 1.31.1``, say.
        format: Of the weights; ``fused`` if preprocessing is in the graph.
        model: Name of the architecture.
        size_mb: Of the file, 10^6 bytes.
        frame: Height, width and channels of the raw frames.
        top1: Share of the test images classified rightly, in [0, 1]; None without data.
        images: Test images.
        p50_ms: Milliseconds from a raw frame to a label; median of the bursts' medians.
        p99_ms: 99th percentile over all bursts.
        model_p50_ms: Of the model alone, on an input of its own size (a fused graph has preprocessing and top-k in it).
        burst_ms: The bursts' medians from a raw frame to a label, in order. What stands at the same place in another row was
            measured seconds before or after.
        model_burst_ms: The same of the model alone.
        rss_mb: Resident memory of a fresh process that only runs this model, MiB.
        peak_mb: The most that it ever was: loading takes more than running.
    """

    file: str
    runtime: str
    format: str
    model: str
    size_mb: float
    frame: tuple[int, int, int]
    top1: float | None
    images: int
    p50_ms: float
    p99_ms: float
    model_p50_ms: float
    burst_ms: tuple[float, ...]
    model_burst_ms: tuple[float, ...]
    rss_mb: float
    peak_mb: float


def benchmark(
    models: Sequence[Path],
    *,
    data: str | None = None,
    limit: int = DEFAULT_LIMIT,
    threads: int = 1,
    frame: tuple[int, int] | None = None,
    seconds: float = DEFAULT_SECONDS,
) -> list[Row]:
    """Measure models side by side.

    Args:
        models: ONNX files, release folders, checkpoints (run by torch), or aggregators' state folders (their newest
            checkpoint).
        data: Spec of labelled images, whose test split is classified; None measures no accuracy.
        limit: Test images, spread evenly; 0 takes all.
        threads: CPU threads of each model.
        frame: Height and width of raw frames; None takes 480x640, and a grey model's own size.
        seconds: For each model.

    Returns:
        One row for each model, in their order.

    Raises:
        ConfigError: If a model or the data cannot be used.
        VerificationError: If a model fails, or its process ends.
    """
    requests = [Load(path=str(_model_file(path)), threads=threads, frame=frame) for path in models]
    rows = side_by_side(requests, data=data, limit=limit, seconds=seconds)
    return [replace(row, file=str(path)) for row, path in zip(rows, models, strict=True)]


def side_by_side(requests: Sequence[Load], *, data: str | None, limit: int, seconds: float) -> list[Row]:
    """As :func:`benchmark`, for files that are there.

    Raises:
        ConfigError: If a model or the data cannot be used.
        VerificationError: If a model fails, or its process ends.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(request.path)) for request in requests]
        loaded = [worker.ask(request, Loaded) for worker, request in zip(workers, requests, strict=True)]
        bursts = [
            [worker.ask(Burst(seconds=seconds / BURSTS), Latencies) for worker in workers]
            for _ in range(BURSTS)
        ]
        scores = [
            worker.ask(Score(data=data, limit=limit), Scored) if data else Scored(images=0, right=0)
            for worker in workers
        ]
    by_model = zip(*bursts, strict=True)
    return [_row(*each) for each in zip(requests, loaded, by_model, scores, strict=True)]


def speedups(row: Row, eager: Row) -> list[float]:
    """How many times as fast as another a model is, burst by burst: each ratio is of neighbours in time."""
    return [slow / fast for slow, fast in zip(eager.burst_ms, row.burst_ms, strict=True)]


def table(rows: Sequence[Row]) -> str:
    """The rows for people: one line for each model, with how many times as fast as torch's it is where that is there too."""
    eager = {row.model: row for row in rows if row.runtime.startswith("torch")}
    lines = [HEADINGS]
    for row in rows:
        height, width, channels = row.frame
        lines.append(
            (
                row.file,
                row.format if row.runtime.startswith("onnxruntime") else row.runtime,
                f"{row.size_mb:.2f}",
                "-" if row.top1 is None else f"{row.top1:.2%}",
                f"{width}x{height}x{channels}",
                f"{row.p50_ms:.3g}",
                f"{row.p99_ms:.3g}",
                f"{row.model_p50_ms:.3g}",
                f"{median(speedups(row, eager[row.model])):.2f}x" if row.model in eager else "-",
                f"{row.rss_mb:.0f}",
                f"{row.peak_mb:.0f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


class _Worker:
    """A process with one model; a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "export.benchmark_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._pipe(self._process.stdin).close()  # the end of its requests
        self._process.wait()
        self._pipe(self._process.stdout).close()
        self._stderr.close()

    def ask(self, request: Request, kind: type[T]) -> T:
        """Send a request and wait for its answer.

        Raises:
            ConfigError: If the model or the data cannot be used.
            VerificationError: If the model fails, or the process ends.
        """
        try:
            stdin = self._pipe(self._process.stdin)
            stdin.write(msgspec.json.encode(request) + b"\n")
            stdin.flush()
        except BrokenPipeError:
            line = b""
        else:
            line = self._pipe(self._process.stdout).readline()
        if not line:
            raise VerificationError(f"{self.path}: the process that ran it ended, {self._told()}")
        answer = msgspec.json.decode(line, type=Answer)
        if isinstance(answer, Failed):
            raised = VerificationError if answer.exit_code == ExitCode.VERIFICATION else ConfigError
            raise raised(answer.message)
        assert isinstance(answer, kind), answer
        return answer

    def _told(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"with {code}: {lines[-1]}" if lines else f"with {code} and without a word"

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None  # Popen was asked for all three
        return pipe


def _model_file(path: Path) -> Path:
    if path.is_dir():
        if (path / MODEL_FILE).is_file():
            return path / MODEL_FILE
        if (path / FOLDER).is_dir():
            return find_checkpoint(path)
        raise ConfigError(
            f"{path} is neither a release folder (it has no {MODEL_FILE}) nor an aggregator's state folder (no {FOLDER})"
        )
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: name ONNX files, release folders or checkpoints")
    return path


def _row(request: Load, loaded: Loaded, bursts: Sequence[Latencies], scored: Scored) -> Row:
    middles = tuple(median(burst.whole) for burst in bursts)
    model_middles = tuple(median(burst.model) for burst in bursts)
    whole = np.concatenate([burst.whole for burst in bursts])
    return Row(
        file=request.path,
        runtime=loaded.runtime,
        format=loaded.format,
        model=loaded.model,
        size_mb=loaded.bytes / 1e6,
        frame=loaded.frame,
        top1=scored.right / scored.images if scored.images else None,
        images=scored.images,
        p50_ms=median(middles),
        p99_ms=float(np.percentile(whole, 99)),
        model_p50_ms=median(model_middles),
        burst_ms=middles,
        model_burst_ms=model_middles,
        rss_mb=median(burst.rss_mb for burst in bursts),
        peak_mb=max(burst.peak_mb for burst in bursts),
    )
