"""A checkpoint run by PyTorch as people write it by hand: what exported models are measured against."""

from pathlib import Path

import numpy as np

from federation.task.checkpoint import read_checkpoint
from federation.task.models import build, load_arrays
from federation.task.preprocessing import PIXEL_SCALE


class Eager:
    """One checkpoint in PyTorch's eager mode, on the CPU, from a raw frame to a label.

    Attributes:
        task: What the checkpoint was trained for.
    """

    def __init__(self, checkpoint: Path, *, threads: int = 1) -> None:
        """Build the model and load its weights.

        Args:
            checkpoint: As ``federation.task.checkpoint`` writes it.
            threads: For torch, in this whole process.

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
        self._mean = torch.tensor(info.task.mean)[:, None, None]
        self._std = torch.tensor(info.task.std)[:, None, None]

    def label(self, frame: np.ndarray) -> str:
        """The most likely label of uint8 ``[height, width, channels]`` or ``[height, width]``, in any size."""
        import torch

        size = (self.task.height, self.task.width)
        with torch.inference_mode():
            image = torch.from_numpy(frame)
            image = image[None, None] if image.ndim == 2 else image.permute(2, 0, 1)[None]  # noqa: PLR2004 - a grey frame has two axes
            if image.shape[2:] != size:
                # On bytes, as torchvision's transforms do: faster than on floats.
                image = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
            inputs = (image * PIXEL_SCALE - self._mean) / self._std
            probabilities = self._model(inputs).softmax(dim=1)
            _, index = probabilities[0].max(dim=0)
        return self.task.labels[int(index)]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """The model alone: float32 ``[N, channels, height, width]``, normalised, to logits ``[N, labels]``."""
        import torch

        with torch.inference_mode():
            logits: np.ndarray = self._model(torch.from_numpy(inputs)).numpy()
        return logits
