"""A checkpoint run by PyTorch as people write it by hand: what exported models are measured against."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from federation.task.checkpoint import read_checkpoint
from federation.task.models import build, load_arrays
from federation.task.preprocessing import PIXEL_SCALE
from federation.wire.messages import TaskSpec

if TYPE_CHECKING:
    import torch

Prepare = Callable[[np.ndarray], "torch.Tensor"]
"""From a frame to the model's input: float32 ``[1, channels, height, width]``."""


class Eager:
    """One checkpoint in PyTorch's eager mode, on the CPU, from a raw frame to a label.

    Attributes:
        task: What the checkpoint was trained for.
        prepare: From a frame to the input of :meth:`run`, as a tensor.
    """

    def __init__(self, checkpoint: Path, *, threads: int = 1, tuned: bool = False) -> None:
        """Build the model and load its weights.

        Args:
            checkpoint: As ``federation.task.checkpoint`` writes it.
            threads: For torch, in this whole process.
            tuned: Prepare frames by hand, in a third of the time that torchvision's transforms take: bytes are resized where
                they lie, without a copy in another order.

        Raises:
            ConfigError: If the checkpoint cannot be read.
            VerificationError: If its weights are not finite.
        """
        import torch

        torch.set_num_threads(threads)
        info, arrays = read_checkpoint(checkpoint)
        self.task = info.task
        self._model = build(info.task)
        load_arrays(self._model, arrays)
        self._model.eval()
        self.prepare = _by_hand(self.task) if tuned else _by_transforms(self.task)

    def label(self, frame: np.ndarray) -> str:
        """The most likely label of uint8 ``[height, width, channels]`` or ``[height, width]``, in any size."""
        import torch

        with torch.inference_mode():
            probabilities = self._model(self.prepare(frame)).softmax(dim=1)
            _, index = probabilities[0].max(dim=0)
        return self.task.labels[int(index)]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """The model alone: float32 ``[N, channels, height, width]``, normalised, to logits ``[N, labels]``."""
        import torch

        with torch.inference_mode():
            logits: np.ndarray = self._model(torch.from_numpy(inputs)).numpy()
        return logits


def _by_transforms(task: TaskSpec) -> Prepare:
    """As torchvision's documentation has it."""
    import torch
    from torchvision.transforms import v2

    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((task.height, task.width), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(task.mean, task.std),
        ]
    )
    return lambda frame: transforms(frame)[None]


def _by_hand(task: TaskSpec) -> Prepare:
    import torch

    size = (task.height, task.width)
    mean = torch.tensor(task.mean)[:, None, None]
    std = torch.tensor(task.std)[:, None, None]

    def prepare(frame: np.ndarray) -> torch.Tensor:
        image = torch.from_numpy(np.atleast_3d(frame)).permute(2, 0, 1)[None]
        if image.shape[2:] != size:
            image = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
        return (image * PIXEL_SCALE - mean) / std

    return prepare
