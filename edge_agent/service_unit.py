"""The text of a systemd unit for this agent: hardened, watched, started again for ever. No file is touched here.

Every directive is in systemd.exec(5), systemd.service(5) or systemd.resource-control(5) under its name. What a service
manager without privileges (``systemctl --user``) cannot do is left out for it: no user of its own, no mount namespaces.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from federation.errors import ConfigError

MARK: Final = "# Written by `edge-agent install-service`: run that again instead of editing this."
"""First line: a file without it is somebody else's."""

CREDENTIALS_SINCE: Final = 247
"""systemd that has LoadCredential=; Debian 11 and Ubuntu 22.04 have it."""

STEPS_SINCE: Final = 254
"""systemd that has RestartSteps=; an older one waits the same time before each start."""

RESTART_S: Final = 10
RESTART_STEPS: Final = 8
RESTART_MAX_S: Final = 300
"""Between two starts, at first and at last: what is broken on a device is mended elsewhere, and takes its time."""

WATCHDOG_S: Final = 120
"""Silence after which it hangs. The loops turn every five seconds at least; a board that swaps may stop for many."""

START_S: Final = 600
"""Until it is ready: PyTorch from an SD card, then a look at each image."""

STOP_S: Final = 60
"""The goodbye to the broker, and an activation or a training step that has begun."""

INFER_MEMORY: Final = "768M"
"""512 MiB for the process that tests a release (`max_memory_mb`), and what is used meanwhile."""

TRAIN_MEMORY: Final = "80%"
"""PyTorch takes what the model and the images need; the rest of the device is to stay usable."""

TASKS_MAX: Final = 512
"""Processes and threads together; PyTorch takes a few for each core."""

NICE: Final = 5
"""Behind a login by ssh, which is how a busy device is looked after."""

VIDEO_GROUP: Final = "video"
RENDER_GROUP: Final = "render"

BUNDLE_CREDENTIAL: Final = "bundle.json"
CONFIG_CREDENTIAL: Final = "agent.toml"
ROSTER_CREDENTIAL: Final = "roster.toml"

HIDDEN: Final = tuple(map(Path, ("/home", "/root", "/run/user")))
"""What ProtectHome= takes away."""

_CREDENTIAL: Final = "${CREDENTIALS_DIRECTORY}/"
_STATE: Final = "${STATE_DIRECTORY}"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MEMORY = re.compile(r"[1-9][0-9]*[KMGT]?|[1-9][0-9]?%|100%|infinity")
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


class Camera(StrEnum):
    """What is to be reached below ``/dev`` for the frames."""

    NONE = ""
    V4L = "v4l"
    LIBCAMERA = "libcamera"


_CAMERA_DEVICES = {
    Camera.NONE: (),
    Camera.V4L: ("char-video4linux",),
    Camera.LIBCAMERA: ("char-video4linux", "char-media", "char-dma_heap"),
}
"""By kind and not by number: a camera that is plugged in again may have another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the unit is to run, and what that needs.

    Attributes:
        name: Of the unit, without ``.service``; also of its state folder.
        executable: Full path of ``edge-agent``.
        bundle: Full path of the device's bundle.
        trains: Whether it trains.
        infers: Whether it labels frames.
        flags: More of the command's flags and their values. Everybody on the device can read them.
        config: Full path of the agent's TOML file.
        roster: Full path of the federation's roster.
        memory_max: As MemoryMax= takes it.
        user: Whether it is for the service manager of the user who calls, instead of the system's.
        systemd: Version of systemd that will read it.
        readable: Full paths of what the service must be able to read: data, pictures, an installation below ``/home``.
        groups: Names of groups that may read them.
        camera: What is to be reached below ``/dev``.
        gpu: Whether it trains on one.

    Raises:
        ConfigError: If a name or a size is not what systemd takes, or there is nothing to run.
    """

    name: str
    executable: Path
    bundle: Path
    trains: bool = False
    infers: bool = False
    flags: tuple[tuple[str, str], ...] = ()
    config: Path | None = None
    roster: Path | None = None
    memory_max: str
    user: bool = False
    systemd: int = CREDENTIALS_SINCE
    readable: tuple[Path, ...] = ()
    groups: tuple[str, ...] = ()
    camera: Camera = Camera.NONE
    gpu: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"--name {self.name!r}: use letters, digits, dots, hyphens and underscores")
        if not _MEMORY.fullmatch(self.memory_max):
            raise ConfigError(f"--memory-max {self.memory_max!r}: write it as 512M, 2G, 80% or infinity")
        if not self.trains and not self.infers:
            raise ConfigError(
                "nothing to do for this service: give --data to train, --source to label frames, or both"
            )
        if not self.user and self.systemd < CREDENTIALS_SINCE:
            raise ConfigError(
                f"systemd {self.systemd} cannot hand over the secret bundle (LoadCredential=): it takes "
                f"{CREDENTIALS_SINCE} or newer, or --user, with the bundle readable by the user"
            )


