"""``edge-agent infer`` as a process: what it prints, what it skips, what it never imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from linear_model import make_model
from PIL import Image

RUN = """
from edge_agent.cli import main

try:
    main()
finally:
    import os, sys
    if report := os.environ.get("REPORT"):
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        with open(report, "w") as file:
            file.write("\\n".join([peak.split()[1], *sys.modules]))
"""

TORCH_SIDE = {
    "torch",
    "torchvision",
    "opacus",
    "sklearn",
    "onnx",
    "export",
    "federation.task.models",
    "federation.task.data",
    "federation.task.evaluate",
}
NOT_NEEDED = {"structlog", "psutil", "cryptography", "paho", "safetensors", "rich", "pydantic"}


def _infer(
    *arguments: str | Path, stdin: str = "", report: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, "infer", *map(str, arguments)],
        input=stdin,
        env=os.environ | ({"REPORT": str(report)} if report else {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, value in (("b/2.png", 255), ("b/1.jpg", 0), ("a.png", 255), (".hidden/x.png", 0)):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture, and not taken for one")
    return folder


def test_a_folder_is_read_in_order(tmp_path: Path, pictures: Path) -> None:
    done = _infer("--model", make_model(tmp_path), "--source", pictures, "--top", "2")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, summary = done.stdout.splitlines()
    assert [line.split("  ")[:3] for line in lines] == [
        [f"{pictures}/a.png", "bright", "100.0%"],
        [f"{pictures}/b/1.jpg", "dark", "100.0%"],
        [f"{pictures}/b/2.png", "bright", "100.0%"],
    ]
    assert lines[0].endswith("(other 0.0%)")
    assert summary.startswith("3 images; latency p50 ")
    assert summary.endswith(" images/s")


def test_json_lines_are_for_programs(tmp_path: Path, pictures: Path) -> None:
    (pictures / "b" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    done = _infer("--model", make_model(tmp_path), "--source", pictures, "--json")
    assert done.returncode == 0
    first, broken, *_, last = map(json.loads, done.stdout.splitlines())
    assert first["source"] == f"{pictures}/a.png"
    assert first["label"] == "bright"
    assert [label for label, _ in first["top"]] == ["bright", "other", "dark"]
    assert broken["source"] == f"{pictures}/b/0.png"
    assert broken["error"]
    assert (last["summary"]["images"], last["summary"]["unreadable"]) == (3, 1)
    assert last["summary"]["p50_ms"] <= last["summary"]["p99_ms"]


def test_unreadable_pictures_are_told_and_skipped(tmp_path: Path, pictures: Path) -> None:
    whole = (pictures / "b" / "2.png").read_bytes()
    (pictures / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "gone.png").symlink_to(pictures / "nowhere")
    done = _infer("--model", make_model(tmp_path), "--source", pictures)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0].startswith(f"skipped {pictures}/gone.png: No such file")
    assert done.stderr.splitlines()[1].startswith(f"skipped {pictures}/b/cut.png: ")
    assert "3 images, 2 unreadable" in done.stdout


def test_paths_come_from_stdin_up_to_the_limit(tmp_path: Path, pictures: Path) -> None:
    paths = f"{pictures}/b/1.jpg\n\n{pictures}/a.png\r\n{pictures}/b/2.png\n"
    done = _infer("--model", make_model(tmp_path), "--source", "-", "--limit", "2", stdin=paths)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("  ")[1] for line in done.stdout.splitlines()[:-1]] == ["dark", "bright"]


def test_nothing_to_classify_is_an_error(tmp_path: Path, pictures: Path) -> None:
    model = make_model(tmp_path)
    missing = _infer("--model", model, "--source", tmp_path / "missing")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: --source")
    (tmp_path / "empty").mkdir()
    empty = _infer("--model", model, "--source", tmp_path / "empty")
    assert empty.returncode == 2
    assert "it has no pictures" in empty.stderr
    broken = _infer("--model", model, "--source", pictures / "notes.txt")
    assert broken.returncode == 2
    assert "none of its 1 pictures can be read" in broken.stderr
    assert "Traceback" not in missing.stderr + empty.stderr + broken.stderr


def test_a_foreign_model_is_one_line(tmp_path: Path, pictures: Path) -> None:
    done = _infer("--model", make_model(tmp_path, {}), "--source", pictures)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "model-export onnx" in line


def test_torch_is_never_imported_and_memory_stays_small(tmp_path: Path, pictures: Path) -> None:
    report = tmp_path / "report"
    done = _infer("--model", make_model(tmp_path), "--source", pictures, report=report)
    assert done.returncode == 0
    peak_kb, *modules = report.read_text().splitlines()
    assert (TORCH_SIDE | NOT_NEEDED).intersection(modules) == set()
    # VmHWM and not ru_maxrss: that one still counts the process which started this one.
    assert int(peak_kb) / 1024 < 80


def test_a_slip_in_the_bundles_name_leaves_no_folder_behind(tmp_path: Path) -> None:
    done = _infer(tmp_path / "missing.bundle.json", "--source", tmp_path)
    assert done.returncode == 2
    assert "no bundle at" in done.stderr
    assert list(tmp_path.iterdir()) == []
