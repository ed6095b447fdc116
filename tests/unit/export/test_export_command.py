"""``model-export onnx`` as a person runs it: what it prints, and how it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, checkpoint_path
from federation.task.models import build, state_arrays
from federation.wire.messages import TaskSpec

TASK = TaskSpec(model="cnn", labels=("yes", "no"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    checkpoint_path(state, 0).parent.mkdir(parents=True)
    for number in (0, 2):
        info = CheckpointInfo(federation="garden", round=number, task=TASK)
        content = checkpoint_bytes(info, state_arrays(build(TASK, seed=number)))
        checkpoint_path(state, number).write_bytes(content)
    return state


def _export(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from export.cli import main; main()", "onnx", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_a_state_folder_gives_its_newest_round(tmp_path: Path, state: Path) -> None:
    done = _export(tmp_path, state)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "cnn-round-2").iterdir()) == [
        "golden.safetensors",
        "model.onnx",
    ]
    assert "edge-agent infer --model cnn-round-2/model.onnx --source" in done.stdout
    assert "within" in done.stdout
    assert "yes, no" in done.stdout
    assert len(done.stdout.splitlines()) == 9


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("state", "--round", "1"), 2, "no checkpoint of round 1: it has 0, 2"),
        (("nowhere",), 2, "nowhere is not a file"),
        (("state/checkpoints",), 2, "not an aggregator's state folder"),
        (("garbage.safetensors",), 2, "not a whole safetensors file"),
        (("state/checkpoints/round-000002.safetensors", "--round", "2"), 2, "leave --round away"),
        (("state", "--tolerance", "0"), 5, "disagree"),
        (("state", "--opset", "3"), 2, "--opset"),
        (("state", "-o", "model.onnx"), 2, "name a folder"),
        (("state", "--int8"), 2, "--data"),
        (("state", "--int8", "--half"), 2, "a model has one"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    tmp_path: Path, state: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    assert state.is_dir()
    (tmp_path / "garbage.safetensors").write_bytes(b"\x10" + bytes(40))
    done = _export(tmp_path, *arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.rglob("*.onnx"))
