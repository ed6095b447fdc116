"""export.quantize: which numbers become smaller, and which stay."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conv_model import RECIPE, TASK, conv_core, photographs
from onnx import TensorProto, numpy_helper

from export.pictures import read_pictures
from export.quantize import delicate_layers, to_half, to_int8
from federation.errors import ConfigError


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder = photographs(tmp_path_factory.mktemp("quantize") / "camera")
    return read_pictures(str(folder), TASK, train=True, limit=24).pixels


def _run(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    (logits,) = ort.InferenceSession(model.SerializeToString()).run(None, {"image": batch})
    return np.asarray(logits)


def _feeding(model: onnx.ModelProto, name: str) -> list[str]:
    """Operators of the nodes that a node's inputs come from."""
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    node = next(node for node in model.graph.node if node.name == name)
    return [makers.get(entry, "") for entry in node.input]


def test_activations_are_uint8_and_weights_int8_for_each_channel(
    pixels: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    model = to_int8(conv_core(), RECIPE, pixels)
    assert capfd.readouterr() == ("", "")
    for name in ("first", "depthwise", "middle", "last"):
        assert _feeding(model, name)[:2] == ["DequantizeLinear"] * 2
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = tensors["w1_quantized"]
    assert (weight.data_type, list(weight.dims)) == (TensorProto.INT8, [8, 1, 3, 3])
    assert list(tensors["w1_scale"].dims) == [8]
    assert tensors["image_zero_point"].data_type == TensorProto.UINT8
    assert not model.graph.value_info


def test_the_quantized_model_says_nearly_the_same(pixels: np.ndarray) -> None:
    core = conv_core()
    batch = RECIPE.normalise(pixels)
    exact, rounded = _run(core, batch), _run(to_int8(core, RECIPE, pixels), batch)
    assert np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
    assert (exact.argmax(axis=1) == rounded.argmax(axis=1)).mean() > 0.9


def test_what_is_delicate_stays_in_float(pixels: np.ndarray) -> None:
    core = conv_core()
    assert delicate_layers(core) == ("first", "depthwise", "last")
    model = to_int8(core, RECIPE, pixels, in_float=delicate_layers(core))
    assert _feeding(model, "middle")[:2] == ["DequantizeLinear"] * 2
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    assert tensors["w1"].data_type == TensorProto.FLOAT
    assert "w3" not in tensors


def test_gates_of_squeeze_and_excitation_are_delicate() -> None:
    core = conv_core()
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["b"], ["pooled"]),
        onnx.helper.make_node("Conv", ["pooled", "squeeze"], ["s"], name="squeeze"),
        onnx.helper.make_node("Relu", ["s"], ["t"]),
        onnx.helper.make_node("Conv", ["t", "excite"], ["u"], name="excite"),
        onnx.helper.make_node("Sigmoid", ["u"], ["gate"]),
        onnx.helper.make_node("Mul", ["b", "gate"], ["scaled"]),
        onnx.helper.make_node("Conv", ["scaled", "next"], ["v"], name="next"),
    ]
    for place, node in enumerate(nodes):
        core.graph.node.insert(2 + place, node)
    assert delicate_layers(core) == ("first", "depthwise", "squeeze", "excite", "last")


def test_a_graph_without_layers_has_none_that_are_delicate() -> None:
    core = conv_core()
    del core.graph.node[:]
    assert delicate_layers(core) == ()


def test_half_the_bits_of_weights_and_none_of_the_arithmetic(pixels: np.ndarray) -> None:
    core = conv_core()
    model = to_half(core)
    stored = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16]
    assert [tensor.name for tensor in stored] == ["w3/half"]  # the others are too small to matter
    assert model.ByteSize() < 0.65 * core.ByteSize()
    rounded = conv_core()
    weights = next(tensor for tensor in rounded.graph.initializer if tensor.name == "w3")
    halved = numpy_helper.to_array(weights).astype(np.float16).astype(np.float32)
    weights.CopyFrom(numpy_helper.from_array(halved, "w3"))
    batch = RECIPE.normalise(pixels)
    assert (_run(model, batch) == _run(rounded, batch)).all()


def test_weights_beyond_float16_are_refused() -> None:
    core = conv_core()
    weights = next(tensor for tensor in core.graph.initializer if tensor.name == "w3")
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * 1e6, "w3"))
    with pytest.raises(ConfigError, match="larger than float16 can hold"):
        to_half(core)


def test_nothing_is_left_behind(pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    to_int8(conv_core(), RECIPE, pixels)
    assert list(tmp_path.iterdir()) == []
