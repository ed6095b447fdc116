"""Releases the model of a finished run by itself: ``aggregator release --auto`` in a process of its own.

That process imports torch, exports, measures and puts a request into the store; the server, which goes on meanwhile, reads it.
"""

import subprocess
import sys
import threading

import msgspec
import structlog

from aggregator.config import AggregatorConfig
from aggregator.options import served_config
from aggregator.releases.requests import Answer
from federation.errors import ConfigError, ExitCode

log = structlog.get_logger()

_STOP_S = 10.0
"""An export that does not end when it is told to is killed: it has nothing to lose."""


class AutomaticRelease:
    """Makes releases, one at a time. Called from a worker thread, stopped from any.

    Args:
        config: Settings, which ``serve`` has written to the state folder.
    """

    def __init__(self, config: AggregatorConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False

    @property
    def busy(self) -> bool:
        """Whether a process is at work."""
        with self._lock:
            return self._child is not None

    def __call__(self, number: int) -> str:
        """Release the model after round ``number``, unless it is worse than the stable release.

        Returns:
            What was done, or why it was not released, for people.

        Raises:
            ConfigError: If it could not be made, for a reason that may be mended, or was stopped.
        """
        state = self._config.state_dir
        command = [sys.executable, "-m", "aggregator.cli", "release", "--auto", "--round", str(number)]
        command += ["--json", "--config", str(served_config(state)), "--state", state]
        with self._lock:
            if self._stopped:
                raise ConfigError("the server is stopping")
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self._child = child
        said, complaint = child.communicate()
        with self._lock:
            self._child = None
            stopped = self._stopped
        if child.returncode == ExitCode.OK:
            answer = msgspec.json.decode(said, type=Answer)
            return f"release {answer.number}, {answer.format}: {answer.server or 'the server has not answered yet'}"
        reason = complaint.strip().rpartition("error: ")[2] or f"exit status {child.returncode}"
        if child.returncode == ExitCode.VERIFICATION:
            log.warning(
                "automatic_release_refused",
                round=number,
                reason=reason,
                lost="devices keep the release that they run",
                remedy="`aggregator release` makes it all the same",
            )
            return f"refused: {reason}"
        raise ConfigError("the server was stopped meanwhile" if stopped else reason)

    def stop(self) -> None:
        """End what is being made, and make nothing more."""
        with self._lock:
            self._stopped = True
            child = self._child
        if child is None:
            return
        child.terminate()
        killing = threading.Timer(_STOP_S, child.kill)
        killing.daemon = True  # whoever waits for the child keeps the server alive until it is gone
        killing.start()
