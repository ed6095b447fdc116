"""``edge-agent doctor``: find out what is wrong with a device before it takes part, or why it does not."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from edge_agent import broker_checks
from edge_agent.findings import Finding, Level, skipped
from federation.bundle import Bundle, read_bundle
from federation.errors import ConfigError
from federation.files import disk_error, sync_folder
from federation.task.inventory import Inventory, take_stock
from federation.wire.messages import TaskSpec

PRIVATE = 0o600

MIN_DISK_MB = 64
"""Base model and update of a network of some million parameters; below it not even a small one has room."""

LOW_DISK_MB = 512
"""Below it a model of 45 MB (its old and new version, a partial download, an update) and the logs come close."""

LOW_MEMORY_MB = 300
"""Importing torch's CPU build takes 221 MiB, before any model or image."""

UNREADABLE_SHOWN = 20
CLASSES_SHOWN = 20

_MIB = 1 << 20


def examine(path: Path, data: str | None, state: Path) -> Iterator[Finding]:
    """Make all checks, cheap ones first; those that need what an earlier one could not get are skipped.

    Args:
        path: The bundle.
        data: A data spec (``federation.task.data``), or None.
        state: The agent's state folder; need not exist.

    Yields:
        A finding as soon as it is known.
    """
    finding, bundle = check_bundle(path)
    yield finding
    yield check_state_folder(state)
    yield check_disk(state)
    yield check_memory()
    yield check_onnxruntime()
    yield check_torch(needed=data is not None)
    task = None
    if bundle is None:
        yield from skipped(broker_checks.CHECKS, "the check 'bundle' failed")
    else:
        task = yield from broker_checks.examine_broker(bundle)
    if data is None:
        yield from skipped(["data"], "no --data was given")
    else:
        yield check_data(data, task)


def check_bundle(path: Path) -> tuple[Finding, Bundle | None]:
    """Whether the bundle can be read, and by its owner only."""
    try:
        bundle = read_bundle(path)
    except ConfigError as error:
        remedy = (
            "copy it here again, readable for the agent's user, or make a new one with `aggregator enroll`"
        )
        return Finding(check="bundle", level=Level.FAIL, found=str(error), remedy=remedy), None
    mode = path.stat().st_mode & 0o777
    found = f"{bundle.agent!r} in federation {bundle.federation!r}, broker {bundle.broker}"
    if mode & ~PRIVATE:
        exposed = Finding(
            check="bundle",
            level=Level.WARN,
            found=f"{found}; its mode is {mode:04o}, so others on this device can become this agent",
            remedy=f"chmod 600 {path}",
        )
        return exposed, bundle
    return Finding(check="bundle", level=Level.OK, found=found), bundle


def check_state_folder(state: Path) -> Finding:
    """Whether a file can be written and made durable where the agent keeps its state."""
    folder = _nearest(state)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()
            os.fsync(probe.fileno())
        sync_folder(folder)
    except OSError as error:
        return Finding(
            check="state",
            level=Level.FAIL,
            found=f"{state} will not do: {disk_error(error, folder)}",
            remedy="give the agent's user the right to write there, or name another folder with --state",
        )
    will = "" if state.is_dir() else "; it will be made in " + str(folder)
    return Finding(check="state", level=Level.OK, found=f"{state} can be written and synced{will}")


def check_disk(state: Path) -> Finding:
    """Whether models and updates have room."""
    free_mb = shutil.disk_usage(_nearest(state)).free // _MIB
    level = Level.OK if free_mb >= LOW_DISK_MB else Level.WARN if free_mb >= MIN_DISK_MB else Level.FAIL
    return Finding(
        check="disk",
        level=level,
        found=f"{free_mb} MiB free for {state}",
        remedy="" if level is Level.OK else f"free some: {LOW_DISK_MB} MiB leave room for models and updates",
    )


def check_memory() -> Finding:
    """Whether training has a chance."""
    memory = psutil.virtual_memory()
    found = f"{memory.available // _MIB} of {memory.total // _MIB} MiB available"
    if memory.available < LOW_MEMORY_MB * _MIB:
        return Finding(
            check="memory",
            level=Level.WARN,
            found=found,
            remedy=f"training needs about {LOW_MEMORY_MB} MiB and more: stop other programs, or lower --max-memory",
        )
    return Finding(check="memory", level=Level.OK, found=found)


def check_onnxruntime() -> Finding:
    """Whether the device can run models."""
    try:
        version = importlib.import_module("onnxruntime").__version__
    except ImportError as error:
        return Finding(
            check="onnxruntime",
            level=Level.FAIL,
            found=f"cannot be imported: {error}",
            remedy="install fedge again; on ARM that needs a 64-bit system, there are no 32-bit wheels",
        )
    return Finding(check="onnxruntime", level=Level.OK, found=f"{version}, models can run here")


def check_torch(*, needed: bool) -> Finding:
    """Whether the device can train, on what, and with how many threads."""
    try:
        version = importlib.import_module("torch").__version__
        from edge_agent.training import TorchTrainer

        trainer = TorchTrainer("")
    except (ImportError, OSError) as error:  # OSError: a shared library that torch wants is missing
        return Finding(
            check="torch",
            level=Level.FAIL if needed else Level.WARN,
            found=f"cannot be imported: {error}",
            remedy="to train here, install fedge[train] (README, section Devices); running models needs no torch",
        )
    return Finding(
        check="torch",
        level=Level.OK,
        found=f"{version}, trains on {trainer.device_name} with {trainer.threads} CPU threads",
    )


def check_data(spec: str, task: TaskSpec | None) -> Finding:
    """Whether every image can be read, and there is something to tell apart.

    Args:
        spec: A data spec.
        task: The open round's, where it is known: the classes must be among its labels.
    """
    try:
        stock = take_stock(spec, task)
    except ConfigError as error:
        return Finding(check="data", level=Level.FAIL, found=str(error), remedy="see README, section Data")
    except ImportError as error:
        return Finding(
            check="data",
            level=Level.FAIL,
            found=f"{spec!r} needs what is not installed: {error}",
            remedy="install fedge[train]",
        )
    return judge_data(stock)


def judge_data(stock: Inventory) -> Finding:
    """What an inventory means for training."""
    classes = list(stock.counts.items())
    listed = ", ".join(f"{name} {count}" for name, count in classes[:CLASSES_SHOWN])
    more = f" and {len(classes) - CLASSES_SHOWN} more classes" if len(classes) > CLASSES_SHOWN else ""
    found = f"{stock.where}: {stock.samples} images ({listed}{more})"
    if stock.unreadable:
        shown = "\n".join(f"{'':<8}{problem}" for problem in stock.unreadable[:UNREADABLE_SHOWN])
        rest = len(stock.unreadable) - UNREADABLE_SHOWN
        tail = f"\n{'':<8}and {rest} more" if rest > 0 else ""
        return Finding(
            check="data",
            level=Level.FAIL,
            found=f"{found}; {len(stock.unreadable)} cannot be read:\n{shown}{tail}",
            remedy="remove these files, or copy them here again",
        )
    if len(stock.counts) < 2:  # noqa: PLR2004 - one class leaves nothing to tell apart
        return Finding(
            check="data",
            level=Level.FAIL,
            found=f"{found}; one class only: a model trained on it learns to answer nothing else",
            remedy="add images of other classes, or start the agent with --allow-single-class",
        )
    return Finding(check="data", level=Level.OK, found=found)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.is_dir())
