"""Local training: from the round's base model and the device's own images to a delta.

torch is imported by the first round that a device trains in, and stays: an agent that waits for one takes 60 MB, not
600. Only where there may be an accelerator to ask for does making a :class:`TorchTrainer` import it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import structlog

from edge_agent.fixed_features import FixedFeatures, Samples, compute, split
from edge_agent.machine import cpu_threads, give_back_memory, pick_device
from edge_agent.optimizers import make_optimizer
from federation.errors import FedgeError
from federation.wire.messages import RoundPlan, TaskSpec, TrainMetrics, TrainSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from federation.task.images import ImageData
    from privacy.budget import PrivateRound

DEFAULT_MEMORY_LIMIT_MB = 512
"""Decoded images beyond it are decoded anew for each batch."""

_SEED_BYTES = 8

log = structlog.get_logger()


class Cancelled(Exception):  # noqa: N818 - a person or a newer plan asked for it: it is no error
    """Training was stopped between two batches because it is no longer wanted."""


class TrainingError(FedgeError):
    """This device cannot train this round: it declines, and says why."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What one round's local training gives.

    Attributes:
        delta: New minus base by tensor name, float32, C-contiguous; running statistics included.
        samples: Local training samples: the weight of the update.
        metrics: Of the training.
    """

    delta: dict[str, np.ndarray]
    samples: int
    metrics: TrainMetrics


def round_seed(plan: RoundPlan, agent: str) -> int:
    """The seed of all that is random on ``agent`` in a round: 64 bits, from the plan's seed, round and the name."""
    text = f"{plan.train.seed}/{plan.round}/{agent}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:_SEED_BYTES], "big")


