"""The model that a run begins with.

torch takes 600 MB that a server without a hold-out set needs only this once: it then builds in a process of its own,
``python -m aggregator.initial_model SEED FILE``, which reads what is wanted from standard input.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from federation.cli import readable_errors
from federation.errors import ConfigError, ExitCode
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes

_ERROR = "error: "


def build_here(info: CheckpointInfo, seed: int) -> bytes:
    """Build a run's initial model in this process.

    Args:
        info: What it is: its task names the model.
        seed: Of its weights.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: See :func:`federation.task.models.build`.
    """
    from federation.task.models import build, state_arrays

    return checkpoint_bytes(info, state_arrays(build(info.task, seed=seed)))


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


if __name__ == "__main__":
    with readable_errors():
        wanted = msgspec.json.decode(sys.stdin.buffer.read(), type=CheckpointInfo)
        Path(sys.argv[2]).write_bytes(build_here(wanted, int(sys.argv[1])))
