"""Graphs of a few layers for export's tests, made without torch, and pictures to run them on."""

from pathlib import Path

import numpy as np
import onnx
from linear_model import LABELS, card
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from export.pictures import Pictures
from federation.task.preprocessing import Preprocessing
from federation.wire.messages import TaskSpec

SIDE = 8

TASK = TaskSpec(
    model="made-by-hand", labels=LABELS, channels=1, height=SIDE, width=SIDE, mean=(0.5,), std=(0.5,)
)
RECIPE = Preprocessing.of(TASK)
CARD = card(preprocessing=RECIPE)

_DEPTH = 8


def conv_core() -> onnx.ModelProto:
    """Convolution, depthwise convolution, product: random weights, three classes."""
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    weights = {
        "w1": normal(_DEPTH, 1, 3, 3),
        "w2": normal(_DEPTH, 1, 3, 3),
        "w3": normal(_DEPTH * (SIDE - 4) ** 2, 16) / 8,
        "w4": normal(16, len(LABELS)),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="depthwise", group=_DEPTH),
        helper.make_node("Flatten", ["c"], ["d"], name="flatten"),
        helper.make_node("MatMul", ["d", "w3"], ["e"], name="middle"),
        helper.make_node("MatMul", ["e", "w4"], ["logits"], name="last"),
    ]
    return _model(nodes, weights)


def collapsing_core() -> onnx.ModelProto:
    """Tells dark from bright by faint signals beside a loud one that means nothing: more than int8's range can hold."""
    pixels = SIDE * SIDE
    into = np.zeros((pixels, 3), np.float32)
    into[:, 0], into[:, 1] = -1e-4, 1e-4
    into[0, 2] = 1e4  # loud
    out = np.zeros((3, len(LABELS)), np.float32)
    out[0, 0] = out[1, 1] = 1e3
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "into"], ["a"], name="into"),
        helper.make_node("MatMul", ["a", "through"], ["b"], name="through"),
        helper.make_node("MatMul", ["b", "out"], ["logits"], name="out"),
    ]
    return _model(nodes, {"into": into, "through": np.eye(3, dtype=np.float32), "out": out})


def photographs(folder: Path, *, count: int = 24) -> Path:
    """Soft blobs as files without labels, some dark and some bright."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    for number in range(count):
        low = 0 if number % 2 else 100
        coarse = Image.fromarray(generator.integers(low, low + 156, (4, 4), dtype=np.uint8))
        coarse.resize((SIDE + number, SIDE * 2), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def labelled(pictures: Pictures, labels: np.ndarray) -> Pictures:
    """The same pictures, with labels."""
    return Pictures(pictures.where, pictures.pixels, labels, pictures.frames, pictures.correlations)


def _model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "made-by-hand",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(LABELS)])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model
