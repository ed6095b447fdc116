"""The gradient-inversion demonstration: what a curious aggregator recovers with and without protection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from federation.task.images import ImageData
from federation.wire.messages import TaskSpec
from privacy.audit.inversion import clip_and_noise, gradient, invert, similarity
from privacy.commands.findings import Picture

if TYPE_CHECKING:
    import torch
    from torch import nn

CLIP_NORM, NOISE_MULTIPLIER = 1.0, 0.1
"""Weak as differential privacy goes (a plan for epsilon 8 has ten times the noise), and enough against this attack."""

DEVICES = 10
"""In the masked sum, each with one picture: the hardest case for secure aggregation."""

RECOGNISABLE = 0.7
"""Correlation above which people recognise a digit or an object, by eye on MNIST and CIFAR-10."""


def recover(model: nn.Module, data: ImageData, count: int, seed: int) -> tuple[Picture, ...]:
    """Attack the gradients of some pictures, each of another class as far as there are classes.

    Args:
        model: As the devices have it when they compute gradients; left as it is.
        data: In the shape of its task.
        count: Pictures, at most :data:`DEVICES`.
        seed: Of the choice and of the attack's first guesses.

    Returns:
        The originals, then what was recovered without protection, from a masked sum, and after clipping and noise.
    """
    random = np.random.default_rng([seed, 3])
    rows = _of_different_classes(data.labels, max(count, DEVICES), random)
    images, labels = data.batch(rows)
    originals = images.numpy()
    low, high = _pixel_range(data.task)
    was_training = model.training
    model.eval()

    def attack(seen: list[torch.Tensor], of: torch.Tensor) -> np.ndarray:
        return invert(model, seen, of, low=low, high=high, seed=seed).images

    def one(number: int) -> list[torch.Tensor]:
        return gradient(model, images[number : number + 1], labels[number : number + 1])

    singles = [labels[number : number + 1] for number in range(count)]
    plain = np.concatenate([attack(one(number), singles[number]) for number in range(count)])
    # The mean gradient of pictures is the sum of the devices' gradients, up to a factor that the attack does not see.
    masked = attack(gradient(model, images[:DEVICES], labels[:DEVICES]), labels[:DEVICES])[:count]
    noised = np.concatenate(
        [
            attack(clip_and_noise(one(number), CLIP_NORM, NOISE_MULTIPLIER), singles[number])
            for number in range(count)
        ]
    )
    model.train(was_training)

    def row(title: str, text: str, found: np.ndarray) -> Picture:
        alike = tuple(similarity(found[number], originals[number]) for number in range(count))
        return Picture(title, f"{text} {_said(alike)}", to_pixels(found, data.task), alike)

    return (
        Picture("The pictures", "On the devices, never sent.", to_pixels(originals[:count], data.task), ()),
        row("No protection: the gradient of a single picture", "What an aggregator without protection sees.", plain),
        row(
            f"Secure aggregation alone: the sum of {DEVICES} devices with one picture each",
            "Nobody can say any more which device a picture comes from, and the pictures blend; but what is in the sum may show. "
            "With many pictures per device it is far harder. Secure aggregation hides who, differential privacy hides what: "
            "together they hide both.",
            masked,
        ),
        row(
            f"DP-SGD: clipped to {CLIP_NORM:g}, noise {NOISE_MULTIPLIER:g}",
            "The noise of DP-SGD is usually ten times as strong.",
            noised,
        ),
    )  # fmt: skip


def labels_of(data: ImageData, count: int, seed: int) -> tuple[str, ...]:
    """The labels of the pictures that :func:`recover` shows."""
    random = np.random.default_rng([seed, 3])
    rows = _of_different_classes(data.labels, max(count, DEVICES), random)[:count]
    return tuple(data.task.labels[label] for label in data.labels[rows])


def to_pixels(images: np.ndarray, task: TaskSpec) -> np.ndarray:
    """Undo the normalisation.

    Args:
        images: float32 ``[n, C, H, W]``.
        task: Gives mean and std.

    Returns:
        uint8 ``[n, H, W, C]``, with 1 or 3 channels.
    """
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (task.mean, task.std))
    pixels = np.clip(images * std + mean, 0, 1).transpose(0, 2, 3, 1)
    if pixels.shape[-1] not in (1, 3):
        pixels = pixels.mean(axis=-1, keepdims=True)
    return np.asarray(np.round(pixels * 255), np.uint8)


def _of_different_classes(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Rows: the first of each class, then the second of each, and so on, after shuffling."""
    order = random.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels[order] == label)
        rank[of_class] = np.arange(len(of_class))
    chosen: np.ndarray = order[np.argsort(rank, kind="stable")][:count]
    return chosen


def _pixel_range(task: TaskSpec) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    shape = (task.channels, task.height, task.width)
    mean, std = (torch.tensor(values)[:, None, None].expand(shape) for values in (task.mean, task.std))
    return -mean / std, (1 - mean) / std


def _said(alike: tuple[float, ...]) -> str:
    known = sum(value > RECOGNISABLE for value in alike)
    if not known:
        return f"None of {len(alike)} is recognisable here."
    return f"{known} of {len(alike)} {'is' if known == 1 else 'are'} recognisable here."
