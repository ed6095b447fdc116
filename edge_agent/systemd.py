"""The service manager of this machine: whether there is one, and units put there and taken away."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from edge_agent.service_unit import MARK
from federation.errors import ConfigError
from federation.files import write_whole

SYSTEM_UNITS: Final = Path("/etc/systemd/system")
USER_UNITS: Final = Path(".config/systemd/user")
"""Below the home."""

BOOTED: Final = Path("/run/systemd/system")
"""There if systemd runs this machine: sd_booted(3)."""


def version() -> int | None:
    """Of the systemd that is installed here; None without one."""
    program = shutil.which("systemctl")
    if program is None:
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    words = said.stdout.split()  # systemd 252 (252.39-1~deb12u2)
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else None


def check_manager(name: str, *, user: bool) -> None:
    """Refuse where no unit can be installed.

    Args:
        name: Of the unit.
        user: Whether it is for the user's own manager.

    Raises:
        ConfigError: With what to do instead.
    """
    if shutil.which("systemctl") is None or not BOOTED.is_dir():
        raise ConfigError(
            "systemd does not run this machine: --print shows the unit, to be carried to one that it runs"
        )
    root = os.geteuid() == 0
    if not user and not root:
        raise ConfigError(
            f"only root may write {_place(name, user=user)}: run this with sudo and the full path of edge-agent, or "
            "give --user, or --print"
        )
    if user and root:
        raise ConfigError(
            "--user is for the user as whom it shall run, not for root: leave out sudo, or --user"
        )


def install(name: str, unit: str, *, user: bool) -> list[str]:
    """Write a unit and have systemd read it. Nothing is started.

    Args:
        name: Of the unit.
        unit: Its text.
        user: Whether it is for the user's own manager.

    Returns:
        What was done, and the commands to run next.

    Raises:
        ConfigError: If another unit has that name, or it cannot be written or read.
    """
    place, control = _place(name, user=user), "systemctl --user" if user else "systemctl"
    before = place.read_text(errors="replace") if place.exists() else None
    if before is not None and not before.startswith(MARK):
        raise ConfigError(f"{place} was not written by this command: choose another --name, or move it away")
    if before != unit:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, unit.encode())
    if not _systemctl("daemon-reload", user=user):
        raise ConfigError(f"systemd did not read {place}: its reason is above")
    changed = before is not None and before != unit
    return [
        f"{place} is as it should be" if before == unit else f"wrote {place}",
        f"next: {control} enable --now {name}",
        *([f"      {control} restart {name}, if it runs already"] if changed else []),
        *(["      loginctl enable-linger, so that it runs without a login"] if user else []),
        f"then: {control} status {name}",
        f"      journalctl {'--user ' if user else ''}-u {name} -f",
    ]


def remove(name: str, *, user: bool) -> list[str]:
    """Stop a unit and take it away.

    Args:
        name: Of the unit.
        user: Whether it is the user's own manager's.

    Returns:
        What was done.

    Raises:
        ConfigError: If it is not ours, or cannot be stopped.
    """
    place = _place(name, user=user)
    if not place.exists():
        return [f"there is no {place}"]
    check_manager(name, user=user)
    if not place.read_text(errors="replace").startswith(MARK):
        raise ConfigError(f"{place} was not written by this command: take it away by hand, if it should go")
    if not _systemctl("disable", "--now", name, user=user):
        raise ConfigError(f"{name} could not be stopped: systemd's reason is above")
    place.unlink()
    _systemctl("daemon-reload", user=user)
    state = f"the folder {name} of your user's state" if user else f"/var/lib/private/{name}"
    return [f"removed {place}; what it has learned stays in {state} until you remove that"]


def _place(name: str, *, user: bool) -> Path:
    return (Path.home() / USER_UNITS if user else SYSTEM_UNITS) / f"{name}.service"


def _systemctl(*arguments: str, user: bool) -> bool:
    """Run it; what it complains of goes to stderr."""
    scope = ["--user"] if user else []
    return subprocess.run(["systemctl", *scope, *arguments], check=False).returncode == 0  # noqa: S607 - root's own path
