"""What the onnxruntime of this device can run: it is asked itself, no table of versions can fall behind it."""

import re

import onnxruntime as ort

from federation.task.model_card import FUSED_FORMAT, PLAIN_FORMAT
from federation.wire.release import Requirements

_FATAL_ONLY = 4
"""onnxruntime's severity: what it says about the probe is returned, not printed."""


def objection(requirements: Requirements) -> str:
    """What this device lacks to run a release, before a byte of it is fetched.

    Args:
        requirements: Of the release.

    Returns:
        For people; empty if it lacks nothing.
    """
    if requirements.card_format not in (PLAIN_FORMAT, FUSED_FORMAT):
        return (
            f"the model's metadata has format {requirements.card_format!r}, this device reads {PLAIN_FORMAT!r} and "
            f"{FUSED_FORMAT!r}: update fedge here"
        )
    if _numbers(ort.__version__) < _numbers(requirements.min_runtime):
        return f"the model needs onnxruntime {requirements.min_runtime}, this device has {ort.__version__}: update it"
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    try:
        ort.InferenceSession(
            _identity(requirements.opset, requirements.ir_version),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception:  # noqa: BLE001 - onnxruntime's exceptions share no base class, and their texts name its own lines
        return (
            f"onnxruntime {ort.__version__} cannot run operator set {requirements.opset} with intermediate "
            f"representation {requirements.ir_version}: update it"
        )
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that lead a version: "1.20.0rc1" is 1, 20, 0."""
    leading = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def _identity(opset: int, ir_version: int) -> bytes:
    """The smallest model of these versions, as ``onnx.proto3`` writes it: y = Identity(x), one float.

    A device has no ``onnx`` package to write it with; field numbers are those of onnx.proto3.
    """
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Identity")
    shape = _field(1, b"\x08\x01")  # TensorShapeProto.dim.dim_value = 1
    tensor = b"\x08\x01" + _field(2, shape)  # elem_type = FLOAT
    kind = _field(2, _field(1, tensor))  # ValueInfoProto.type.tensor_type
    graph = _field(1, node) + _field(2, b"probe")
    graph += _field(11, _field(1, b"x") + kind) + _field(12, _field(1, b"y") + kind)
    versions = _field(8, b"\x10" + _varint(opset))  # OperatorSetIdProto.version of the default domain
    return b"\x08" + _varint(ir_version) + _field(7, graph) + versions


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field (wire type 2)."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte, as protocol buffers have it
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
