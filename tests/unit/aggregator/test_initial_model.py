import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from aggregator.initial_model import build_apart, build_here
from federation.errors import ConfigError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.task.data import task_from_data
from federation.task.models import build, state_arrays

APART = """
import sys
from aggregator.initial_model import build_apart
from federation.task.checkpoint import CheckpointInfo
from federation.task.data import task_from_data
data = build_apart(CheckpointInfo(federation="f", round=0, task=task_from_data("mnist", "cnn")), 3)
print(len(data))
assert "torch" not in sys.modules
"""

PLUGIN = """
from torch import nn

print("a plug-in may print")


def tiny(task):
    return nn.Sequential(nn.Flatten(), nn.Linear(task.channels * task.height * task.width, len(task.labels)))
"""


CIRCULAR = """
from torch import nn


def circular(task):
    return nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(128, 10))
"""


def info(model: str) -> CheckpointInfo:
    return CheckpointInfo(federation="f", round=0, task=task_from_data("digits", model))


def test_apart_and_here_give_the_same_bytes() -> None:
    assert build_apart(info("cnn"), 7) == build_here(info("cnn"), 7)
    assert build_here(info("cnn"), 7) != build_here(info("cnn"), 8)


def test_a_server_without_a_hold_out_set_does_not_hold_torch() -> None:
    done = subprocess.run([sys.executable, "-c", APART], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert int(done.stdout) > 4 * 186_110


def test_a_plug_in_on_our_path_is_found_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(build_apart(info("my_models:tiny"), 0))
    assert read_checkpoint(path)[1]["1.weight"].shape == (10, 64)


def test_what_is_wrong_with_the_model_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^unknown model 'resnet81'; did you mean 'resnet18'\?") as caught:
        build_apart(info("resnet81"), 0)
    assert "\n" not in str(caught.value)


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="ended with 9"):
        build_apart(info("cnn"), 0)


def test_a_model_that_devices_cannot_train_privately_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "circular_models.py").write_text(CIRCULAR)
    monkeypatch.syspath_prepend(tmp_path)
    ready = msgspec.structs.replace(info("circular_models:circular").task, dp_ready=True)

    with pytest.raises(ConfigError, match=r"privacy.sample: the layer '1'.*'circular'"):
        build_here(CheckpointInfo(federation="f", round=0, task=ready), 0)


def test_a_private_run_begins_with_the_model_that_devices_build() -> None:
    task = msgspec.structs.replace(task_from_data("digits", "cnn"), dp_ready=True)

    assert build_here(CheckpointInfo(federation="f", round=0, task=task), 7) == checkpoint_bytes(
        CheckpointInfo(federation="f", round=0, task=task), state_arrays(build(task, seed=7))
    )
