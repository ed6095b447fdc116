"""edge_agent.releases.self_test: what a device finds out about a release before it trusts it, in a process that may die."""

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import odd_models
import psutil
import pytest
from brokers import until
from linear_model import card, make_model

from edge_agent.releases.self_test import TestReport, TestStoppedError, self_test
from federation.errors import ReleaseError, ReleaseFault
from federation.release import GOLDEN_FILE, MODEL_FILE
from federation.task.engine import Engine
from federation.task.golden import Golden, write_golden

FRAMES = tuple(np.full((6, 9), grey, np.uint8) for grey in (0, 255))
ROOMY_MB = 160
"""Enough for Python, onnxruntime and a tiny model, and less than the 192 MiB that some models take."""


def add_golden(folder: Path, model: Path) -> None:
    predictions = Engine(model).predict_batch(FRAMES)
    write_golden(
        folder / GOLDEN_FILE,
        Golden(
            frames=FRAMES,
            labels=tuple(one.label for one in predictions),
            probabilities=tuple(one.confidence for one in predictions),
            tolerance=0.01,
        ),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release folder with a good model and its golden set."""
    place = tmp_path / "release"
    place.mkdir()
    add_golden(place, make_model(place))
    return place


def tried(
    folder: Path,
    *,
    max_latency_ms: float = 0,
    max_memory_mb: int = ROOMY_MB,
    timeout_s: float = 120,
    stop: threading.Event | None = None,
) -> TestReport:
    return self_test(
        folder,
        threads=1,
        max_latency_ms=max_latency_ms,
        max_memory_mb=max_memory_mb,
        timeout_s=timeout_s,
        stop=stop,
    )


def running_tests() -> list[psutil.Process]:
    """Children of this process that test a release."""
    return [
        child
        for child in psutil.Process().children()
        if any("self_test_child" in word for word in child.cmdline())
    ]


def refused(folder: Path, **limits: float) -> ReleaseError:
    with pytest.raises(ReleaseError) as error:
        tried(folder, **limits)  # type: ignore[arg-type]  # a test names the limits
    return error.value


def test_a_good_release_passes_and_is_measured(folder: Path) -> None:
    report = tried(folder, max_latency_ms=60_000)
    assert 0 < report.p50_ms <= report.p99_ms
    assert 20 < report.rss_mb < ROOMY_MB


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ONNX model"),
        (b"not a protobuf", "ONNX model"),
        (None, "is not a file"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_broken(folder: Path, content: bytes | None, says: str) -> None:
    model = folder / MODEL_FILE
    model.unlink() if content is None else model.write_bytes(content)
    error = refused(folder)
    assert error.fault is ReleaseFault.BROKEN
    assert says in error.detail


def test_half_a_model_is_broken(folder: Path) -> None:
    model = folder / MODEL_FILE
    model.write_bytes(model.read_bytes()[:150])
    assert refused(folder).fault is ReleaseFault.BROKEN


def test_a_graph_that_is_not_what_its_card_says_has_the_wrong_shape(folder: Path) -> None:
    make_model(folder, card(labels=("dark", "bright")).properties())
    error = refused(folder)
    assert error.fault is ReleaseFault.WRONG_SHAPE
    assert "metadata says" in error.detail


def test_a_model_that_answers_nan_is_not_finite(folder: Path) -> None:
    make_model(folder, scale=math.nan)
    assert refused(folder).fault is ReleaseFault.NON_FINITE


def test_a_model_that_answers_otherwise_is_wrong(folder: Path) -> None:
    make_model(folder, scale=-1)
    error = refused(folder)
    assert error.fault is ReleaseFault.WRONG_ANSWER
    assert "golden frame 0" in error.detail


def test_a_model_that_fails_when_it_runs_is_broken(folder: Path) -> None:
    odd_models.out_of_bounds(folder)
    error = refused(folder)
    assert error.fault is ReleaseFault.BROKEN
    assert "failed to run" in error.detail


@pytest.mark.parametrize("make", [odd_models.huge_when_it_runs, odd_models.huge_when_it_is_loaded])
def test_a_model_that_takes_too_much_memory_is_not_given_it(
    folder: Path, make: Callable[[Path], Path]
) -> None:
    make(folder)
    error = refused(folder)
    assert error.fault is ReleaseFault.TOO_BIG
    assert "Failed to allocate memory" in error.detail, "it was refused, not found out afterwards"
    assert f"may use {ROOMY_MB} MiB (max_memory_mb)" in error.detail


def test_with_enough_memory_the_same_model_passes(folder: Path) -> None:
    odd_models.huge_when_it_is_loaded(folder)
    assert tried(folder, max_memory_mb=4096).rss_mb > ROOMY_MB


def test_a_device_too_small_for_onnxruntime_says_so(folder: Path) -> None:
    error = refused(folder, max_memory_mb=32)
    assert error.fault is ReleaseFault.TOO_BIG
    assert "of which Python and onnxruntime take" in error.detail


def test_a_slow_model_is_too_slow(folder: Path) -> None:
    odd_models.slow(folder)
    error = refused(folder, max_latency_ms=0.05)
    assert error.fault is ReleaseFault.TOO_SLOW
    assert "at most 0.05 (max_latency_ms)" in error.detail
    assert tried(folder, max_latency_ms=60_000).p50_ms > 0.05


def test_a_model_that_never_answers_is_killed(folder: Path) -> None:
    odd_models.endless(folder)
    error = refused(folder, timeout_s=1)
    assert error.fault is ReleaseFault.TOO_SLOW
    assert "more than 1 s" in error.detail
    assert not running_tests()


def test_a_test_is_stopped_with_the_process(folder: Path) -> None:
    odd_models.endless(folder)
    stop = threading.Event()
    stop.set()
    with pytest.raises(TestStoppedError):
        tried(folder, stop=stop)
    assert not running_tests()


@pytest.mark.parametrize("content", [None, b"not a golden set"])
def test_without_a_golden_set_nothing_is_believed(folder: Path, content: bytes | None) -> None:
    golden = folder / GOLDEN_FILE
    golden.unlink() if content is None else golden.write_bytes(content)
    assert refused(folder).fault is ReleaseFault.MALFORMED


@pytest.mark.parametrize(
    ("module", "code", "fault", "says"),
    [
        ("sitecustomize", "import os; os.abort()", ReleaseFault.CRASHED, "signal 6"),
        ("sitecustomize", "import os; os.kill(os.getpid(), 9)", ReleaseFault.TOO_BIG, "signal 9"),
        ("sitecustomize", "import os; os._exit(0)", ReleaseFault.CRASHED, "without a result"),
        ("onnxruntime", "raise ImportError('no such library')", ReleaseFault.CRASHED, "no such library"),
        ("onnxruntime", "raise MemoryError", ReleaseFault.TOO_BIG, "MemoryError"),
    ],
)
def test_a_child_that_dies_says_how(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    code: str,
    fault: ReleaseFault,
    says: str,
) -> None:
    """Python finds this module first: a library that is broken, or breaks off."""
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    error = refused(folder)
    assert error.fault is fault
    assert says in error.detail


def test_the_child_gets_no_secrets(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "environment.json"
    (tmp_path / "sitecustomize.py").write_text(
        f"import json, os; open({str(seen)!r}, 'w').write(json.dumps(dict(os.environ)))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FEDGE_PASSWORD", "open sesame")
    tried(folder)
    environment = msgspec.json.decode(seen.read_bytes(), type=dict[str, str])
    assert "PATH" in environment
    assert "open sesame" not in environment.values()


def start_child(folder: Path, timeout_s: float) -> "subprocess.Popen[bytes]":
    """A child whose parent was killed: nobody waits for it."""
    arguments = [str(folder), "1", "0", str(ROOMY_MB), str(timeout_s)]
    command = [sys.executable, "-m", "edge_agent.releases.self_test_child", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_the_child_is_modest(folder: Path) -> None:
    odd_models.endless(folder)
    with start_child(folder, timeout_s=600) as child:
        try:
            nicest = psutil.Process(child.pid)
            until(lambda: nicest.nice() == min(19, os.nice(0) + 10), timeout_s=60, what="a nice child")
            score = Path(f"/proc/{child.pid}/oom_score_adj")
            until(lambda: score.read_text() == "1000\n", timeout_s=60, what="a child to be killed first")
        finally:
            child.kill()


def test_the_child_ends_by_itself(folder: Path) -> None:
    odd_models.endless(folder)
    with start_child(folder, timeout_s=-4) as child:  # and five seconds of grace
        assert child.wait(timeout=60) == -signal.SIGALRM
