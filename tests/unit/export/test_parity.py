"""export.parity: the check sees a wrong model, and forgives a tie."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.parity import check_parity, top1_changes
from federation.errors import VerificationError
from federation.task.preprocessing import Preprocessing

RECIPE = Preprocessing(channels=1, height=4, width=4, mean=(0.5,), std=(0.5,))


def _pair(*, error: float = 0.0, classes: int = 3) -> tuple[bytes, torch.nn.Module]:
    """The same linear classifier twice; ``error`` is added to one weight of the ONNX one."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((16, classes)).astype(np.float32)
    linear = torch.nn.Linear(16, classes, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight.T.copy()))
    weight[0, 0] += error
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString(), torch.nn.Sequential(torch.nn.Flatten(), linear)


def test_equal_models_pass() -> None:
    content, model = _pair()
    parity = check_parity(content, model, RECIPE)
    assert parity.relative_error < 1e-6
    assert parity.top1_changes == 0
    assert parity.random_inputs > 16


@pytest.mark.parametrize("error", [1e-2, np.nan, np.inf])
def test_one_wrong_weight_fails(error: float) -> None:
    content, model = _pair(error=error)
    with pytest.raises(VerificationError):
        check_parity(content, model, RECIPE)


def test_another_number_of_classes_fails() -> None:
    content, _ = _pair(classes=3)
    _, model = _pair(classes=4)
    with pytest.raises(VerificationError, match=r"gives logits of \[1, 3\]"):
        check_parity(content, model, RECIPE)


def test_all_logits_zero_is_no_division_by_zero() -> None:
    content, model = _pair()
    silent = onnx.load_from_string(content)
    silent.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((16, 3), np.float32), "w"))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert check_parity(silent.SerializeToString(), model, RECIPE).relative_error == 0


def test_a_changed_class_counts_unless_it_is_a_tie() -> None:
    expected = np.array([[1.0, 2.0, 0.0], [1.0, 1.00001, 0.0], [3.0, 0.0, 0.0]])
    actual = np.array([[2.0, 1.0, 0.0], [1.00001, 1.0, 0.0], [3.0, 0.0, 0.0]])
    assert top1_changes(expected, actual, tie=1e-4) == 1
    assert top1_changes(expected, actual, tie=1e-6) == 2
    assert top1_changes(expected, expected, tie=0.0) == 0
