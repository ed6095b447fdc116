"""export.convert, from a checkpoint of a real model to a folder that a device can prove."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace

from export.convert import export_model
from export.report import ExportReport, as_json, describe
from federation.errors import ConfigError, VerificationError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.data import open_data, task_from_data
from federation.task.engine import Engine
from federation.task.golden import check_answers, read_golden
from federation.task.models import build, state_arrays
from federation.wire.messages import TaskSpec
from federation.wire.release import ModelFormat

_STEPS, _BATCH = 120, 64
"""Enough for 90 % of scikit-learn's digits."""


def _photo_task(model: str, side: int, **changes: object) -> TaskSpec:
    fields = {
        "model": model,
        "labels": ("ant", "bee", "cat", "dog"),
        "channels": 3,
        "height": side,
        "width": side,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    return TaskSpec(**(fields | changes))  # type: ignore[arg-type]  # a test names the fields


def _save(folder: Path, task: TaskSpec, model: torch.nn.Module) -> Path:
    path = folder / "round-000003.safetensors"
    info = CheckpointInfo(federation="garden", round=3, task=task)
    path.write_bytes(checkpoint_bytes(info, state_arrays(model)))
    return path


def _untrained(folder: Path, task: TaskSpec) -> Path:
    """A model with a head that prefers something: after initialisation some models answer all inputs alike."""
    model = build(task, seed=5)
    with torch.no_grad():
        head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    return _save(folder, task, model)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the cnn, trained on scikit-learn's digits."""
    task = task_from_data("digits", "cnn")
    data = open_data("digits", task, train=True)
    model = build(task, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = np.random.default_rng(0)
    for _ in range(_STEPS):
        images, labels = data.batch(generator.integers(0, len(data), _BATCH))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _save(tmp_path_factory.mktemp("digits"), task, model)


def _proven(report: ExportReport) -> Engine:
    """The engine of an export, after its golden set."""
    engine = Engine(report.model)
    golden = read_golden(report.golden)
    assert 8 <= len(golden.frames) == report.golden_frames <= 16
    check_answers(golden, engine.predict_batch(golden.frames))
    return engine


def test_int8_of_a_trained_model(tmp_path: Path, digits: Path) -> None:
    report = export_model(
        digits, tmp_path / "release", format=ModelFormat.INT8, data="digits", latency_gate=False, max_drop=2.0
    )
    assert (report.written, report.reasons) == (ModelFormat.INT8, ())
    assert report.metrics is not None
    assert report.metrics.samples == 360
    assert report.metrics.accuracy > 0.85
    assert abs(report.metrics.drop_points) <= 2
    assert report.size_bytes < 0.4 * 4 * sum(
        array.size for array in state_arrays(build(report.info.task)).values()
    )
    engine = _proven(report)
    assert len(set(read_golden(report.golden).labels)) == 10
    assert engine.card.requirements == report.requirements

    shown = describe(report)
    assert "int8, all convolutions and matrix products" in shown
    assert "taken" in shown
    told = json.loads(as_json(report))
    assert (told["wanted"], told["written"], told["gates"][0]["refused"]) == ("int8", "int8", "")


def test_an_impossible_gate_leaves_float32_and_says_why(tmp_path: Path, digits: Path) -> None:
    report = export_model(
        digits,
        tmp_path / "release",
        format=ModelFormat.INT8,
        data="digits",
        latency_gate=False,
        max_drop=-100,
    )
    assert (report.wanted, report.written) == (ModelFormat.INT8, ModelFormat.FP32)
    assert len(report.gates) == 2
    assert "refused by the accuracy gate" in describe(report)
    assert json.loads(as_json(report))["reasons"][-1] == "so fp32 was written"
    assert report.metrics is not None
    assert report.metrics.drop_points == 0
    _proven(report)


def test_another_export_replaces_both_files(tmp_path: Path, digits: Path) -> None:
    folder = tmp_path / "release"
    first = export_model(digits, folder, data="digits", topk=3)
    assert first.metrics is not None
    assert _proven(first).card.topk == 3
    second = export_model(digits, folder, format=ModelFormat.FP16, preprocess="none", latency_gate=False)
    assert (second.written, second.metrics) == (ModelFormat.FP16, None)
    assert second.size_bytes < 0.6 * first.size_bytes
    assert _proven(second).card.preprocess == "none"
    assert (
        len(read_golden(second.golden).frames[0]) < 8 * 2
    )  # synthetic ones, of the model's own size or a quarter larger


def test_no_room_for_variants_is_told(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no-such-disk"))
    with pytest.raises(ConfigError, match="no-such-disk"):
        export_model(digits, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_int8_without_pictures_is_refused(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        export_model(digits, tmp_path / "release", format=ModelFormat.INT8)
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize("opset", [18, 21])
def test_older_and_newer_operator_sets(tmp_path: Path, digits: Path, opset: int) -> None:
    report = export_model(digits, tmp_path / "release", opset=opset)
    assert report.requirements.opset == opset
    model = onnx.load(report.model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    _proven(report)


def test_a_backbone_that_was_trained_elsewhere_at_another_size(tmp_path: Path) -> None:
    task = _photo_task("resnet18", 32)
    model = build(task, seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the statistics of a trained backbone, under a new head
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean = torch.empty_like(module.bias).normal_(0, 0.1, generator=generator)
                module.running_var = torch.empty_like(module.bias).uniform_(0.5, 2, generator=generator)
    report = export_model(_save(tmp_path, task, model), tmp_path / "release", imgsz=64)
    assert (report.card.preprocessing.height, report.card.preprocessing.width) == (64, 64)
    assert report.info.task.height == 32
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = torch.from_numpy(report.card.preprocessing.normalise(frame.transpose(2, 0, 1)))[None]
    with torch.inference_mode():
        expected = torch.softmax(model.eval()(image), dim=1)[0]
    assert _proven(report).predict(frame).confidence == pytest.approx(float(expected.max()), rel=1e-4)


def test_a_model_with_dense_layers_keeps_its_size(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(ConfigError, match="depends on that"):
        export_model(digits, tmp_path / "release", imgsz=28)
    same = export_model(digits, tmp_path / "release", imgsz=8)
    assert same.card.preprocessing.height == 8


def test_a_privately_trained_resnet_in_int8(tmp_path: Path) -> None:
    pictures = tmp_path / "camera"
    pictures.mkdir()
    from PIL import Image

    generator = np.random.default_rng(2)
    for number in range(20):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(pictures / f"{number}.png")
    report = export_model(
        _untrained(tmp_path, _photo_task("resnet18", 32, dp_ready=True)),
        tmp_path / "release",
        format=ModelFormat.INT8,
        data=str(pictures),
        latency_gate=False,
        max_drop=100,
    )
    assert report.written is ModelFormat.INT8
    operators = {node.op_type for node in onnx.load(report.model).graph.node}
    assert "BatchNormalization" not in operators
    assert "QuantizeLinear" in operators
    assert _proven(report).predict(np.zeros((30, 50, 3), np.uint8)).label in report.card.labels


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    task = _photo_task("cnn", 16)
    model = build(task)
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] = torch.nan
    with pytest.raises(VerificationError, match="NaN"):
        export_model(_save(tmp_path, task, model), tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_a_model_for_no_camera_is_refused(tmp_path: Path) -> None:
    task = replace(_photo_task("cnn", 16), channels=4, mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(ConfigError, match="takes 4 channels"):
        export_model(_save(tmp_path, task, build(task)), tmp_path / "release")
