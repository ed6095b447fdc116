"""The least that training takes: torch, torchvision, the images as bytes, and a loop of ten lines. No fedge.

``python -m benchmarks.plain_training MNIST_FOLDER SAMPLES BATCH EPOCHS RATE MOMENTUM`` trains the seed CNN.
"""

import sys

import torch
from torch import nn
from torchvision import datasets


def main(folder: str, samples: int, batch: int, epochs: int, rate: float, momentum: float) -> None:
    """Train on the first ``samples`` images, with one thread as the agent does."""
    torch.set_num_threads(1)
    whole = datasets.MNIST(folder)
    images, labels = whole.data[:samples, None].clone(), whole.targets[:samples].clone()
    del whole
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1024, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(samples), batch):
            loss = nn.functional.cross_entropy(model(images[rows].float().div_(255)), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()


if __name__ == "__main__":
    main(
        sys.argv[1],
        *(int(argument) for argument in sys.argv[2:5]),
        *(float(argument) for argument in sys.argv[5:7]),
    )
