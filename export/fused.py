"""Preprocessing, softmax and top-k as part of the graph: a raw frame goes in, the most likely classes come out.

A device then runs one graph for a frame. What surrounds the model stays in float32, whatever format the model has.
"""

from typing import TYPE_CHECKING

import numpy as np

from export.tracing import INPUT_NAME, OUTPUT_NAME
from federation.errors import ConfigError
from federation.task.preprocessing import PICTURE_MODES, Preprocessing

if TYPE_CHECKING:
    import onnx

FRAME_NAME = "frame"
PROBABILITIES_NAME = "probabilities"
INDICES_NAME = "indices"

_PREFIX = "fused/"
"""Of the names of what is added, so that they meet none of the model's own."""


def fuse(core: "onnx.ModelProto", recipe: Preprocessing, *, topk: int) -> "onnx.ModelProto":
    """Put a model between its preprocessing and top-k.

    Resizing is a triangle filter that widens when it shrinks (ONNX ``Resize``, linear, antialias), as Pillow's BILINEAR,
    which rounds to whole grey levels in between and this does not. A frame of the model's own size passes unchanged.

    Args:
        core: Takes float32 ``image`` ``[N, channels, height, width]``, normalised, and gives float32 ``logits``
            ``[N, classes]``; opset 18 or later.
        recipe: From a frame to the model's input.
        topk: How many classes the graph answers with; at most as many as the model has.

    Returns:
        A model of its own that takes uint8 ``frame`` ``[N, frame_height, frame_width, channels]`` of any size, and gives
        float32 ``probabilities`` and int64 ``indices`` ``[N, topk]``, most likely first.

    Raises:
        ConfigError: If no frame has as many channels as the model.
    """
    import onnx
    from onnx import TensorProto, helper

    if recipe.channels not in PICTURE_MODES:
        raise ConfigError(
            f"the model takes {recipe.channels} channels, a camera gives 1 or 3: export it with --preprocess none"
        )
    model = onnx.ModelProto()
    model.CopyFrom(core)
    graph = model.graph
    factor, offset = recipe.affine()
    constants = {
        "size": np.array([recipe.channels, recipe.height, recipe.width], np.int64),
        "factor": factor[None],
        "offset": offset[None],
        "k": np.array([topk], np.int64),
    }
    before = [
        # Transposed as bytes: a quarter of the memory traffic.
        helper.make_node("Transpose", [FRAME_NAME], [_PREFIX + "planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", [_PREFIX + "planes"], [_PREFIX + "pixels"], to=TensorProto.FLOAT),
        helper.make_node("Shape", [FRAME_NAME], [_PREFIX + "batch"], start=0, end=1),
        helper.make_node("Concat", [_PREFIX + "batch", _PREFIX + "size"], [_PREFIX + "sizes"], axis=0),
        helper.make_node(
            "Resize",
            [_PREFIX + "pixels", "", "", _PREFIX + "sizes"],
            [_PREFIX + "resized"],
            mode="linear",
            antialias=1,
        ),
        helper.make_node("Mul", [_PREFIX + "resized", _PREFIX + "factor"], [_PREFIX + "scaled"]),
        helper.make_node("Sub", [_PREFIX + "scaled", _PREFIX + "offset"], [INPUT_NAME]),
    ]
    after = [
        helper.make_node("Softmax", [OUTPUT_NAME], [_PREFIX + "shares"], axis=1),
        helper.make_node(
            "TopK", [_PREFIX + "shares", _PREFIX + "k"], [PROBABILITIES_NAME, INDICES_NAME], axis=1
        ),
    ]
    for node in (*before, *after):
        node.name = _PREFIX + node.op_type
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    frame_shape: list[str | int | None] = ["N", "frame_height", "frame_width", recipe.channels]
    graph.input.append(helper.make_tensor_value_info(FRAME_NAME, TensorProto.UINT8, frame_shape))
    graph.output.append(helper.make_tensor_value_info(PROBABILITIES_NAME, TensorProto.FLOAT, ["N", topk]))
    graph.output.append(helper.make_tensor_value_info(INDICES_NAME, TensorProto.INT64, ["N", topk]))
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value, _PREFIX + name) for name, value in constants.items()
    )
    onnx.checker.check_model(model)
    return model
