"""What every fedge command does around its work: one-line errors, exit codes, quiet pipes.

Imports nothing heavy: a command that does not log should not pay for structlog, and ``edge-agent infer`` goes
through here on devices with little memory.
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

EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "opacus": "train",
    "dp_accounting": "train",
    "scipy": "train",
    "sklearn": "train",
    "bcrypt": "aggregator",
    "onnx": "aggregator",
    "onnxscript": "aggregator",
    "rich": "aggregator",
}
"""Modules that a bare install lacks on purpose, and the extra that brings each."""

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

    What the person at the keyboard can mend (any :class:`~federation.errors.FedgeError`, a package of an extra that
    is not installed, or a file that is missing, forbidden or on a full disk) becomes one line on stderr, ``error:
    ...``, and the error's exit code. Ctrl-C gives 130. A closed output pipe ends quietly. Everything else is a defect
    of ours and keeps its traceback.

    Args:
        app: The application, preferably from :func:`new_app`.
    """
    with readable_errors(), _quiet_pipe():
        app()
    sys.exit(ExitCode.OK)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what a person can mend into one line on stderr and an exit code, see :func:`run`."""
    try:
        yield
    except FedgeError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        remedy = f"pip install 'fedge[{EXTRAS[error.name]}]'"
        _fail(f"this command needs {error.name}, which is not installed: {remedy}", ExitCode.USAGE)
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
