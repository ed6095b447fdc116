"""The life of an agent in a process that was forked from one with the libraries loaded: it imports nothing else of ours."""

import os
import sys
from collections.abc import Mapping


def live(arguments: list[str], environment: Mapping[str, str], log: str) -> None:
    """Run ``edge-agent`` to its end, or until it is killed.

    Args:
        arguments: Of the command.
        environment: Added to that of the process.
        log: Where output goes; it exists.
    """
    from edge_agent.cli import main

    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(handle, stream.fileno())
    sys.argv = ["edge-agent", *arguments]
    main()
