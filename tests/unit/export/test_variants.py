"""export.variants and export.gates: a smaller model is taken only if it is as good, and it is said why not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from conv_model import CARD, TASK, collapsing_core, conv_core, labelled, photographs
from linear_model import LABELS
from msgspec.structs import replace
from onnx import helper, numpy_helper

from export.gates import Reference, ask, judge
from export.pictures import Pictures, read_pictures
from export.variants import Request, choose
from federation.errors import ConfigError, VerificationError
from federation.task.engine import Engine
from federation.wire.release import ModelFormat, Requirements


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("variants") / "camera", count=40)


def _request(camera: Path, wanted: ModelFormat = ModelFormat.INT8, **changes: object) -> Request:
    fields: dict[str, object] = {
        "format": wanted,
        "task": TASK,
        "card": replace(CARD, preprocess="fused", topk=2),
        "data": str(camera),
        "pictures": read_pictures(str(camera), TASK, train=False, limit=40),
        "max_drop": 10.0,
        # How fast a graph of four nodes is says something about the machine that tests run on, and nothing about us.
        "latency_gate": False,
        "tolerance": 1e-3,
    }
    return Request(**(fields | changes))  # type: ignore[arg-type]  # a test names the fields


def _right(core: onnx.ModelProto, pictures: Pictures, folder: Path) -> Pictures:
    """The pictures with the labels that the float32 model gives them."""
    helper.set_model_props(core, CARD.properties())
    path = folder / "labels.onnx"
    path.write_bytes(core.SerializeToString())
    return labelled(pictures, ask(Engine(path), pictures.pixels).indices)


@pytest.mark.parametrize("preprocess", ["fused", "none"])
def test_int8_that_passes_is_taken(tmp_path: Path, camera: Path, preprocess: str) -> None:
    card = CARD if preprocess == "none" else replace(CARD, preprocess="fused", topk=2)
    chosen = choose(conv_core(), _request(camera, card=card), tmp_path)
    (gate,) = chosen.gates
    assert (gate.format, gate.refused, gate.samples) == (ModelFormat.INT8, "", 40)
    assert gate.agreement >= 0.9
    assert gate.drop_points == pytest.approx(100 * (1 - gate.agreement))
    assert (chosen.reasons, chosen.metrics) == ((), None)  # without labels nothing is known of its accuracy
    assert chosen.card.provenance.weights is ModelFormat.INT8
    assert chosen.card.requirements == Requirements(
        opset=20, ir_version=10, min_runtime="1.18", card_format="1" if preprocess == "none" else "2"
    )
    assert Engine(chosen.path).card == chosen.card
    assert [entry.domain for entry in onnx.load(chosen.path).opset_import] == [""]


def test_accuracy_is_that_of_the_file_where_there_are_labels(tmp_path: Path, camera: Path) -> None:
    core = conv_core()
    pictures = read_pictures(str(camera), TASK, train=False, limit=40)
    chosen = choose(core, _request(camera, pictures=_right(conv_core(), pictures, tmp_path)), tmp_path)
    assert chosen.metrics is not None
    (gate,) = chosen.gates
    assert (gate.accuracy_fp32, gate.accuracy) == (1.0, chosen.metrics.accuracy)
    assert chosen.metrics.drop_points == pytest.approx(100 * (1 - chosen.metrics.accuracy))
    assert chosen.metrics.samples == 40


def test_a_model_that_collapses_stays_in_float32_and_it_is_said_why(tmp_path: Path, camera: Path) -> None:
    pictures = read_pictures(str(camera), TASK, train=False, limit=40)
    request = _request(camera, pictures=_right(collapsing_core(), pictures, tmp_path), max_drop=0.5)
    chosen = choose(collapsing_core(), request, tmp_path)
    assert chosen.card.provenance.weights is ModelFormat.FP32
    assert len(chosen.gates) == 2  # all layers, then without the delicate ones
    for gate in chosen.gates:
        assert gate.drop_points > 20
        assert "accuracy gate" in gate.refused
        assert "a drop of at most 0.5 points" in gate.refused
    assert "int8 (all convolutions and matrix products) was refused by the accuracy gate" in chosen.reasons[0]
    assert chosen.reasons[-1] == "so fp32 was written"
    assert chosen.metrics is not None
    assert (chosen.metrics.accuracy, chosen.metrics.drop_points) == (1.0, 0.0)


def test_without_labels_the_classes_must_stay_the_same(tmp_path: Path, camera: Path) -> None:
    chosen = choose(collapsing_core(), _request(camera, max_drop=0.5), tmp_path)
    assert chosen.card.provenance.weights is ModelFormat.FP32
    assert "have another class than with fp32" in chosen.gates[0].refused


def test_sixteen_bits_need_no_pictures_of_the_cameras(tmp_path: Path, camera: Path) -> None:
    chosen = choose(conv_core(), _request(camera, ModelFormat.FP16, data=None, max_drop=0.0), tmp_path)
    assert chosen.card.provenance.weights is ModelFormat.FP16
    assert chosen.gates[0].agreement == 1


def test_weights_that_16_bits_cannot_hold_stay_in_float32(tmp_path: Path, camera: Path) -> None:
    core = conv_core()
    tensors = {tensor.name: tensor for tensor in core.graph.initializer}
    for name, factor in (("w3", 1e6), ("w4", 1e-6)):
        value = numpy_helper.to_array(tensors[name]) * np.float32(factor)
        tensors[name].CopyFrom(numpy_helper.from_array(value, name))
    chosen = choose(core, _request(camera, ModelFormat.FP16), tmp_path)
    assert chosen.card.provenance.weights is ModelFormat.FP32
    assert "larger than float16 can hold" in chosen.reasons[0]


def test_float32_has_no_gates_and_its_accuracy_is_told(tmp_path: Path, camera: Path) -> None:
    pictures = read_pictures(str(camera), TASK, train=False, limit=40)
    right = _right(conv_core(), pictures, tmp_path)
    chosen = choose(conv_core(), _request(camera, ModelFormat.FP32, pictures=right), tmp_path)
    assert (chosen.gates, chosen.reasons) == ((), ())
    assert chosen.metrics is not None
    assert (chosen.metrics.accuracy, chosen.metrics.drop_points) == (1.0, 0.0)


def test_noise_does_not_calibrate(tmp_path: Path, camera: Path) -> None:
    from PIL import Image

    noise = tmp_path / "noise"
    noise.mkdir()
    generator = np.random.default_rng(3)
    for number in range(20):
        Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8)).save(noise / f"{number}.png")
    with pytest.raises(ConfigError, match="looks like noise"):
        choose(conv_core(), _request(camera, data=str(noise)), tmp_path)


def _engine(folder: Path, core: onnx.ModelProto) -> Engine:
    helper.set_model_props(core, CARD.properties())
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    path.write_bytes(core.SerializeToString())
    return Engine(path)


def _laborious() -> onnx.ModelProto:
    """The same answers, after a detour of a thousand times the work."""
    core = conv_core()
    wide = 1024
    core.graph.node[-1].output[0] = "answer"
    core.graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros((len(LABELS), wide), np.float32), "up"),
            numpy_helper.from_array(np.eye(wide, dtype=np.float32), "across"),
            numpy_helper.from_array(np.zeros((wide, len(LABELS)), np.float32), "down"),
        ]
    )
    nodes = [helper.make_node("MatMul", ["answer", "up"], ["step0"])]
    nodes += [helper.make_node("MatMul", [f"step{n}", "across"], [f"step{n + 1}"]) for n in range(20)]
    nodes += [
        helper.make_node("MatMul", ["step20", "down"], ["nothing"]),
        helper.make_node("Add", ["answer", "nothing"], ["logits"]),
    ]
    core.graph.node.extend(nodes)
    return core


def test_a_variant_that_is_slower_is_refused(tmp_path: Path, camera: Path) -> None:
    pictures = read_pictures(str(camera), TASK, train=False, limit=20)
    reference = Reference.of(_engine(tmp_path, conv_core()), pictures)
    gate = judge(
        _engine(tmp_path, _laborious()),
        reference,
        format=ModelFormat.INT8,
        how="made slow",
        size_bytes=1,
        max_drop=0.0,
        latency_gate=True,
    )
    assert gate.agreement == 1
    assert gate.latency_ms is not None
    assert gate.latency_fp32_ms is not None
    assert "latency gate" in gate.refused
    assert "where fp32 takes" in gate.refused


def test_a_variant_that_answers_nan_is_refused(tmp_path: Path, camera: Path) -> None:
    pictures = read_pictures(str(camera), TASK, train=False, limit=20)
    reference = Reference.of(_engine(tmp_path, conv_core()), pictures)
    broken = conv_core()
    tensor = broken.graph.initializer[-1]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.nan, tensor.name))
    gate = judge(
        _engine(tmp_path, broken),
        reference,
        format=ModelFormat.INT8,
        how="broken",
        size_bytes=1,
        max_drop=100.0,
        latency_gate=False,
    )
    assert "NaN" in gate.refused
    with pytest.raises(VerificationError, match="NaN"):
        Reference.of(_engine(tmp_path, broken), pictures)