def render(service: Service) -> str:
    """The unit file.

    Args:
        service: What it runs.

    Raises:
        ConfigError: If an argument has a character that no unit can hold.
    """
    sections = [
        [
            MARK,
            "[Unit]",
            f"Description=fedge: {_purpose(service)}",
            # Neither network-online.target nor time-sync.target: a device labels frames and trains without both.
            "After=network.target",
            "# It never gives up for good.",
            "StartLimitIntervalSec=0",
        ],
        ["[Service]", *_life(service)],
        _state(service),
        _limits(service),
        _system_calls(),
        [] if service.user else _isolation(service),
        ["[Install]", f"WantedBy={'default' if service.user else 'multi-user'}.target"],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def command_line(service: Service) -> list[str]:
    """What the unit runs, word by word, as systemd's ExecStart= has it: quoted, with its variables."""
    files = (
        (service.config, "--config", CONFIG_CREDENTIAL),
        (_roster(service), "--roster", ROSTER_CREDENTIAL),
    )
    words = [
        _quoted(str(service.executable)),
        "run" if service.trains else "infer",
        _given(service, service.bundle, BUNDLE_CREDENTIAL),
        "--state",
        _STATE,
    ]
    for path, flag, credential in files:
        if path:
            words += [flag, _given(service, path, credential)]
    for flag, value in service.flags:
        words += [flag, _quoted(value)]
    return words


def _purpose(service: Service) -> str:
    if not service.trains:
        return "labels what this device sees"
    return "trains on this device" + (", and labels what it sees" if service.infers else "")


def _life(service: Service) -> list[str]:
    steps = [f"RestartSteps={RESTART_STEPS}", f"RestartMaxDelaySec={RESTART_MAX_S}"]
    return [
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={' '.join(command_line(service))}",
        "Restart=always",
        f"RestartSec={RESTART_S}",
        *(steps if service.systemd >= STEPS_SINCE else []),
        "# Petted by the loop over the frames, or by the agent's own; at a stop it prints where each thread was.",
        f"WatchdogSec={WATCHDOG_S}",
        f"TimeoutStartSec={START_S}",
        f"TimeoutStopSec={STOP_S}",
        "KillMode=mixed",
        "# Fewer arenas are less memory on many cores.",
        "Environment=MALLOC_ARENA_MAX=2 PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1",
        f"Nice={NICE}",
    ]


def _state(service: Service) -> list[str]:
    lines = [
        "# What must survive; a relative --save is in it too.",
        f"StateDirectory={service.name}",
        "StateDirectoryMode=0700",
        f"WorkingDirectory=%S/{service.name}",
        "UMask=0077",
    ]
    if service.user:
        return lines
    files = (
        (BUNDLE_CREDENTIAL, service.bundle),
        (CONFIG_CREDENTIAL, service.config),
        (ROSTER_CREDENTIAL, _roster(service)),
    )
    return [
        "# A user that exists while the service runs. The files below stay root's own, mode 0600.",
        "DynamicUser=yes",
        *(f"LoadCredential={name}:{_raw(str(path))}" for name, path in files if path),
        *lines,
    ]


def _limits(service: Service) -> list[str]:
    return [
        f"MemoryMax={service.memory_max}",
        f"TasksMax={TASKS_MAX}",
        "LimitCORE=0",
        "# A release that takes all memory while it is tested costs that test, not the service.",
        "OOMPolicy=continue",
    ]


def _system_calls() -> list[str]:
    return [
        "NoNewPrivileges=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged",
        "SystemCallErrorNumber=EPERM",
        "# Not MemoryDenyWriteExecute: PyTorch writes machine code for its kernels while it runs.",
    ]


def _isolation(service: Service) -> list[str]:
    devices = [*_CAMERA_DEVICES[service.camera]]
    groups = [*service.groups]
    if service.camera or service.gpu:
        groups.append(VIDEO_GROUP)
    if service.gpu:
        groups.append(RENDER_GROUP)
    if service.gpu:
        reach = ["# GPUs have too many device files, with names of their own on each board, to list them."]
    elif devices:
        reach = ["DevicePolicy=closed", *(f"DeviceAllow={device} rw" for device in devices)]
    else:
        reach = ["PrivateDevices=yes"]
    return [
        "CapabilityBoundingSet=",
        "AmbientCapabilities=",
        "ProtectSystem=strict",
        f"ProtectHome={'tmpfs' if any(map(is_hidden, service.readable)) else 'yes'}",
        *(f"BindReadOnlyPaths={_in_quotes(str(path), ':')}" for path in service.readable),
        "PrivateTmp=yes",
        *reach,
        *([f"SupplementaryGroups={' '.join(dict.fromkeys(groups))}"] if groups else []),
        # The service's device rules would have to be spelled out twice: it allows the clock's device.
        *([] if service.gpu else ["ProtectClock=yes"]),
        "ProtectControlGroups=yes",
        "ProtectHostname=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "ProtectProc=invisible",
        "RemoveIPC=yes",
        "KeyringMode=private",
    ]


def is_hidden(path: Path) -> bool:
    """Whether a service sees that path only if it is bound into its view."""
    return any(path.is_relative_to(folder) for folder in HIDDEN)


def _roster(service: Service) -> Path | None:
    """Only the side that trains takes part in masked sums."""
    return service.roster if service.trains else None


def _given(service: Service, path: Path, credential: str) -> str:
    """A file as the command gets it: handed over by systemd, or read where it is."""
    return _quoted(str(path)) if service.user else _CREDENTIAL + credential


def _quoted(word: str) -> str:
    """One word of ExecStart=, to be taken literally: no variables, no specifiers, no separators."""
    return _in_quotes(word.replace("$", "$$"))


def _in_quotes(text: str, separator: str = " ") -> str:
    """One word of a list of words, in which a separator may stand between its parts."""
    literal = _raw(text)
    if _PLAIN.fullmatch(literal) and separator not in literal:
        return literal
    return '"' + literal.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _raw(text: str) -> str:
    """The rest of a line, which systemd takes as it is but for specifiers."""
    if not text.isprintable() or text.endswith("\\"):
        raise ConfigError(f"{text!r} cannot stand in a unit file: rename it")
    return text.replace("%", "%%")
