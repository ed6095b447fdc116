"""Processes of ours that must not outlive us."""

import os
import sys
from collections.abc import Sequence

_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died while its child started")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Run before the child on Linux, in its process: the request survives the exec. A preexec_fn would do the same
inside the forked copy of a process with threads, where any lock may be held for ever."""


def dying_with_us(command: Sequence[str]) -> list[str]:
    """A command whose process gets SIGTERM when the *thread* that starts it ends, however that happens (Linux only).

    Args:
        command: An executable's full path and its arguments.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
