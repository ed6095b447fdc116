"""A device with another processor, emulated: Debian's Python for aarch64, run by qemu's user mode on this machine.

Nothing of the machine is changed and no rights are needed: packages are fetched with lists and folders of their own,
and unpacked, never installed.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runner import REPOSITORY, BenchmarkError, say

ARCHITECTURE = "arm64"
"""Debian's name for it."""

PACKAGES = ("python3", "libstdc++6")
"""An interpreter, and what the wheels of onnxruntime and numpy take from the system."""

EMULATOR = "qemu-user-static"
EMULATOR_COMMANDS = ("qemu-aarch64-static", "qemu-aarch64")

WHEEL_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
"""What Raspberry Pi OS and JetPack with glibc 2.28 or later take. pip wants them named one by one."""

_FETCH_S = 600.0
_INSTALL_S = 600.0
_TAIL_LINES = 6


@dataclass(frozen=True, slots=True)
class Processor:
    """What is emulated.

    Attributes:
        name: qemu's.
        found_in: A device that has it.
        part: Its number in ``/proc/cpuinfo``.
        features: The kernel's names of its instruction sets.
    """

    name: str
    found_in: str
    part: str
    features: str


PROCESSORS = (
    Processor("cortex-a72", "Raspberry Pi 4", "0xd08", "fp asimd evtstrm crc32 cpuid"),
    Processor(
        "cortex-a76",
        "Raspberry Pi 5, with dot products of bytes",
        "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
)

_CPUINFO = """\
processor	: 0
BogoMIPS	: 108.00
Features	: {features}
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: {part}
CPU revision	: 3

"""
"""qemu before 8.1 shows this machine's own, and the library by which onnxruntime learns about its processor then
follows a null pointer: a file in the emulated root comes first."""


@dataclass(frozen=True, slots=True)
class Device:
    """An emulated device with fedge's base install.

    Attributes:
        emulator: qemu's program.
        root: Of its file system.
        site: Folder with the packages.
        processor: What it has.
    """

    emulator: Path
    root: Path
    site: Path
    processor: Processor

    def python(self, *arguments: str, timeout_s: float) -> str:
        """Run its Python; returns what it printed.

        Raises:
            BenchmarkError: If that fails, with the end of what it said.
        """
        cpuinfo = _CPUINFO.format(features=self.processor.features, part=self.processor.part)
        for path, text in {
            "proc/cpuinfo": cpuinfo,
            "sys/devices/system/cpu/possible": "0\n",
            "sys/devices/system/cpu/present": "0\n",
        }.items():
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        program = [str(self.emulator), "-cpu", self.processor.name, "-L", str(self.root)]
        environment = {"PYTHONPATH": str(self.site), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        command = [*program, str(self.root / "usr/bin/python3"), *arguments]
        # Elsewhere, for Python finds modules in the folder that it runs in before those that are installed.
        return _run(command, timeout_s, environment, self.root)


def emulated(folder: Path, processor: Processor) -> Device:
    """Install fedge's base into an emulated device, by that device's own pip.

    Args:
        folder: For the packages; qemu and the emulated root are kept in the user's cache folder.
        processor: What to emulate.

    Raises:
        BenchmarkError: If something cannot be fetched or installed.
    """
    site = folder / "site"
    device = Device(_emulator(), _root(), site, processor)
    if site.exists():
        return device
    wheels = folder / "wheels"
    version = device.python("-c", "import sys; print('%d.%d' % sys.version_info[:2])", timeout_s=_INSTALL_S)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    say(f"fetching wheels for aarch64 and Python {version.strip()}")
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(REPOSITORY)], _FETCH_S)
    ours = str(next(wheels.glob("fedge-*.whl")))
    wanted = ["--only-binary=:all:", "--python-version", version.strip()]
    platforms = [f"--platform={platform}" for platform in WHEEL_PLATFORMS]
    # The same versions on both sides: what is compared is the processor.
    same = [f"{name}=={importlib.metadata.version(name)}" for name in ("onnxruntime", "numpy", "pillow")]
    _run([*pip, "download", "--dest", str(wheels), *wanted, *platforms, ours, *same], _FETCH_S)
    _run([*pip, "download", "--dest", str(folder), "--no-deps", "pip"], _FETCH_S)
    say(f"installing fedge's base on the emulated device ({processor.name})")
    its_pip = str(next(folder.glob("pip-*.whl")) / "pip")
    local = ["--no-index", "--find-links", str(wheels), "--no-compile", "--root-user-action", "ignore"]
    device.python(its_pip, "install", "--quiet", *local, "--target", str(site), "fedge", timeout_s=_INSTALL_S)
    return device


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedge" / "aarch64"


def _emulator() -> Path:
    """qemu, from this machine or fetched once."""
    kept = _cache() / "qemu"
    here = os.pathsep.join([os.environ["PATH"], str(kept / "usr" / "bin")])
    for attempt in (False, True):
        if attempt:
            own = _run(["dpkg", "--print-architecture"], _FETCH_S).strip()
            _unpack((EMULATOR,), kept, own)
        for command in EMULATOR_COMMANDS:
            found = shutil.which(command, path=here)
            if found:
                return Path(found)
    raise BenchmarkError(f"the package {EMULATOR} holds none of {', '.join(EMULATOR_COMMANDS)}: install qemu")


def _root() -> Path:
    """The emulated device's file system, fetched once."""
    kept = _cache() / "root"
    if not (kept / "usr/bin/python3").exists():
        _unpack(PACKAGES, kept, ARCHITECTURE)
    return kept


def _unpack(packages: Sequence[str], folder: Path, architecture: str) -> None:
    """Fetch Debian packages with all that they depend on, and unpack them into a folder."""
    if shutil.which("apt-get") is None:
        raise BenchmarkError("this needs apt-get: run it on Debian, Ubuntu or Raspberry Pi OS")
    say(f"fetching {', '.join(packages)} for {architecture}, once, into {folder}")
    with tempfile.TemporaryDirectory(prefix="fedge-apt-") as temporary:
        scratch = Path(temporary)
        lists, archives, status = scratch / "lists", scratch / "archives", scratch / "status"
        for place in (lists / "partial", archives / "partial"):
            place.mkdir(parents=True)
        status.touch()
        settings = {
            "APT::Architecture": architecture,
            "APT::Architectures::": architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",  # the user _apt may not write into our folders
            "Debug::NoLocking": "true",
            "Dir::State::Lists": str(lists),
            "Dir::State::status": str(status),  # nothing is installed: all dependencies are fetched
            "Dir::Cache::archives": str(archives),
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
        }
        apt = ["apt-get", "--quiet", *(f"--option={key}={value}" for key, value in settings.items())]
        _run([*apt, "update"], _FETCH_S)
        _run([*apt, "--yes", "--download-only", "install", *packages], _FETCH_S)
        unpacked = scratch / "unpacked"
        for package in sorted(archives.glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(package), str(unpacked)], _FETCH_S)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(unpacked, folder)


def _run(
    command: Sequence[str],
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env=environment,
            cwd=folder,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"not within {timeout_s:.0f} s: {' '.join(command)}") from error
    if done.returncode:
        told = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_TAIL_LINES:])
        raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}:\n{told}")
    return done.stdout
