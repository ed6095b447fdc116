"""Local training with differential privacy for each sample: what :mod:`privacy.dpsgd` does, on a device's images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import psutil

from edge_agent.fixed_features import Samples
from edge_agent.optimizers import make_optimizer
from edge_agent.training import Cancelled, Fitted, TrainingError, require_finite
from federation.wire.messages import TaskSpec, TrainSpec
from privacy import dpsgd
from privacy.budget import PrivateRound
from privacy.errors import TermsError

if TYPE_CHECKING:
    from torch import nn


def fit(
    model: nn.Module,
    data: Samples,
    spec: TrainSpec,
    private: PrivateRound,
    device: str,
    cancelled: Callable[[], bool],
) -> Fitted:
    """Train for one round. Neither loss nor accuracy is told: they would be without noise.

    Args:
        model: In training mode, on ``device``; changed in place.
        data: The local images, or features of them.
        spec: Optimizer and learning rate; steps and batches are those of ``private``.
        private: What was paid for.
        device: Where to train.
        cancelled: Asked before each physical batch.

    Raises:
        Cancelled: Soon after ``cancelled()`` turned true.
        TrainingError: If the data is smaller than a batch, a weight is not finite, Opacus is missing, or the model cannot be
            trained so.
    """
    if spec.batch_size > len(data):
        raise TrainingError(
            f"this device has fewer samples than a batch of {spec.batch_size}: private training draws each batch from many. Let the "
            "federation use a smaller batch_size, or add images"
        )

    def go_on() -> None:
        if cancelled():
            raise Cancelled

    with _translated():
        mode = dpsgd.train(
            model,
            make_optimizer(model, spec),
            private,
            samples=len(data),
            batch=lambda rows: data.batch(rows, device),
            before_batch=go_on,
            physical_batch=dpsgd.largest_physical_batch(model, psutil.virtual_memory().available),
        )
    require_finite(model, spec)
    return Fitted(private.steps, {"clipping": mode.value})


def check_model(model: nn.Module, task: TaskSpec, device: str) -> None:
    """See that a model can be trained with differential privacy on this device, by doing it with blank images.

    Args:
        model: In training mode, on ``device``; not changed.
        task: What it was built for.
        device: Where it is.

    Raises:
        TrainingError: If not: it says why, and what to do.
    """
    import torch

    with _translated():
        dpsgd.try_out(model, torch.zeros(2, task.channels, task.height, task.width, device=device))


def refuse_statistics(model: nn.Module, delta: Mapping[str, np.ndarray]) -> None:
    """See that nothing leaves a private round but weights, which have got their noise.

    Args:
        model: That was trained.
        delta: New minus base by tensor name.

    Raises:
        TrainingError: If anything else has changed.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, change in delta.items():
        if name not in weights and change.any():
            raise TrainingError(
                f"{name!r} has changed in private training without noise: the model keeps statistics of the images. Let the "
                "federation choose a model without them"
            )


@contextmanager
def _translated() -> Iterator[None]:
    """Refusals of private training, as this package says them."""
    try:
        yield
    except (TermsError, ModuleNotFoundError) as error:
        raise TrainingError(str(error)) from error