class TorchTrainer:
    """Trains with PyTorch. Keeps images and model from round to round; not thread-safe.

    Equal plans, base models and names give bit-identical deltas on one machine with one number of threads.

    Args:
        data_spec: The device's images (``federation.task.data``).
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto`` for the fastest that is there.
        threads: CPU threads; 0 leaves it to PyTorch.
        memory_limit_mb: MiB of decoded images that are kept in memory, and of features that a fixed part of a model made of them.
        allow_single_class: Accept images of one class only.

    Raises:
        ConfigError: If the device is not there.
        ModuleNotFoundError: If torch is not installed.
    """

    def __init__(
        self,
        data_spec: str,
        *,
        device: str = "auto",
        threads: int = 0,
        memory_limit_mb: int = DEFAULT_MEMORY_LIMIT_MB,
        allow_single_class: bool = False,
    ) -> None:
        if importlib.util.find_spec("torch") is None:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        self._spec = data_spec
        self._memory_limit_mb = memory_limit_mb
        self._allow_single_class = allow_single_class
        self._threads = threads
        self._device = pick_device(device)
        self._ready = False
        self._opened: tuple[TaskSpec, ImageData] | None = None
        self._built: tuple[TaskSpec, nn.Module, dict[str, torch.Tensor]] | None = None
        self._features: FixedFeatures | None = None
        self._checked: TaskSpec | None = None

    @property
    def device_name(self) -> str:
        """``cpu``, ``cuda`` or ``mps``."""
        return self._device.partition(":")[0]

    @property
    def threads(self) -> int:
        """CPU threads that training may use."""
        return self._threads or cpu_threads()

    def samples(self, task: TaskSpec) -> int:
        """How many local images there are to learn ``task`` from. Opens and checks them the first time.

        Whether a model that is made for private training can be trained here is checked too, before anything is paid for it.

        Raises:
            ConfigError: See :func:`federation.task.data.open_data` and :func:`federation.task.models.build`.
            TrainingError: If there can be no private training: Opacus is missing, or does not know a layer.
        """
        if task.dp_ready and self._checked != task:
            from edge_agent.private_training import check_model

            self._set_up()
            check_model(self._model(task), task, self._device)
            self._checked = task
        return len(self._data(task))

    def initial(self, task: TaskSpec, seed: int) -> dict[str, np.ndarray]:
        """Build the model that a run with this task and seed begins with.

        Raises:
            ConfigError: See :func:`federation.task.models.build`.
            TrainingError: If torch cannot be imported.
        """
        from federation.task.models import build, state_arrays

        self._set_up()
        return state_arrays(build(task, seed=seed))

    def train(
        self,
        base: Mapping[str, np.ndarray],
        plan: RoundPlan,
        agent: str,
        cancelled: Callable[[], bool],
        private: PrivateRound | None = None,
    ) -> Trained:
        """Train for one round.

        Args:
            base: The round's global model, float32 by tensor name; not changed.
            plan: What and how.
            agent: This device's name; decides on the order of its images.
            cancelled: Asked before each batch.
            private: What was paid for under the plan's terms for samples; carried out to the letter.

        Raises:
            Cancelled: Soon after ``cancelled()`` turned true.
            TrainingError: If torch or Opacus cannot be imported, the loss is not finite, memory does not suffice, or the plan
                promises privacy for samples that nothing was paid for.
            ConfigError: If the data, the model or ``base`` does not fit the task.
        """
        if plan.privacy.sample is not None and private is None:
            raise TrainingError(
                f"round {plan.round} promises privacy for samples, but no noise was paid for: nothing is trained without it"
            )
        self._set_up()
        import torch

        from edge_agent import private_training
        from federation.task.models import load_arrays

        began = time.monotonic()
        try:
            data, model = self._data(plan.task), self._model(plan.task)
            load_arrays(model, base)
            seed = round_seed(plan, agent)
            torch.manual_seed(seed)
            learner, samples = self._learner(model, data, cancelled)
            if private is None:
                fitted = self._fit(learner, samples, plan.train, np.random.default_rng(seed), cancelled)
                delta = _difference(model, base)
            else:
                fitted = private_training.fit(learner, samples, plan.train, private, self._device, cancelled)
                delta = _difference(model, base)
                private_training.refuse_statistics(model, delta)
            train_s = time.monotonic() - began
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory on {self.device_name} with batches of {plan.train.batch_size}: "
                "let the federation use a smaller batch_size, or run the agent with a lower --max-memory, "
                "so that it keeps fewer images in memory"
            ) from error
        finally:
            if self._built:
                self._built[1].zero_grad(set_to_none=True)
            give_back_memory()
        log.info(
            "model_trained",
            round=plan.round,
            samples=len(data),
            steps=fitted.steps,
            **fitted.told,
            train_s=round(train_s, 2),
        )
        metrics = TrainMetrics(
            loss=fitted.loss, accuracy=fitted.accuracy, steps=fitted.steps, train_s=train_s
        )
        return Trained(delta, len(data), metrics)

    def _set_up(self) -> None:
        """Import torch and set it up, before it is used for the first time."""
        if self._ready:
            return
        try:
            import torch
        except (ImportError, OSError) as error:  # OSError: a shared library that torch wants is missing
            raise TrainingError(
                f"torch cannot be imported: {error}. edge-agent doctor says what to do"
            ) from error
        if self._threads:
            torch.set_num_threads(self._threads)
        # cuDNN otherwise picks by timing among algorithms that sum in different orders.
        torch.backends.cudnn.deterministic = True
        self._ready = True

    def _fit(
        self,
        model: nn.Module,
        data: Samples,
        spec: TrainSpec,
        random: np.random.Generator,
        cancelled: Callable[[], bool],
    ) -> Fitted:
        """The training loop."""
        import torch

        optimizer = make_optimizer(model, spec)
        batch_norm = _has_batch_norm(model)
        if batch_norm and min(spec.batch_size, len(data)) == 1:
            raise TrainingError(
                f"the model's BatchNorm cannot learn from batches of 1 ({len(data)} samples here, batch_size "
                f"{spec.batch_size}): let the federation use a larger batch_size, or add images"
            )
        loss = accuracy = 0.0
        steps = 0
        for _ in range(spec.epochs):
            seen = 0
            # Sums stay on the device: reading them after every batch would make an accelerator wait.
            loss_sum = torch.zeros((), device=self._device)
            right = torch.zeros((), dtype=torch.int64, device=self._device)
            for rows in _batches(len(data), spec.batch_size, random, drop_single=batch_norm):
                if cancelled():
                    raise Cancelled
                images, labels = data.batch(rows, self._device)
                logits = model(images)
                batch_loss = torch.nn.functional.cross_entropy(logits, labels)
                model.zero_grad(set_to_none=True)
                torch.autograd.backward(batch_loss)
                optimizer.step()
                loss_sum += batch_loss.detach() * len(rows)
                right += (logits.detach().argmax(dim=1) == labels).sum()
                seen += len(rows)
                steps += 1
                if steps == spec.max_steps:
                    break
            loss, accuracy = float(loss_sum) / seen, int(right) / seen
            if not math.isfinite(loss):
                raise _diverged("the loss", spec)
            if steps == spec.max_steps:
                break
        require_finite(model, spec)
        return Fitted(steps, {"loss": round(loss, 4)}, loss, accuracy)

    def _learner(
        self, model: nn.Module, data: ImageData, cancelled: Callable[[], bool]
    ) -> tuple[nn.Module, Samples]:
        """The part of the model that learns, and what it learns from: images, or what a fixed part made of them."""
        parts = split(model)
        if parts is None:
            return model, data

        def go_on() -> None:
            if cancelled():
                raise Cancelled

        if self._features is None:
            self._features = compute(parts[0], data, self._device, self._memory_limit_mb << 20, go_on)
        return (model, data) if self._features is None else (parts[1], self._features)

    def _data(self, task: TaskSpec) -> ImageData:
        from federation.task.data import open_data

        if self._opened is None or self._opened[0] != task:
            self._opened = self._features = None  # frees the old images before the new ones come
            data = open_data(
                self._spec,
                task,
                train=True,
                memory_limit_mb=self._memory_limit_mb,
                allow_single_class=self._allow_single_class,
            )
            self._opened = (task, data)
        return self._opened[1]

    def _model(self, task: TaskSpec) -> nn.Module:
        """The task's model; its integer buffers, which no base model sets, are as when it was built."""
        import torch

        from federation.task.models import build, float_tensors
        from federation.task.names import is_plugin

        if self._built is None or self._built[0] != task:
            self._built = None
            model = build(task).to(self._device)
            if self.device_name == "cpu" and not is_plugin(task.model):
                # A third less time for the cnn and mobilenet_v3_small. A plug-in's view() might not stand it.
                model = model.to(memory_format=torch.channels_last)
            floats = float_tensors(model)
            counters = {
                name: value.clone() for name, value in model.state_dict().items() if name not in floats
            }
            self._built = (task, model, counters)
        _, model, counters = self._built
        state = model.state_dict()
        with torch.no_grad():
            for name, value in counters.items():
                state[name].copy_(value)
        return model.train()


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a training loop gives besides the trained model.

    Attributes:
        steps: Taken in all.
        told: For the log on the device.
        loss: Mean over the last epoch; None where it is private.
        accuracy: Likewise.
    """

    steps: int
    told: dict[str, float | str]
    loss: float | None = None
    accuracy: float | None = None


def require_finite(model: nn.Module, spec: TrainSpec) -> None:
    """Refuse to go on with a model that has diverged.

    Raises:
        TrainingError: It names the learning rate.
    """
    import torch

    from federation.task.models import float_tensors

    if not all(bool(torch.isfinite(tensor).all()) for tensor in float_tensors(model).values()):
        raise _diverged("a weight", spec)


def _batches(
    samples: int, batch_size: int, random: np.random.Generator, *, drop_single: bool
) -> Iterator[np.ndarray]:
    """One epoch's sample indices in random order, batch by batch.

    BatchNorm cannot normalise a single sample, so with ``drop_single`` a last batch of one is left out.
    """
    order = random.permutation(samples)
    for start in range(0, samples, batch_size):
        rows = order[start : start + batch_size]
        if drop_single and len(rows) == 1:
            return
        yield rows


def _difference(model: nn.Module, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """New minus base, in the model's order; one tensor at a time, so that no second model is in memory."""
    from federation.task.models import float_tensors

    return {
        name: np.subtract(tensor.cpu().numpy(), base[name], order="C")
        for name, tensor in float_tensors(model).items()
    }


def _has_batch_norm(model: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # The CPU allocator says it in a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _diverged(what: str, spec: TrainSpec) -> TrainingError:
    return TrainingError(
        f"{what} became NaN or infinite in training with learning_rate {spec.learning_rate:g} ({spec.optimizer}): "
        "let the federation use a smaller one"
    )
