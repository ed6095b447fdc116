"""How good a model is on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from federation.task.images import ImageData

if TYPE_CHECKING:
    from torch import nn

EVALUATION_BATCH = 256
"""Images at once: beyond this the cnn gets no faster, and a ResNet's activations outgrow a small device."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        loss: Mean cross-entropy, nats.
        accuracy: Share of images whose likeliest label is right, in [0, 1].
        per_class: The same for each label that the data has images of.
        samples: Images evaluated.
    """

    loss: float
    accuracy: float
    per_class: dict[str, float]
    samples: int


def evaluate(
    model: nn.Module, data: ImageData, *, batch_size: int = EVALUATION_BATCH, device: str = "cpu"
) -> Evaluation:
    """Run a model over a whole data set, in evaluation mode; its mode is put back afterwards.

    Args:
        model: On ``device``.
        data: In the shape of the model's task.
        batch_size: Images at once.
        device: Where to compute.

    Raises:
        ConfigError: If an image that is read from its file now is damaged or gone.
    """
    import torch

    classes = len(data.task.labels)
    right = np.zeros(classes, np.int64)
    loss_sum = 0.0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(data), batch_size):
                rows = np.arange(start, min(start + batch_size, len(data)))
                images, labels = data.batch(rows, device)
                logits = model(images)
                loss_sum += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                hits = (logits.argmax(dim=1) == labels).cpu().numpy()
                right += np.bincount(data.labels[rows[hits]], minlength=classes)
    finally:
        model.train(was_training)
    there = np.bincount(data.labels, minlength=classes)
    return Evaluation(
        loss=loss_sum / len(data),
        accuracy=float(right.sum()) / len(data),
        per_class={
            label: float(right[number] / there[number])
            for number, label in enumerate(data.task.labels)
            if there[number]
        },
        samples=len(data),
    )
