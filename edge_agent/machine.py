"""What this machine computes with: its accelerator, its CPU threads, its memory. torch is imported only to ask it."""

import ctypes
import os
import sys
from pathlib import Path

from federation.errors import ConfigError

_ACCELERATORS = ("nvidiactl", "nvmap", "nvhost-gpu", "nvgpu", "kfd", "dxg")
"""In /dev on Linux: NVIDIA's drivers for cards and for Jetsons, AMD's, and the one of Windows' Linux subsystem."""


def pick_device(wanted: str) -> str:
    """The device to train on.

    Imports torch only where there may be something else than the CPU.

    Args:
        wanted: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto`` for the fastest that is there.

    Raises:
        ConfigError: If it is not there.
    """
    if wanted == "cpu" or (wanted == "auto" and _is_cpu_only()):
        return "cpu"
    import torch

    kind, _, index = wanted.partition(":")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    there = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}
    if kind not in there or (index and not index.isdecimal()) or int(index or 0) >= there[kind]:
        found = ", ".join(name for name, count in there.items() if count)
        raise ConfigError(f"device {wanted!r} is not there: this machine has {found}; auto picks by itself")
    return wanted


def cpu_threads() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def give_back_memory() -> None:
    """Return to the system what was freed: glibc keeps it otherwise, 100 MB after a round of resnet18."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps less
        if trim is not None:
            trim(0)


def _is_cpu_only() -> bool:
    """Whether there is surely no accelerator: without its driver's node in /dev there is no talking to one."""
    return sys.platform == "linux" and not any(Path("/dev", name).exists() for name in _ACCELERATORS)
