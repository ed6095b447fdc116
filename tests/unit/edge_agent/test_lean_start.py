"""What an agent does not load: torch before its first round, torch's compiler ever."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edge_agent.machine import cpu_threads, give_back_memory, pick_device
from federation.errors import ConfigError

PRELUDE = """
import sys
import numpy as np
from edge_agent.training import TorchTrainer
from federation.task.data import task_from_data
spec = "imagefolder:" + sys.argv[1]
"""

IDLE = """
import edge_agent.agent
from edge_agent.telemetry import capabilities
trainer = TorchTrainer(spec, device="cpu")
samples = trainer.samples(task_from_data(spec, "cnn"))
print(capabilities(device=trainer.device_name, threads=trainer.threads, samples=samples).samples)
assert not {"torch", "torchvision", "sklearn", "onnxruntime"} & sys.modules.keys()
"""

TORCHVISION_MODEL = """
from federation.task.models import build, model_names
from federation.wire.messages import TrainSpec
assert "resnet18" in model_names()
trainer = TorchTrainer(spec, device="cpu", threads=1)
task = task_from_data(spec, "resnet18")
model, images = build(task), trainer._data(task)
trainer._set_up()
trainer._fit(model, images, TrainSpec(batch_size=2, momentum=0.9), np.random.default_rng(0), lambda: False)
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "triton", "sympy"))]
import torch._dynamo.utils
assert torch._dynamo.utils.__file__
roi_align = sys.modules["torchvision.ops.roi_align"]
assert roi_align.is_compile_supported("cpu") is torch._dynamo.utils.is_compile_supported("cpu")
print("real")
"""

MORE_WANTED = """
import types
from federation.task import vision
class Poor(types.ModuleType):
    def __getattribute__(self, name):
        raise AttributeError(name)
vision.ModuleType = Poor
assert vision.import_torchvision().models.resnet18
print(sys.modules["torch._dynamo.utils"].__file__ is not None)
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("L", (32, 32), index * 100).save(tmp_path / name / f"{index}.png")
    return tmp_path


def run(code: str, pictures: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(pictures)], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()[-1]


def test_an_agent_that_waits_for_its_first_round_has_not_imported_torch(pictures: Path) -> None:
    assert run(IDLE, pictures) == "4"


def test_a_torchvision_model_is_built_and_trained_without_torchs_compiler_which_stays_usable(
    pictures: Path,
) -> None:
    assert run(TORCHVISION_MODEL, pictures) == "real"


def test_a_torchvision_that_wants_more_than_the_stand_in_gets_the_real_compiler(pictures: Path) -> None:
    assert run(MORE_WANTED, pictures) == "True"


def test_the_cpu_is_picked_without_asking_torch() -> None:
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize("wanted", ["cuda:99", "gpu", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        pick_device(wanted)


def test_an_agent_may_use_at_least_one_cpu() -> None:
    assert cpu_threads() >= 1


def test_memory_can_be_given_back_at_any_time() -> None:
    give_back_memory()
    give_back_memory()
