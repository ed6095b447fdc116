from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from federation.task.evaluate import evaluate
from federation.task.images import ImageData
from federation.wire.messages import TaskSpec

NewTask = Callable[..., TaskSpec]


class _Brightness(nn.Module):
    """Answers the class whose number is the image's grey value times ten."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        level = (images.mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 10  # undoes the task's mean and std
        return -((torch.arange(10) - level[:, None]) ** 2)


@pytest.fixture
def data(new_task: NewTask) -> ImageData:
    """Six images whose grey value is their class, and one that lies: it looks like a 4 and is labelled 2."""
    looks, labels = np.array([1, 1, 1, 4, 4, 7, 4]), np.array([1, 1, 1, 4, 4, 7, 2])
    return ImageData(
        new_task(size=(4, 4)),
        labels.astype(np.int64),
        lambda index: np.full((1, 4, 4), looks[index] / 10, np.float32),
        in_memory=True,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_accuracy_in_all_and_per_class_that_is_there(data: ImageData, batch_size: int) -> None:
    result = evaluate(_Brightness(), data, batch_size=batch_size)

    assert result.samples == 7
    assert result.accuracy == pytest.approx(6 / 7)
    assert result.per_class == {"1": 1.0, "2": 0.0, "4": 1.0, "7": 1.0}


def test_loss_is_the_mean_cross_entropy_whatever_the_batches(data: ImageData) -> None:
    uniform = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()

    assert evaluate(uniform, data, batch_size=3).loss == pytest.approx(np.log(10), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_put_back(data: ImageData, training: bool) -> None:
    model = _Brightness().train(training)
    evaluate(model, data)

    assert model.training is training
