"""The steps equal torch's own optimizers to the bit."""

import pytest
import torch
from torch import nn

from edge_agent.optimizers import make_optimizer
from federation.wire.messages import TrainSpec


def small_model() -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model.append(nn.Linear(3, 3))  # gets no gradient in the odd steps below
    return model


def torch_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    if spec.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=spec.learning_rate,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        fused=True,
    )


@pytest.mark.parametrize(
    "spec",
    [
        TrainSpec(momentum=0.0),
        TrainSpec(momentum=0.9, learning_rate=0.1),
        TrainSpec(momentum=0.5, weight_decay=0.01),
        TrainSpec(optimizer="adam", learning_rate=0.003),
        TrainSpec(optimizer="adam", learning_rate=0.003, weight_decay=0.1),
    ],
)
def test_steps_equal_torch_to_the_bit(spec: TrainSpec) -> None:
    ours, theirs = small_model(), small_model()
    steps = [(ours, make_optimizer(ours, spec)), (theirs, torch_optimizer(theirs, spec))]
    for number in range(5):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        for model, optimizer in steps:
            model.zero_grad(set_to_none=True)
            layers = list(model.children())
            outputs = nn.Sequential(*layers[: 3 if number % 2 else 4])(inputs)
            torch.autograd.backward(outputs.square().mean())
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
