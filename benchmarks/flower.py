"""Flower's real deployment on this machine: SuperLink, SuperNodes and an app, from an environment of its own."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleets import START_S, Run, free_port
from benchmarks.processes import Child, Children
from benchmarks.runner import REPOSITORY, BenchmarkError, say

REQUIREMENT = "flwr>=1.41,<1.50"
"""Its commands change from version to version: 1.41 began to speak HTTP where it spoke gRPC."""

APP = REPOSITORY / "benchmarks" / "flower_app"

_INSTALL_S = 900.0
_CHECK_S = 300.0
_PIP_LINES = 3

_CONNECTION = """\
[superlink]
default = "bench"

[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """The end of a round, as the ServerApp wrote it down; round 0 is the beginning of the first.

    Attributes:
        at: Unix seconds.
        longest_train_s: Of the devices' training loops in this round.
    """

    at: float
    longest_train_s: float


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with Flower, which finds torch where fedge's is.

    Attributes:
        folder: Of it.
        version: Of Flower.
    """

    folder: Path
    version: str

    def command(self, name: str) -> str:
        """The path of one of its programs."""
        return str(self.folder / "bin" / name)


def prepare() -> Environment:
    """Make the environment, once for all calls, below the user's cache folder (``XDG_CACHE_HOME``).

    Flower and what it needs are installed into it; torch, torchvision and Pillow are found in fedge's environment,
    behind its own, so that both sides compute with the very same torch and nothing of fedge's is changed.

    Raises:
        BenchmarkError: If Flower cannot be installed, or finds another torch.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fedge" / f"flwr-python{sys.version_info.major}.{sys.version_info.minor}"
    done = folder / "installed"
    numpy = f"numpy=={importlib.metadata.version('numpy')}"  # torch's arrays cross into Flower's: one numpy
    wanted = f"{REQUIREMENT} {numpy}"
    if not done.exists() or done.read_text() != wanted:
        say(f"installing {REQUIREMENT} into {folder}, once")
        venv.create(folder, clear=True, with_pip=True)
        _pip(folder, REQUIREMENT, numpy)
        (_site_packages(folder) / "torch-of-fedge.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.write_text(wanted)
    version, torch = _python(folder, "import flwr, torch; print(flwr.__version__, torch.__file__)").split()
    if not Path(torch).is_relative_to(sysconfig.get_path("purelib")):
        raise BenchmarkError(f"{folder} has a torch of its own, {torch}: remove this folder, it is made anew")
    return Environment(folder, version)


def _pip(folder: Path, *requirements: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_INSTALL_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        told = (
            error.stderr.strip().splitlines()[-_PIP_LINES:] if isinstance(error.stderr, str) else [str(error)]
        )
        raise BenchmarkError(
            f"{REQUIREMENT} cannot be installed, and without it there is nothing to compare with: connect this "
            f"machine to a package index and start again. pip said:\n" + "\n".join(told)
        ) from error


def _python(folder: Path, code: str) -> str:
    done = subprocess.run(
        [str(folder / "bin" / "python"), "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=_CHECK_S,
    )
    if done.returncode:
        raise BenchmarkError(f"{folder} is broken, remove it, it is made anew:\n{done.stderr.strip()}")
    return done.stdout


def _site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))


class Deployment:
    """One SuperLink and its SuperNodes; each as on a machine of its own, with its own Flower folder.

    Args:
        children: Run the processes.
        folder: Of this deployment alone; created.
        environment: Flower's.
    """

    def __init__(self, children: Children, folder: Path, environment: Environment) -> None:
        folder.mkdir(parents=True)
        self.folder, self._children, self._environment = folder, children, environment
        self.port = free_port()
        self.marks = folder / "marks"

    def serve(self) -> Child:
        """Start the SuperLink, with its default store in memory."""
        server = self._start(
            "superlink",
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)),
            "--disable-runtime-dependency-installation",  # it would resolve the app's packages anew in every run
        )
        self._until(lambda: b"startup complete" in server.log.read_bytes(), "the SuperLink is up")
        return server

    def join(self, number: int, port: int, images: Path) -> Child:
        """Start a SuperNode that reaches the SuperLink through ``port``, and wait until it is known there."""
        node = self._start(
            f"supernode-{number}",
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"),
            *("--host", "127.0.0.1", "--port", str(free_port()), "--node-config", f'images="{images}"'),
        )
        self._until(lambda: b"SuperNode ID" in node.log.read_bytes(), f"{node.name} is connected")
        return node

    def run(self, run: Run, side: int, timeout_s: float) -> list[Mark]:
        """Run the app to its end.

        Args:
            run: What is to be run.
            side: Of the images, pixels.
            timeout_s: Seconds.

        Returns:
            The beginning of the first round, and the end of each.

        Raises:
            BenchmarkError: If it fails, or takes longer.
        """
        train = run.train
        config: dict[str, str | float] = {
            "model": run.model,
            "rounds": run.rounds,
            "devices": run.agents,
            "side": side,
            "batch-size": train["batch_size"],
            "epochs": train["epochs"],
            "learning-rate": train["learning_rate"],
            "momentum": train["momentum"],
            "marks": str(self.marks.resolve()),
        }
        home = self._home("run")
        (home / "config.toml").write_text(_CONNECTION.format(port=self.port))
        starter = self._start(
            "run", "flwr", "run", str(APP), "bench", "--run-config", " ".join(_toml(config)), home=home
        )
        self._children.wait(starter, START_S)
        self._children.until(
            lambda: len(self._read()) > run.rounds, timeout_s, f"{run.rounds} rounds of Flower"
        )
        return self._read()

    def _read(self) -> list[Mark]:
        if not self.marks.exists():
            return []
        lines = self.marks.read_text().splitlines()
        return [Mark(entry["at"], entry["longest_train_s"]) for entry in map(json.loads, lines)]

    def _start(self, name: str, program: str, *arguments: str, home: Path | None = None) -> Child:
        return self._children.start(
            f"{self.folder.name}-{name}",
            self._environment.command(program),
            *arguments,
            environment={
                "PATH": f"{self._environment.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",  # it starts more of its own
                "FLWR_HOME": str(home or self._home(name)),
                "FLWR_TELEMETRY_ENABLED": "0",
            },
        )

    def _home(self, name: str) -> Path:
        home = (self.folder / f"{name}-home").resolve()
        home.mkdir(exist_ok=True)
        return home

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        self._children.until(condition, START_S, what)


def _toml(config: Mapping[str, str | float]) -> Sequence[str]:
    return [f"{key}={json.dumps(value)}" for key, value in config.items()]
