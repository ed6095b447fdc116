"""Models that are made for private training export as any other."""

from pathlib import Path

import msgspec
import onnx
import pytest
import torch
from torch import nn

from export.convert import export_model
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.models import build, state_arrays
from federation.wire.messages import TaskSpec


def task_of(model: str, side: int, channels: int) -> TaskSpec:
    return TaskSpec(
        model=model,
        labels=("ant", "bee", "cat"),
        channels=channels,
        height=side,
        width=side,
        mean=(0.4,) * channels,
        std=(0.3,) * channels,
        dp_ready=True,
    )


@pytest.mark.parametrize(("name", "side", "channels"), [("mobilenet_v3_small", 32, 3), ("scattering", 28, 1)])
def test_what_devices_train_privately_they_can_run(
    tmp_path: Path, name: str, side: int, channels: int
) -> None:
    task = task_of(name, side, channels)
    model = build(task, seed=3)
    with torch.no_grad():  # a head of zeros would agree with anything
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    checkpoint = tmp_path / "round-1.safetensors"
    checkpoint.write_bytes(
        checkpoint_bytes(CheckpointInfo(federation="garden", round=1, task=task), state_arrays(model))
    )
    report = export_model(checkpoint, tmp_path / "release")

    assert report.parity.relative_error < 1e-4
    operators = {node.op_type for node in onnx.load(report.model).graph.node}
    assert "BatchNormalization" not in operators
    assert report.info.task == msgspec.structs.replace(task, dp_ready=True)
