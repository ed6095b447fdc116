"""Tiny ONNX models, right by their metadata, that do a device harm: each beside the linear model's own answer."""

from pathlib import Path

import numpy as np
import onnx
from linear_model import LABELS, SIDE, card
from onnx import NodeProto, TensorProto, helper, numpy_helper

HUGE_BYTES = 192 * 2**20


def make_odd(folder: Path, nodes: list[NodeProto], **constants: np.ndarray) -> Path:
    """The linear model, whose logits are increased by zero times the scalar ``odd``, which ``nodes`` make of ``image``."""
    weight = np.zeros((SIDE * SIDE, len(LABELS)), np.float32)
    weight[:, 0], weight[:, 1] = -1, 1
    constants |= {"w": weight, "zero": np.float32(0) * np.ones((), np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["linear"]),
            helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
            *nodes,
            helper.make_node("Mul", ["odd", "zero"], ["nothing"]),
            helper.make_node("Add", ["linear", "nothing"], ["logits"]),
        ],
        "odd",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(LABELS)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, card().properties())
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def huge_when_it_runs(folder: Path) -> Path:
    """Spreads one number over 192 MiB."""
    return make_odd(
        folder,
        [
            helper.make_node("Expand", ["mean", "shape"], ["spread"]),
            helper.make_node("Relu", ["spread"], ["relu"]),
            helper.make_node("ReduceMax", ["relu"], ["odd"], keepdims=0),
        ],
        shape=np.array([HUGE_BYTES // 4096, 1024], np.int64),
    )


def huge_when_it_is_loaded(folder: Path) -> Path:
    """A constant of 192 MiB that onnxruntime computes ahead."""
    return make_odd(
        folder,
        [
            helper.make_node("ConstantOfShape", ["shape"], ["spread"]),
            helper.make_node("ReduceMax", ["spread"], ["odd"], keepdims=0),
        ],
        shape=np.array([HUGE_BYTES // 4096, 1024], np.int64),
    )


def slow(folder: Path) -> Path:
    """Multiplies matrices of 256 x 256: some milliseconds."""
    chain = [helper.make_node("MatMul", [f"m{step}", f"m{step}"], [f"m{step + 1}"]) for step in range(6)]
    return make_odd(
        folder,
        [
            helper.make_node("Expand", ["mean", "shape"], ["spread"]),
            helper.make_node("Mul", ["spread", "small"], ["m0"]),
            *chain,
            helper.make_node("ReduceMax", ["m6"], ["odd"], keepdims=0),
        ],
        shape=np.array([256, 256], np.int64),
        small=np.array(1e-3, np.float32),
    )


def endless(folder: Path) -> Path:
    """Counts to 2^62."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_after"]),
            helper.make_node("Add", ["before", "before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go_on_after", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, []),
        ],
    )
    return make_odd(
        folder,
        [helper.make_node("Loop", ["steps", "yes", "mean"], ["odd"], body=body)],
        steps=np.array(2**62, np.int64),
        yes=np.array(True),
    )


def out_of_bounds(folder: Path) -> Path:
    """Looks up an element that is not there, at an index that no checker can foresee."""
    return make_odd(
        folder,
        [
            helper.make_node("Abs", ["mean"], ["size"]),
            helper.make_node("Add", ["size", "far"], ["place"]),
            helper.make_node("Cast", ["place"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["odd"]),
        ],
        far=np.array(1000, np.float32),
        table=np.zeros(3, np.float32),
    )
