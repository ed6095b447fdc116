"""Logging: a person at a terminal gets columns, anything else gets one JSON object per line, on stderr."""

import logging
import sys
from typing import Literal

from federation.errors import ConfigError

LogFormat = Literal["auto", "console", "json"]

PROGRESS_LOG_S = 10.0
"""Between two lines that say how far a transfer is. One that is over sooner says so once, at its end."""

LEVELS = ("debug", "info", "warning", "error")


def configure(*, level: str = "info", form: LogFormat = "auto") -> None:
    """Set up structlog for this process.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        form: ``auto`` chooses ``console`` when stderr is a terminal.

    Raises:
        ConfigError: For another level.
    """
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r} is not known: use {', '.join(LEVELS)}")
    import structlog  # `edge-agent infer` of files never logs, and this is 4 to 8 MB of its memory

    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        # rich, where it is installed, would print local variables too: keys and tensors have no place in a log
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
            *([] if console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


class Sparingly:
    """Says when something that happens often may be told again: not before ``interval_s`` seconds, nor at first.

    Args:
        interval_s: Seconds between two lines.
    """

    def __init__(self, interval_s: float = PROGRESS_LOG_S) -> None:
        self._interval_s = interval_s
        self._last: float | None = None

    def restart(self) -> None:
        """Something new begins."""
        self._last = None

    def due(self, now: float) -> bool:
        """Whether to tell it now (monotonic seconds); if so, the next time is an interval away."""
        if self._last is None:
            self._last = now
        if now < self._last + self._interval_s:
            return False
        self._last = now
        return True
