"""The model that a run begins with.

torch takes 600 MB that a server without a hold-out set needs only this once: it then builds in a process of its own,
``python -m aggregator.initial_model SEED FILE``, which reads what is wanted from standard input.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from federation.cli import readable_errors
from federation.errors import ConfigError, ExitCode
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from privacy.errors import TermsError

if TYPE_CHECKING:
    from torch import nn

_ERROR = "error: "


def build_here(info: CheckpointInfo, seed: int) -> bytes:
    """Build a run's initial model in this process.

    Args:
        info: What it is: its task names the model.
        seed: Of its weights.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: See :func:`federation.task.models.build`; also if devices could not train it privately.
    """
    from federation.task.models import build, state_arrays

    model = build(info.task, seed=seed)
    arrays = state_arrays(model)
    if info.task.dp_ready:
        _try_privately(info, model)
    return checkpoint_bytes(info, arrays)


def build_apart(info: CheckpointInfo, seed: int) -> bytes:
    """The same, bit for bit, in a process whose memory ends with it.

    Raises:
        ConfigError: As :func:`build_here`, and if torch is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(seed), str(path)],
            input=msgspec.json.encode(info),
            stderr=subprocess.PIPE,
            check=False,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path)},  # a plug-in is found where we would find it
        )
        told = done.stderr.decode(errors="replace").strip()
        if done.returncode == ExitCode.USAGE:
            raise ConfigError(told.rpartition(_ERROR)[2])
        if done.returncode:
            raise RuntimeError(f"building the initial model ended with {done.returncode}:\n{told}")
        return path.read_bytes()


def _try_privately(info: CheckpointInfo, model: "nn.Module") -> None:
    """Do here what devices will do, so that a model that cannot be trained privately is told before they pay for a round."""
    import torch

    from privacy.dpsgd import try_out

    task = info.task
    try:
        try_out(model, torch.zeros(2, task.channels, task.height, task.width))
    except (TermsError, ModuleNotFoundError) as error:
        raise ConfigError(f"model {task.model!r} cannot be trained with privacy.sample: {error}") from error


if __name__ == "__main__":
    with readable_errors():
        wanted = msgspec.json.decode(sys.stdin.buffer.read(), type=CheckpointInfo)
        Path(sys.argv[2]).write_bytes(build_here(wanted, int(sys.argv[1])))
