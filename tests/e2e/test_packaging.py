"""The wheel in a clean virtual environment: what a device that only infers gets, and what it is told to add."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import FEDERATION

from aggregator.enrolment import Enrolment
from export.convert import export_model
from federation.bundle import write_bundle
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.data import task_from_data
from federation.task.models import build, state_arrays

REPOSITORY = Path(__file__).parents[2]
INSTALL_S = 240

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: object, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Not in the repository: what is imported must come from the wheel.
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment,
        cwd=tempfile.gettempdir(),
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, REPOSITORY, timeout_s=INSTALL_S)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a virtual environment into which the wheel was installed, without extras."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    assert run(sys.executable, "-m", "venv", folder).returncode == 0
    installed = run(folder / "bin" / "python", "-m", "pip", "install", "-q", wheel, timeout_s=INSTALL_S)
    assert installed.returncode == 0, installed.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an aggregator exported elsewhere."""
    folder = tmp_path_factory.mktemp("model")
    task = task_from_data("digits", "cnn")
    checkpoint = folder / "round-000000.safetensors"
    info = CheckpointInfo(federation=FEDERATION, round=0, task=task)
    checkpoint.write_bytes(checkpoint_bytes(info, state_arrays(build(task, seed=1))))
    return export_model(checkpoint, folder / "release").model


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    packages = {name for name in names if not name.endswith(".dist-info")}
    assert packages == {"federation", "privacy", "edge_agent", "aggregator", "export"}
    assert "federation/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_a_device_infers_without_torch(scripts: Path, model: Path, tmp_path: Path) -> None:
    missing = run(scripts / "python", "-c", "import torch")
    assert "ModuleNotFoundError" in missing.stderr
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    done = run(scripts / "edge-agent", "infer", "--model", model, "--source", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a.png" in done.stdout
    assert "1 image" in done.stdout


def test_a_device_that_wants_to_train_is_told_which_extra_to_install(scripts: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "a.bundle.json"
    write_bundle(
        bundle, Enrolment(tmp_path / "state", FEDERATION).enroll("a", broker_url="mqtt://127.0.0.1:9")
    )
    done = run(scripts / "edge-agent", "run", bundle, "--data", "digits")
    assert_names_extra(done, "fedge[train]")


@pytest.mark.parametrize("command", ["serve --data digits", "enroll a", "demo"])
def test_the_aggregator_names_its_extra(scripts: Path, tmp_path: Path, command: str) -> None:
    state = () if command == "demo" else ("--state", tmp_path)
    assert_names_extra(run(scripts / "aggregator", *command.split(), *state), "fedge[aggregator]")


def test_the_export_names_its_extra(scripts: Path, model: Path) -> None:
    done = run(scripts / "model-export", "onnx", model.parent.with_name("round-000000.safetensors"))
    assert_names_extra(done, "fedge[aggregator]")


@pytest.mark.parametrize("program", ["aggregator", "edge-agent", "model-export", "privacy"])
def test_help_works_without_extras(scripts: Path, program: str) -> None:
    done = run(scripts / program, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def assert_names_extra(done: "subprocess.CompletedProcess[str]", extra: str) -> None:
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"pip install '{extra}'" in line
