"""Training for trials and audits: central, in this process, private steps through the very code that devices use."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from federation.errors import ConfigError
from federation.task.images import ImageData
from federation.wire.messages import TrainSpec
from privacy.accounting import epsilon_pld, noise_multiplier_for
from privacy.audit.canaries import Batch, widen
from privacy.budget import PrivateRound, steps_of
from privacy.errors import PrivacyError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows of a data set under labels of our choosing, and gradient canaries among them.

    Attributes:
        data: Where the pictures come from.
        rows: int64 ``[n]``.
        labels: int64 ``[n]``.
        canaries: int64 ``[n]``, see :func:`privacy.audit.canaries.widen`; None leaves the pictures as they are.
    """

    data: ImageData
    rows: np.ndarray
    labels: np.ndarray
    canaries: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, picks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of some samples, normalised."""
        import torch

        images, _ = self.data.batch(self.rows[picks])
        if self.canaries is not None:
            images = widen(images, self.canaries[picks])
        return images, torch.from_numpy(self.labels[picks])


class Protection(Struct, frozen=True, kw_only=True):
    """Sample-level privacy that is asked for.

    Attributes:
        epsilon: Target.
        delta: At which it is stated.
        clip_norm: L2 norm to which a sample's gradient is clipped.
    """

    epsilon: float
    delta: float
    clip_norm: float


def private_round(protection: Protection, spec: TrainSpec, samples: int) -> tuple[PrivateRound, float]:
    """How to train so that the whole training stays within a target.

    Args:
        protection: The target.
        spec: Epochs and batch size.
        samples: In the training data, or expected there where coins decide.

    Returns:
        The private round, and the epsilon that it costs: the target or a little less.

    Raises:
        ConfigError: If no noise is enough.
    """
    rate, steps = steps_of(samples, spec.batch_size, spec.epochs, spec.max_steps)
    try:
        noise = noise_multiplier_for(protection.epsilon, protection.delta, [], rate, steps)
    except PrivacyError as error:
        raise ConfigError(
            f"epsilon {protection.epsilon:g} cannot be kept: {error}. Allow a larger one, or train for fewer epochs"
        ) from error
    private = PrivateRound(noise, protection.clip_norm, rate, steps)
    return private, epsilon_pld([private.spend], protection.delta)


def fit_private(model: nn.Module, batch: Batch, samples: int, spec: TrainSpec, private: PrivateRound) -> None:
    """Train by DP-SGD, as devices do; in place.

    Raises:
        ConfigError: If the model cannot be trained so, or its weights became NaN.
    """
    from privacy import dpsgd

    try:
        with warnings.catch_warnings():
            # Of two layers that begin with constants, the canaries' and the model's first, torch warns that their hooks
            # fire by their outputs. They do, and that is what is wanted.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            dpsgd.train(model, optimizer_of(model, spec), private, samples=samples, batch=batch)
    except PrivacyError as error:
        raise ConfigError(str(error)) from error
    _check_finite(model, spec)


def fit(model: nn.Module, batch: Batch, samples: int, spec: TrainSpec, random: np.random.Generator) -> None:
    """Train without protection, in random order; in place.

    Raises:
        ConfigError: If the weights became NaN.
    """
    import torch

    optimizer = optimizer_of(model, spec)
    steps = 0
    for _ in range(spec.epochs):
        order = random.permutation(samples)
        for start in range(0, samples, spec.batch_size):
            images, labels = batch(order[start : start + spec.batch_size])
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(torch.nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
            steps += 1
            if steps == spec.max_steps:
                break
        if steps == spec.max_steps:
            break
    model.zero_grad(set_to_none=True)
    _check_finite(model, spec)


def optimizer_of(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """The optimizer of a plan, PyTorch's own."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if spec.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    return torch.optim.SGD(
        parameters, lr=spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
    )


def _check_finite(model: nn.Module, spec: TrainSpec) -> None:
    if not all(math.isfinite(float(parameter.detach().sum())) for parameter in model.parameters()):
        raise ConfigError(
            f"a weight became NaN or infinite in training with learning rate {spec.learning_rate:g}: use a smaller --lr"
        )
