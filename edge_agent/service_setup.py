"""What the service of this device needs: read from its settings, and looked up on its disk."""

import grp
import shutil
import stat
import sys
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import federation
from edge_agent.config import AgentConfig
from edge_agent.inference.cameras import without_secrets
from edge_agent.inference.command import CURRENT
from edge_agent.inference.sources import PICAMERA, STDIN, open_feed
from edge_agent.service_unit import CREDENTIALS_SINCE, INFER_MEMORY, TRAIN_MEMORY, Camera, Service, is_hidden
from edge_agent.systemd import version
from federation.bundle import read_bundle
from federation.config import load
from federation.errors import ConfigError
from federation.task.partition import split_spec
from federation.task.torchvision_sets import SETS

GPU_DEVICES: Final = tuple(map(Path, ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvmap")))
"""Of which a machine with a GPU has one: a PC, then Jetsons of several generations."""

_READ_FOLDER: Final = stat.S_IROTH | stat.S_IXOTH
_GROUP_SHIFT: Final = 3
"""From the bits of others to those of the group."""


def read_settings(
    file: Path | None, data: str | None, source: str | None, publish: str | None
) -> AgentConfig:
    """The settings that the service will have.

    Args:
        file: Of ``--config``.
        data: Of ``--data``.
        source: Of ``--source``.
        publish: Of ``--publish``.

    Raises:
        ConfigError: If a service cannot have them: a relative path in the file, a password on the command line.
    """
    settings = load(
        AgentConfig, file=file, flags={"data": data, "inference.source": source, "inference.publish": publish}
    )
    chosen = settings.inference
    if chosen.source == STDIN:
        raise ConfigError("--source - reads paths from stdin, which a service does not have")
    if source and "://" in source and without_secrets(source) != source:
        raise ConfigError(
            "--source may hold a password, and everybody on the device can read a service's command line: write it "
            'into the file that --config names, as source = "..." under [inference], readable by root only'
        )
    if Path(chosen.save).is_absolute():
        raise ConfigError(
            f"inference.save = {chosen.save!r}: the service writes into its own folder; give a name without a path"
        )
    in_file = {
        "data": None if data else path_of_data(settings.data),
        "inference.source": None if source else path_of_source(chosen.source),
        "inference.model": path_of_model(chosen.model),
        "privacy.roster": Path(settings.privacy.roster) if settings.privacy.roster else None,
    }
    for key, path in in_file.items():
        if path is not None and not path.is_absolute():
            raise ConfigError(f"{key} in {file} names {path}: a service needs the full path")
    return settings


def describe(
    settings: AgentConfig,
    bundle: Path,
    given: Mapping[str, str | None],
    file: Path | None,
    *,
    name: str,
    executable: Path | None,
    memory_max: str | None,
    user: bool,
    elsewhere: bool,
) -> Service:
    """The service, with all that it must reach.

    Args:
        settings: Those that it will have.
        bundle: Of the device.
        given: Flags that are to stand in its command, and their values.
        file: Of ``--config``.
        name: Of the unit.
        executable: ``edge-agent`` on the device; None for that of this installation.
        memory_max: As MemoryMax= takes it; None for a default.
        user: Whether it is for the user's own service manager.
        elsewhere: Whether it may be meant for another device: nothing is looked for on this one's disk.

    Raises:
        ConfigError: If it could not run: something is missing, or cannot be read.
    """
    trains, infers = bool(settings.data), bool(settings.inference.source)
    program = (executable or own_executable()).absolute()
    found = (
        path_of_data(settings.data),
        path_of_source(settings.inference.source),
        path_of_model(settings.inference.model) if infers else None,
    )
    paths = [path.absolute() for path in found if path is not None]
    groups: list[str | None] = []
    if not elsewhere:
        read_bundle(bundle)
        _check_packages(settings.inference.source, trains=trains)
        groups = [] if user else [group_that_reads(path) for path in paths]
        if not user:
            _check_reach(program)
    installation = [] if executable else [path for path in _installation() if is_hidden(path)]
    roster = settings.privacy.roster
    return Service(
        name=name,
        executable=program,
        bundle=bundle.absolute(),
        trains=trains,
        infers=infers,
        flags=tuple((flag, _full(flag, value)) for flag, value in given.items() if value),
        config=None if file is None else file.absolute(),
        roster=Path(roster) if roster else None,
        memory_max=memory_max or (TRAIN_MEMORY if trains else INFER_MEMORY),
        user=user,
        systemd=version() or CREDENTIALS_SINCE,
        readable=tuple(dict.fromkeys([*installation, *paths])),
        groups=tuple(dict.fromkeys(group for group in groups if group)),
        camera=_camera(settings.inference.source),
        gpu=trains and _wants_gpu(settings.device),
    )


def path_of_data(spec: str) -> Path | None:
    """The folder of ``imagefolder:PATH`` and its like; None where data is a name or a plug-in."""
    kind, _, path = split_spec(spec)[0].partition(":")
    return Path(path) if path and (kind == "imagefolder" or kind in SETS) else None


def path_of_source(source: str) -> Path | None:
    """The file or folder that a source is; None for a camera and a stream."""
    named = source in ("", PICAMERA) or source.isdecimal() or "://" in source or source.startswith("/dev/")
    return None if named else Path(source)


def path_of_model(model: str) -> Path | None:
    """The file that a model is; None for the one that the aggregator rolls out."""
    return None if model == CURRENT else Path(model)


def group_that_reads(path: Path) -> str | None:
    """The group that the service's own user must have to read this; None if everybody may.

    Raises:
        ConfigError: If no group but root's may.
    """
    status = path.stat()
    needed = _READ_FOLDER if path.is_dir() else stat.S_IROTH
    if status.st_mode & needed == needed:
        return None
    if (status.st_mode >> _GROUP_SHIFT) & needed == needed and status.st_gid:
        try:
            return grp.getgrgid(status.st_gid).gr_name
        except KeyError:
            return str(status.st_gid)
    raise ConfigError(
        f"{path} can be read by its owner only, and the service runs as a user of its own: let everybody read it "
        f"(chmod -R o+rX {path}), or a group other than root's (chgrp -R video {path}; chmod -R g+rX {path})"
    )


def own_executable() -> Path:
    """``edge-agent`` of this installation.

    Raises:
        ConfigError: If there is none.
    """
    installed = Path(sysconfig.get_path("scripts")) / "edge-agent"
    if installed.exists():
        return installed
    found = shutil.which("edge-agent")
    if found is None:
        raise ConfigError(f"there is no {installed}: name the edge-agent to run with --executable")
    return Path(found)


def _check_packages(source: str, *, trains: bool) -> None:
    if trains and find_spec("torch") is None:
        raise ConfigError("training needs torch, which is not installed: pip install 'fedge[train]'")
    if source:
        # Says what is missing or does not exist. Nothing of a camera is touched before a feed is started.
        open_feed(source, fps=1, file_fps=1).close()


def _check_reach(program: Path) -> None:
    """Refuse a program that only its owner can reach. What is below a home is bound into the service's view.

    Raises:
        ConfigError: If a folder above it is closed to others.
    """
    if is_hidden(program):
        return
    for folder in program.parents:
        if not folder.stat().st_mode & stat.S_IXOTH:
            raise ConfigError(
                f"{folder} is closed to the service's own user, and {program} is in it: chmod o+x {folder}, or install "
                "fedge elsewhere, as in /opt/fedge"
            )


def _full(flag: str, value: str) -> str:
    """A flag's value with the full path in it."""
    if flag == "--data" and (folder := path_of_data(value)):
        data, _ = split_spec(value)
        return f"{data.partition(':')[0]}:{folder.absolute()}{value[len(data) :]}"
    if flag == "--source" and (place := path_of_source(value)):
        return str(place.absolute())
    return value


def _camera(source: str) -> Camera:
    if source == PICAMERA:
        return Camera.LIBCAMERA
    return Camera.V4L if source.isdecimal() or source.startswith("/dev/") else Camera.NONE


def _wants_gpu(device: str) -> bool:
    return device == "cuda" or (device == "auto" and any(path.exists() for path in GPU_DEVICES))


def _installation() -> list[Path]:
    """Where this program comes from: its environment, its Python, its source if that is elsewhere."""
    places = [Path(sys.prefix), Path(sys.base_prefix)]
    source = Path(federation.__file__).parent.parent
    return [*places, *([] if any(source.is_relative_to(place) for place in places) else [source])]
