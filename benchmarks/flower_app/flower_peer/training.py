"""The least that local training takes: torch, Pillow and a loop of ten lines, as fedge's agent trains."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

CLASSES = 10

_MEAN, _STD = 0.1307, 0.3081
_SMALLEST_UNPADDED = 16


def build(name: str, side: int) -> nn.Module:
    """``cnn``, or a torchvision model, for grey images of ``side`` pixels: as ``federation.task.models`` builds it."""
    if name == "cnn":
        padding = 2 if side < _SMALLEST_UNPADDED else 0
        left = side
        for _ in range(2):
            left = (left + 2 * padding - 4) // 2
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 5, padding=padding), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(32, 64, 5, padding=padding), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * left * left, 120), nn.ReLU()),
            *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)),
        )
    from torchvision import models  # 160 MB of memory: not for those who need none of it

    model: nn.Module = models.get_model(name, weights=None, num_classes=CLASSES)
    first = model.conv1
    assert isinstance(first, nn.Conv2d)
    model.conv1 = nn.Conv2d(1, first.out_channels, 7, stride=2, padding=3, bias=False)
    return model


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a folder with one sub-folder for each class.

    Returns:
        uint8 ``[N, 1, side, side]`` and int64 ``[N]``.
    """
    files = [
        (path, label) for label in range(CLASSES) for path in sorted((folder / str(label)).glob("*.png"))
    ]
    pixels = np.stack([np.asarray(Image.open(path)) for path, _ in files])[:, None]
    return torch.from_numpy(pixels), torch.tensor([label for _, label in files])


def train(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    momentum: float,
) -> float:
    """Train in place; returns the last batch's loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    loss = torch.zeros(())
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(labels)), batch_size):
            batch = images[rows].float().div_(255).sub_(_MEAN).div_(_STD)
            loss = nn.functional.cross_entropy(model(batch), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return float(loss.detach())
