"""Smaller formats of a graph: int8 arithmetic, or weights stored in 16 bits.

int8 is static: scales and zero points of activations are found now, by running real pictures, and stand in the file
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"). Activations
are uint8, weights int8 with a scale for each output channel (U8S8), the form that x86 and ARM both have instructions for;
only convolutions and matrix products become integer, for they are what takes the time.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.quiet import quiet
from export.tracing import INPUT_NAME
from federation.errors import ConfigError
from federation.task.preprocessing import Preprocessing

if TYPE_CHECKING:
    import onnx

QUANTIZED_OPERATORS = ("Conv", "Gemm", "MatMul")

_GATE_OPERATORS = ("Conv", "Relu", "HardSigmoid", "Sigmoid", "HardSwish")

_CALIBRATION_BATCH = 16

_HALF_MAX = float(np.finfo(np.float16).max)

_SMALLEST_HALVED = 256
"""Elements: a smaller tensor is not worth the node that brings it back."""


def to_int8(
    core: "onnx.ModelProto",
    recipe: Preprocessing,
    pixels: np.ndarray,
    *,
    in_float: Sequence[str] = (),
    calibration: str = "MinMax",
) -> "onnx.ModelProto":
    """Quantize a graph.

    Args:
        core: From :func:`export.tracing.trace`, whose exporter has folded BatchNorm into convolutions where it can.
        recipe: From pixels to the graph's input.
        pixels: uint8 ``[n, channels, height, width]``, real pictures.
        in_float: Names of nodes to leave as they are.
        calibration: How ranges are found: ``MinMax``, ``Entropy`` or ``Percentile``.

    Returns:
        The same graph with QuantizeLinear and DequantizeLinear around what is quantized, which onnxruntime fuses.

    Raises:
        ConfigError: If onnxruntime cannot quantize it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    def quantize(source: str, target: str) -> None:
        quantize_static(
            source,
            target,
            _Reader(recipe, pixels),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED_OPERATORS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(in_float),
            calibrate_method=CalibrationMethod[calibration],
            calibration_providers=["CPUExecutionProvider"],
        )

    try:
        return _through_files(core, quantize)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise ConfigError(f"onnxruntime cannot quantize this model to int8: {error}") from error


def delicate_layers(core: "onnx.ModelProto") -> tuple[str, ...]:
    """Names of the layers to leave in float32 when quantizing all of them has failed.

    They are the first, the last, the depthwise ones and those of squeeze and excitation. Depthwise convolutions are what
    breaks under int8 in MobileNets (Sheng et al. 2018, "A Quantization-Friendly Separable Convolution for MobileNets"). Neither
    they nor the gates of squeeze and excitation gain anything: they move more bytes than they multiply.
    """
    layers = [node for node in core.graph.node if node.op_type in QUANTIZED_OPERATORS]
    if not layers:
        return ()
    depthwise = [
        node.name
        for node in layers
        if any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
    ]
    return tuple(dict.fromkeys((layers[0].name, *depthwise, *_gate_layers(core), layers[-1].name)))


def _gate_layers(core: "onnx.ModelProto") -> list[str]:
    """Convolutions of what was pooled to one pixel: those of squeeze and excitation (Hu et al. 2018)."""
    names, pooled = [], set()
    for node in core.graph.node:  # in topological order
        if node.op_type == "GlobalAveragePool":
            pooled.add(node.output[0])
        elif node.input and node.input[0] in pooled and node.op_type in _GATE_OPERATORS:
            pooled.add(node.output[0])
            if node.op_type == "Conv":
                names.append(node.name)
    return names


def to_half(core: "onnx.ModelProto") -> "onnx.ModelProto":
    """Store weights as float16 and compute in float32.

    Half the file, as fast, and the same answers everywhere: onnxruntime turns the weights back when it loads the model. The
    usual converters (onnxruntime's and onnxconverter-common) make the arithmetic float16, which an x86 processor does in
    float32 all the same and an ARM processor may not: then the gates here would not have measured what the device does.

    Raises:
        ConfigError: If a weight is beyond float16's range.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.ModelProto()
    model.CopyFrom(core)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _SMALLEST_HALVED:
            continue
        weights = numpy_helper.to_array(tensor)
        if np.abs(weights).max() > _HALF_MAX:
            raise ConfigError(
                f"weights {tensor.name!r} are larger than float16 can hold ({_HALF_MAX:g}): choose --format fp32 or int8"
            )
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(weights.astype(np.float16), f"{name}/half"))
        casts.append(
            helper.make_node("Cast", [tensor.name], [name], name=f"{name}/Cast", to=TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


class _Reader:
    """Hands out batches for calibration (onnxruntime's CalibrationDataReader)."""

    def __init__(self, recipe: Preprocessing, pixels: np.ndarray) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = (
            {INPUT_NAME: recipe.normalise(pixels[start : start + _CALIBRATION_BATCH])}
            for start in range(0, len(pixels), _CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _through_files(model: "onnx.ModelProto", change: Any) -> "onnx.ModelProto":
    """Apply what only knows files."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="fedge-export-") as name:
        source, target = Path(name, "before.onnx"), Path(name, "after.onnx")
        source.write_bytes(model.SerializeToString())
        with quiet():
            change(str(source), str(target))
        changed: onnx.ModelProto = onnx.load(target, load_external_data=False)
    del changed.graph.value_info[:]
    del changed.metadata_props[:]
    return changed
