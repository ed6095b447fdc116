"""What a device must have to run an exported model."""

from typing import TYPE_CHECKING

from federation.errors import ConfigError
from federation.wire.release import Requirements

if TYPE_CHECKING:
    import onnx

_SINCE_OPSET = {18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21"}
"""ONNX operator set -> the first onnxruntime that implements it (onnxruntime's compatibility page)."""

_SINCE_IR = {8: "1.14", 9: "1.15", 10: "1.18"}
"""ONNX intermediate representation -> the first onnxruntime that loads it. Tried with 1.17.3, 1.18.1, 1.20.1 and 1.21.1."""

NEWEST_OPSET = max(_SINCE_OPSET)


def requirements_of(model: "onnx.ModelProto", card_format: str) -> Requirements:
    """Read from a model what it needs.

    Raises:
        ConfigError: If no onnxruntime is known to run it.
    """
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    ir_version = model.ir_version
    if opset not in _SINCE_OPSET or ir_version not in _SINCE_IR:
        raise ConfigError(
            f"no onnxruntime is known here to run opset {opset} and IR {ir_version}: choose --opset {NEWEST_OPSET} or lower"
        )
    oldest = max(_SINCE_OPSET[opset], _SINCE_IR[ir_version], key=_parts)
    return Requirements(opset=opset, ir_version=ir_version, min_runtime=oldest, card_format=card_format)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
