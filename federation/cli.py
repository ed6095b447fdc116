"""What every fedge command does around its work: one-line errors, exit codes, quiet pipes, logging.

Imports nothing heavy: ``edge-agent infer`` goes through here on devices with little memory.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from federation.errors import ExitCode, FedgeError
from federation.files import disk_error

INTERRUPTED = 130
"""128 + SIGINT: what a shell expects of a command that Ctrl-C ended."""

BROKEN_PIPE = 1
"""The reader of our output went away; typer uses the same value."""


def new_app(help_text: str) -> typer.Typer:
    """Build a typer application in the house style: plain help, no shell completion options, no pretty traceback.

    Args:
        help_text: Shown at the top of ``--help``.
    """
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def run(app: typer.Typer) -> NoReturn:
    """Run a command line to its end and leave the process with its exit code.

    What the person at the keyboard can mend (any :class:`~federation.errors.FedgeError`, or a file that is missing,
    forbidden or on a full disk) becomes one line on stderr, ``error: ...``, and the error's exit code. Ctrl-C gives
    130. A closed output pipe ends quietly. Everything else is a defect of ours and keeps its traceback.

    Args:
        app: The application, preferably from :func:`new_app`.
    """
    with _readable_errors(), _quiet_pipe():
        app()
    sys.exit(ExitCode.OK)


def set_up_logging(*, verbose: bool = False) -> None:
    """Send structlog's events to stderr: for a person when it is a terminal, as JSON lines otherwise.

    Call it once, in the command that logs; commands that only print need not pay for it.

    Args:
        verbose: Show debug events too.
    """
    import logging  # noqa: PLC0415 - structlog costs memory that an inference-only process should not pay

    import structlog  # noqa: PLC0415

    # Plain tracebacks only: the richer formatters print local variables, among them keys and tensors.
    presentation: list[structlog.typing.Processor]
    if sys.stderr.isatty():
        presentation = [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ]
    else:
        presentation = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            *presentation,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except FedgeError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", ExitCode.USAGE)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(str(disk_error(error, Path(error.filename))), ExitCode.USAGE)


@contextmanager
def _quiet_pipe() -> Iterator[None]:
    """Flush while errors can still be handled: the interpreter's own flush at exit would complain on stderr."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whatever is still buffered goes nowhere, so that the interpreter's last flush cannot fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)
