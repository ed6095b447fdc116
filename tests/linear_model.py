"""Small ONNX models with fedge's metadata, made without torch."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from federation.task.model_card import ModelCard, Provenance
from federation.task.preprocessing import Preprocessing

LABELS = ("dark", "bright", "other")
SIDE = 4


def card(**changes: object) -> ModelCard:
    fields: dict[str, object] = {
        "labels": LABELS,
        "preprocessing": Preprocessing(channels=1, height=SIDE, width=SIDE, mean=(0.5,), std=(0.5,)),
        "provenance": Provenance(
            federation="garden",
            round=3,
            checkpoint_sha256="0" * 64,
            model="linear",
            fedge_version="0",
            git_sha=None,
            metrics=None,
            exported_at="2024-01-01T00:00:00+00:00",
        ),
    }
    return ModelCard(**(fields | changes))  # type: ignore[arg-type]  # a test names the fields


def linear_core(*, scale: float = 1.0, channels: int = 1, side: int = SIDE) -> onnx.ModelProto:
    """A linear model that tells dark pictures from bright ones, without metadata."""
    weight = np.zeros((channels * side * side, len(LABELS)), np.float32)
    weight[:, 0], weight[:, 1] = -scale, scale
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"], name="flatten"),
            helper.make_node("MatMul", ["flat", "w"], ["logits"], name="multiply"),
        ],
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", channels, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(LABELS)])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def make_model(folder: Path, properties: dict[str, str] | None = None, *, scale: float = 1.0) -> Path:
    """A file with a linear model; scale NaN makes it answer with NaN."""
    return save(linear_core(scale=scale), card().properties() if properties is None else properties, folder)


def save(model: onnx.ModelProto, properties: dict[str, str], folder: Path) -> Path:
    """Write a model with metadata."""
    helper.set_model_props(model, properties)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path)
    return path
