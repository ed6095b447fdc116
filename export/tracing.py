"""From a torch model to an ONNX graph."""

from typing import TYPE_CHECKING

from export.quiet import quiet
from federation.errors import ConfigError

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from federation.wire.messages import TaskSpec

DEFAULT_OPSET = 20
"""The dynamo exporter's own default."""

OLDEST_OPSET = 18
"""The dynamo exporter writes 18 and converts from there; it promises nothing below."""

INPUT_NAME = "image"
OUTPUT_NAME = "logits"

_IMAGES_RANK = 4
_HEIGHT_AND_WIDTH = {2, 3}
_WITH_AXES = 2

_TRACED_BATCH = 2
"""torch.export treats a dimension of 1 as a constant, which would fix the batch."""


def trace(model: "nn.Module", task: "TaskSpec", *, opset: int) -> "onnx.ModelProto":
    """Export a model with a dynamic batch.

    Args:
        model: On the CPU, in evaluation mode.
        task: Gives the input's shape.
        opset: ONNX operator set, 18 or later.

    Returns:
        A graph that takes float32 ``image`` ``[N, channels, height, width]``, normalised, and gives float32 ``logits``
        ``[N, labels]``; without metadata.

    Raises:
        ConfigError: If the model cannot be exported.
    """
    import onnx
    import torch

    example = torch.zeros(_TRACED_BATCH, task.channels, task.height, task.width)
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: "N"},),
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                verbose=False,
            )
            assert program is not None  # the dynamo exporter always returns one
            proto: onnx.ModelProto = program.model_proto
        _pool_globally(proto.graph)
        _strip(proto.graph)
        onnx.checker.check_model(proto)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ConfigError(
            f"model {task.model!r} cannot be exported to ONNX opset {opset}: {reason}. Try another --opset; "
            "a plug-in model must avoid control flow that depends on the data"
        ) from error
    return proto


def _pool_globally(graph: "onnx.GraphProto") -> None:
    """Say GlobalAveragePool where the exporter says ReduceMean over height and width.

    They compute the same, but onnxruntime has the former in the blocked layout of its convolutions, and need not leave that for
    every squeeze and excitation.
    """
    from onnx import numpy_helper

    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if (
            node.op_type != "ReduceMean"
            or len(node.input) != _WITH_AXES
            or ranks.get(node.input[0]) != _IMAGES_RANK
        ):
            continue
        axes = constants.get(node.input[1])
        kept = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
        if axes is None or not kept:
            continue
        if {int(axis) % _IMAGES_RANK for axis in numpy_helper.to_array(axes)} == _HEIGHT_AND_WIDTH:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    used = {name for node in graph.node for name in node.input}
    kept_tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept_tensors)


def _strip(graph: "onnx.GraphProto") -> None:
    """Drop what only the exporter's own machine needs.

    The exporter notes stack traces with file paths at every node, and lists initializers among the intermediate
    values, which onnxruntime's quantizer cannot bear.
    """
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
