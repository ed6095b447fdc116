"""export.convert: a checkpoint becomes a file that onnxruntime runs as torch does, or no file at all."""

import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from export.convert import default_folder, export_model
from federation.errors import ConfigError, VerificationError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, checkpoint_path
from federation.task.model_card import HoldOutMetrics, ModelCard
from federation.task.models import build, state_arrays
from federation.wire.messages import TaskSpec
from federation.wire.release import ModelFormat, Requirements


def _task(model: str = "cnn", *, channels: int = 1, side: int = 8) -> TaskSpec:
    return TaskSpec(
        model=model,
        labels=("ant", "bee", "cat", "dog"),
        channels=channels,
        height=side,
        width=side,
        mean=(0.4,) * channels,
        std=(0.3,) * channels,
    )


def _checkpoint(state: Path, task: TaskSpec, *, number: int = 7) -> Path:
    path = checkpoint_path(state, number)
    path.parent.mkdir(exist_ok=True)
    info = CheckpointInfo(federation="garden", round=number, task=task)
    path.write_bytes(checkpoint_bytes(info, state_arrays(build(task, seed=number))))
    return path


def test_the_file_is_whole_and_says_what_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = _checkpoint(tmp_path, _task())
    checkpoint.with_suffix(".json").write_text('{"loss": 0.5, "accuracy": 0.75, "samples": 40}')
    report = export_model(checkpoint, tmp_path / "release", preprocess="none")
    output = tmp_path / "release" / "model.onnx"
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "release"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["golden.safetensors", "model.onnx"]
    assert (report.model, report.golden) == (output, output.with_name("golden.safetensors"))
    assert report.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert report.golden_sha256 == hashlib.sha256(report.golden.read_bytes()).hexdigest()
    assert (report.wanted, report.written, report.reasons) == (ModelFormat.FP32, ModelFormat.FP32, ())
    assert report.requirements == Requirements(opset=20, ir_version=10, min_runtime="1.18", card_format="1")
    assert report.size_bytes == output.stat().st_size
    assert report.parity.relative_error < 1e-5

    model = onnx.load(output, load_external_data=False)
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [20]
    assert not model.graph.value_info
    assert str(Path.cwd()).encode() not in output.read_bytes()
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["fedge.format"] == "1"
    assert json.loads(properties["labels"]) == ["ant", "bee", "cat", "dog"]
    preprocessing = json.loads(properties["preprocessing"])
    assert preprocessing["scale"] == pytest.approx(1 / 255)
    assert (preprocessing["layout"], preprocessing["resize"]) == ("NCHW", "bilinear-antialias")
    card = ModelCard.parse(properties)
    assert card == report.card
    assert (card.provenance.federation, card.provenance.round) == ("garden", 7)
    assert card.provenance.metrics == HoldOutMetrics(loss=0.5, accuracy=0.75, samples=40)


@pytest.mark.parametrize(
    "task",
    [_task("resnet18", channels=3, side=32), _task("mobilenet_v3_small", channels=3, side=64)],
    ids=lambda task: task.model,
)
def test_torchvision_models_agree_with_torch_in_any_batch_size(tmp_path: Path, task: TaskSpec) -> None:
    report = export_model(_checkpoint(tmp_path, task), tmp_path / "release", preprocess="none")
    assert report.parity.relative_error < 1e-5
    operators = {node.op_type for node in onnx.load(report.model).graph.node}
    assert "GlobalAveragePool" in operators
    assert not operators & {"ReduceMean", "BatchNormalization"}
    session = ort.InferenceSession(report.model)
    model = build(task, seed=7).eval()
    generator = torch.Generator().manual_seed(3)
    for size in (1, 3):
        batch = torch.randn((size, task.channels, task.height, task.width), generator=generator)
        with torch.inference_mode():
            expected = model(batch).numpy()
        (actual,) = session.run(["logits"], {"image": batch.numpy()})
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_real_images_take_part_in_the_parity_check(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    generator = np.random.default_rng(1)
    for number in range(20):
        pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / "deep" / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    report = export_model(_checkpoint(tmp_path, _task()), tmp_path / "release", data=str(pictures))
    assert report.parity.images == 20


def test_images_without_a_picture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no readable picture"):
        export_model(_checkpoint(tmp_path, _task()), tmp_path / "release", data=str(tmp_path / "empty"))
    assert not (tmp_path / "release").exists()


def test_a_failed_parity_check_leaves_no_file(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, _task("resnet18", channels=3, side=32))
    with pytest.raises(VerificationError, match="disagree"):
        export_model(checkpoint, tmp_path / "release", tolerance=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_weights_that_diverged_are_refused(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, _task())
    info = CheckpointInfo(federation="garden", round=7, task=_task())
    arrays = {name: np.full_like(array, 3e38) for name, array in state_arrays(build(_task())).items()}
    checkpoint.write_bytes(checkpoint_bytes(info, arrays))
    with pytest.raises(VerificationError, match="diverged"):
        export_model(checkpoint, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, _task())
    info = CheckpointInfo(federation="garden", round=7, task=_task())
    checkpoint.write_bytes(checkpoint_bytes(info, {"w": np.zeros(3, np.float32)}))
    with pytest.raises(ConfigError, match="another model"):
        export_model(checkpoint, tmp_path / "release")


def test_a_model_that_cannot_be_exported_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stubborn_plugin.py").write_text(
        "import torch\n"
        "class Stubborn(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(64, 4)\n"
        "    def forward(self, x):\n"
        "        y = self.layer(x.flatten(1))\n"
        "        return y * 2 if y.sum() > 0 else y\n"
        "def make(task):\n"
        "    return Stubborn()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = _task("stubborn_plugin:make")
    with pytest.raises(ConfigError, match="cannot be exported to ONNX opset 20"):
        export_model(_checkpoint(tmp_path, task), tmp_path / "release")
    assert not (tmp_path / "release").exists()
    capfd.readouterr()  # what the exporter had said is shown with the failure


def test_a_missing_output_folder_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: create it"):
        export_model(tmp_path / "not-read-yet", tmp_path / "no" / "release")


@pytest.mark.parametrize("name", ["model.onnx", "file"])
def test_a_folder_is_written_and_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="name a folder"):
        export_model(tmp_path / "not-read-yet", tmp_path / name)


def test_a_signed_release_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "manifest.signed").write_bytes(b"signed")
    with pytest.raises(ConfigError, match="must not change"):
        export_model(tmp_path / "not-read-yet", folder)


def test_a_folder_name_is_made_of_model_and_round() -> None:
    info = CheckpointInfo(federation="garden", round=12, task=_task("my.nets:small_one"))
    assert default_folder(info) == Path("small_one-round-12")
    assert default_folder(msgspec.structs.replace(info, task=_task())) == Path("cnn-round-12")
