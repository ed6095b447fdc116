"""edge_agent.releases.runtime: what the installed onnxruntime says it can run, held against what it does run."""

import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edge_agent.releases.runtime import objection
from federation.wire.release import Requirements


def needs(opset: int = 20, ir_version: int = 10, runtime: str = "1.18", card: str = "1") -> Requirements:
    return Requirements(opset=opset, ir_version=ir_version, min_runtime=runtime, card_format=card)


def runs(opset: int, ir_version: int) -> bool:
    """Whether onnxruntime loads a model of these versions that the onnx package has written."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - onnxruntime's exceptions share no base class
        return False
    return True


@pytest.mark.parametrize("opset", [7, 13, 20, onnx.defs.onnx_opset_version(), 90, 900])
@pytest.mark.parametrize("ir_version", [4, 10, onnx.IR_VERSION, 90, 900])
def test_it_says_of_any_versions_what_onnxruntime_does_with_them(opset: int, ir_version: int) -> None:
    assert (objection(needs(opset, ir_version)) == "") is runs(opset, ir_version)


@pytest.mark.parametrize(
    ("runtime", "enough"),
    [("1.18", True), (ort.__version__, True), ("1.999", False), ("2.0", False), ("0.9999.9999", True)],
)
def test_versions_are_compared_by_their_numbers(runtime: str, enough: bool) -> None:
    assert (objection(needs(runtime=runtime)) == "") is enough


def test_metadata_of_a_later_format_is_not_understood() -> None:
    assert objection(needs(card="2")) == ""
    assert "update fedge" in objection(needs(card="9"))
