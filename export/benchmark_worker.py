"""One model in a process of its own, measured in short bursts on request: ``python -m export.benchmark_worker``.

A fresh process for each model tells what memory it takes; bursts let several models be measured in turn, so that what
else the machine does hits them alike. Requests and answers are JSON lines on stdin and stdout.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec
import numpy as np
from PIL import Image

from export.benchmark_messages import Answer, Burst, Failed, Latencies, Load, Loaded, Request, Score, Scored
from federation.errors import ConfigError, ExitCode, FedgeError
from federation.task.preprocessing import PICTURE_MODES
from federation.wire.messages import TaskSpec

CHECKPOINT_SUFFIX = ".safetensors"

CAMERA = (480, 640)
"""Height and width of a camera's frame; a model of grey pictures gets frames of its own size, from a sensor of that kind."""

LEAST_RUNS = 5
"""In each half of a burst, however slow a run is."""

_SEED = 5
_MIB = 1 << 20
_KIB_PER_MIB = 1024
_GREY = 1


class Subject(Protocol):
    """What is measured.

    Attributes:
        loaded: What it is.
        task: Its labels and its size.
    """

    loaded: Loaded
    task: TaskSpec

    def label(self, picture: np.ndarray) -> str:
        """From a raw picture to a label."""

    def run(self, runs: int) -> None:
        """Run the model alone."""


class _Exported:
    """An ONNX file in onnxruntime, as a device runs it."""

    def __init__(self, request: Load) -> None:
        import onnxruntime as ort

        from federation.task.engine import Engine

        path = Path(request.path)
        self._engine = Engine(path, threads=request.threads, top=1)
        card = self._engine.card
        recipe = card.preprocessing
        self.task = TaskSpec(
            model=card.provenance.model,
            labels=card.labels,
            channels=recipe.channels,
            height=recipe.height,
            width=recipe.width,
            mean=recipe.mean,
            std=recipe.std,
        )
        fused = " fused" if card.preprocess == "fused" else ""
        self.loaded = _loaded(
            path,
            f"onnxruntime {ort.__version__}",
            f"{card.provenance.weights}{fused}",
            self.task,
            request.frame,
        )

    def label(self, picture: np.ndarray) -> str:
        return self._engine.predict(picture).label

    def run(self, runs: int) -> None:
        self._engine.warm_up(runs)


class _Eager:
    """A checkpoint in PyTorch."""

    def __init__(self, request: Load) -> None:
        import torch

        from export.eager import Eager

        path = Path(request.path)
        self._eager = Eager(path, threads=request.threads, tuned=request.tuned)
        self.task = self._eager.task
        self._inputs = np.zeros((1, self.task.channels, self.task.height, self.task.width), np.float32)
        version = torch.__version__.partition("+")[0]
        self.loaded = _loaded(
            path,
            f"torch {version}{' by hand' if request.tuned else ' eager'}",
            "fp32",
            self.task,
            request.frame,
        )

    def label(self, picture: np.ndarray) -> str:
        return self._eager.label(picture)

    def run(self, runs: int) -> None:
        for _ in range(runs):
            self._eager.run(self._inputs)


def _loaded(path: Path, runtime: str, weights: str, task: TaskSpec, frame: tuple[int, int] | None) -> Loaded:
    own = (task.height, task.width)
    if frame is None:
        frame = own if task.channels == _GREY else CAMERA
    return Loaded(
        runtime=runtime,
        format=weights,
        model=task.model,
        frame=(*frame, task.channels),
        bytes=path.stat().st_size,
    )


class Worker:
    """Carries out requests, one after the other."""

    def __init__(self) -> None:
        self._subject: Subject | None = None
        self._frame = np.empty(0, np.uint8)

    def answer(self, request: Request) -> Answer:
        """Do what is asked.

        Raises:
            FedgeError: If the model or the data cannot be used.
        """
        match request:
            case Load():
                return self._load(request)
            case Burst(seconds=seconds):
                return self._burst(seconds)
            case Score(data=data, limit=limit):
                return self._score(data, limit)

    def _load(self, request: Load) -> Loaded:
        kind = _Eager if request.path.endswith(CHECKPOINT_SUFFIX) else _Exported
        subject: Subject = kind(request)
        height, width, channels = subject.loaded.frame
        shape = (height, width) if channels == _GREY else (height, width, channels)
        self._frame = np.random.default_rng(_SEED).integers(0, 256, shape, dtype=np.uint8)
        for _ in range(LEAST_RUNS):
            subject.label(self._frame)
        subject.run(LEAST_RUNS)
        self._subject = subject
        return subject.loaded

    def _burst(self, seconds: float) -> Latencies:
        subject = self._ready()
        whole = _timed(lambda: subject.label(self._frame), seconds / 2)
        model = _timed(lambda: subject.run(1), seconds / 2)
        rss_mb, peak_mb = _memory()
        return Latencies(whole=whole, model=model, rss_mb=rss_mb, peak_mb=peak_mb)

    def _score(self, data: str, limit: int) -> Scored:
        from federation.task.data import labels_by_name, open_source

        subject = self._ready()
        source = open_source(data, train=False, task=subject.task)
        labels = labels_by_name(source, subject.task)
        count = min(limit or len(labels), len(labels))
        right = 0
        for row in np.linspace(0, len(labels) - 1, count).astype(int).tolist():
            image = source.image(row)
            if not isinstance(image, Image.Image):
                raise ConfigError(
                    f"{source.where} holds tensors, not pictures: a device is measured on what a camera gives"
                )
            mode = PICTURE_MODES[subject.task.channels]
            picture = np.asarray(image if image.mode == mode else image.convert(mode))
            right += subject.label(picture) == subject.task.labels[labels[row]]
        return Scored(images=count, right=right)

    def _ready(self) -> Subject:
        assert self._subject is not None, "the first request is Load"
        return self._subject


def _timed(run: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end or len(taken) < LEAST_RUNS:
        run()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def _memory() -> tuple[float, float]:
    """Resident memory of this process and the most that it ever was, MiB."""
    import psutil

    now = psutil.Process().memory_info().rss / _MIB
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell what the parent had when it started this process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return now, int(line.split()[1]) / _KIB_PER_MIB
    return now, now


def serve(requests: Iterable[bytes], answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    worker = Worker()
    decoder, encoder = msgspec.json.Decoder(Request), msgspec.json.Encoder()
    for line in requests:
        try:
            answer: Answer = worker.answer(decoder.decode(line))
        except FedgeError as error:
            answer = Failed(message=str(error), exit_code=error.exit_code)
        except ModuleNotFoundError as error:
            from federation.cli import EXTRAS  # now, for the command line's memory is not the model's

            if error.name not in EXTRAS:
                raise
            message = (
                f"this needs {error.name}, which is not installed: pip install 'fedge[{EXTRAS[error.name]}]'"
            )
            answer = Failed(message=message, exit_code=ExitCode.USAGE)
        answers.write(encoder.encode(answer) + b"\n")
        answers.flush()


def main() -> None:
    """Serve the parent process; whatever else prints goes to stderr."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
