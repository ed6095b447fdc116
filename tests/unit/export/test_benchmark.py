"""``model-export benchmark``: what it measures, what it prints, what it refuses, and that a device needs no torch for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from linear_model import SIDE, card, linear_core, make_model, save
from PIL import Image

from export.benchmark import BURSTS, Row, _Worker, benchmark, speedups, table
from export.benchmark_command import benchmark as command
from export.benchmark_messages import Burst, Latencies, Load, Loaded
from export.fused import fuse
from federation.errors import ConfigError, VerificationError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, checkpoint_path
from federation.task.models import build, state_arrays
from federation.wire.messages import TaskSpec

SHORT_S = 0.05
TASK = TaskSpec(
    model="cnn",
    labels=("dark", "bright"),
    channels=3,
    height=16,
    width=16,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)


def _row(**changes: object) -> Row:
    fields: dict[str, object] = {
        "file": "cnn/model.onnx",
        "runtime": "onnxruntime 1.31.1",
        "format": "int8 fused",
        "model": "cnn",
        "size_mb": 0.2012,
        "frame": (28, 30, 1),
        "top1": None,
        "images": 0,
        "p50_ms": 0.0712,
        "p99_ms": 0.1,
        "model_p50_ms": 0.05,
        "burst_ms": (0.07, 0.08, 0.07),
        "model_burst_ms": (0.05, 0.05, 0.05),
        "rss_mb": 60.2,
        "peak_mb": 61.7,
    }
    return Row(**(fields | changes))  # type: ignore[arg-type]  # a test names the fields


def test_the_table_has_a_line_for_each_model_in_aligned_columns() -> None:
    torch = _row(
        file="round-1.safetensors", runtime="torch 2.15.0 eager", format="fp32", burst_ms=(0.35, 0.32, 0.7)
    )
    lines = table([_row(top1=0.9935, images=2000), torch]).splitlines()
    assert len(lines) == 3
    assert lines[0].split() == [
        *(
            "file",
            "format",
            "MB",
            "top-1",
            "frame",
            "p50",
            "ms",
            "p99",
            "ms",
            "model",
            "ms",
            "speed",
            "RSS",
            "MB",
        ),
        *("peak", "MB"),
    ]
    assert lines[1].split() == [
        *(
            "cnn/model.onnx",
            "int8",
            "fused",
            "0.20",
            "99.35%",
            "30x28x1",
            "0.0712",
            "0.1",
            "0.05",
            "5.00x",
            "60",
            "62",
        )
    ]
    assert "torch 2.15.0 eager" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_a_speed_is_of_bursts_that_are_neighbours_in_time() -> None:
    # A slow spell hits the second burst of both: the ratio of medians of all would not notice, one of means would.
    ours, eager = _row(burst_ms=(1.0, 10.0, 1.0)), _row(burst_ms=(4.0, 40.0, 5.0))
    assert speedups(ours, eager) == [4.0, 4.0, 5.0]


def test_without_torch_beside_it_there_is_no_speed() -> None:
    assert table([_row()]).splitlines()[1].split()[-3:] == ["-", "60", "62"]


def _pictures(folder: Path) -> Path:
    """Three of each class, one of the bright ones in the wrong folder."""
    for label, greys in {"dark": (0, 10, 20), "bright": (250, 240, 5)}.items():
        (folder / label).mkdir(parents=True)
        for number, grey in enumerate(greys):
            Image.new("L", (9, 7), grey).save(folder / label / f"{number}.png")
    return folder


def _bare(folder: Path) -> dict[str, str]:
    """An environment in which what the base install lacks cannot be imported."""
    for package in ("torch", "torchvision", "onnx", "onnxscript"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(f"raise SystemExit('{package} was imported')\n")
    root = Path(__file__).resolve().parents[3]
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{root}"}


def _run(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "export.cli", "benchmark", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_a_device_without_torch_and_onnx_measures_plain_and_fused_models(tmp_path: Path) -> None:
    plain = make_model(tmp_path, scale=0.05)
    told = card(preprocess="fused", topk=2)
    (tmp_path / "release").mkdir()
    save(
        fuse(linear_core(scale=0.05), told.preprocessing, topk=2),
        told.properties(),
        tmp_path / "release",
    )
    data = f"imagefolder:{_pictures(tmp_path / 'pictures')}"
    arguments = (plain, tmp_path / "release", "--data", data, "--seconds", "0.1", "--json")
    done = _run(_bare(tmp_path / "bare"), *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout)
    assert [row["file"] for row in rows] == [str(plain), str(tmp_path / "release")]
    assert [row["format"] for row in rows] == ["fp32", "fp32 fused"]
    for row in rows:
        assert (row["images"], row["top1"]) == (6, pytest.approx(5 / 6))
        assert row["frame"] == [SIDE, SIDE, 1]
        assert len(row["burst_ms"]) == BURSTS
        assert 0 < min(row["burst_ms"]) <= row["p50_ms"] <= row["p99_ms"]
        assert 0 < row["rss_mb"] <= row["peak_mb"]


def _checkpoint(folder: Path) -> Path:
    """The state folder of an aggregator that has finished a round."""
    path = checkpoint_path(folder / "state", 1)
    path.parent.mkdir(parents=True)
    info = CheckpointInfo(federation="garden", round=1, task=TASK)
    path.write_bytes(checkpoint_bytes(info, state_arrays(build(TASK))))
    return folder / "state"


def test_a_checkpoint_is_run_by_torch(tmp_path: Path) -> None:
    (row,) = benchmark([_checkpoint(tmp_path)], seconds=SHORT_S, frame=(40, 50))
    assert row.runtime.startswith("torch")
    assert (row.model, row.frame, row.top1) == ("cnn", (40, 50, 3), None)


def test_torch_says_the_same_however_frames_are_prepared(tmp_path: Path) -> None:
    from export.eager import Eager

    checkpoint = checkpoint_path(_checkpoint(tmp_path), 1)
    documented, by_hand = Eager(checkpoint), Eager(checkpoint, tuned=True)
    noise = np.random.default_rng(0)
    for height, width in ((16, 16), (40, 50)):
        frame = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        first, second = (each.run(each.prepare(frame).numpy()) for each in (documented, by_hand))
        assert np.allclose(first, second, atol=1e-2)
        assert documented.label(frame) == TASK.labels[int(first.argmax())]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("nowhere.onnx", None, "nowhere.onnx does not exist"),
        ("empty", None, "neither a release folder"),
        ("garbage.onnx", None, "is not an ONNX model"),
        ("model.onnx", "imagefolder:nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, data: str | None, message: str
) -> None:
    make_model(tmp_path)
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        benchmark([Path(model)], data=data, seconds=SHORT_S)


def test_a_frame_is_width_times_height(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write WIDTHxHEIGHT"):
        command([make_model(tmp_path)], frame="640,480")


def test_a_model_that_answers_with_nan_is_told(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="NaN"):
        benchmark([make_model(tmp_path, scale=float("nan"))], seconds=SHORT_S)


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    with _Worker(str(model)) as worker:
        worker.ask(Load(path=str(model), threads=1, frame=None), Loaded)
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(VerificationError, match="ended"):
            worker.ask(Burst(seconds=SHORT_S), Latencies)


def test_data_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    for label in ("dark", "purple"):
        (tmp_path / "data" / label).mkdir(parents=True)
        Image.new("L", (5, 5)).save(tmp_path / "data" / label / "0.png")
    with pytest.raises(ConfigError, match="purple"):
        benchmark([make_model(tmp_path)], data=f"imagefolder:{tmp_path / 'data'}", seconds=SHORT_S)
