"""What ``edge-agent models`` shows: which releases are on this device, which one runs, which are in quarantine and why.

Only looks, and takes no lock: the device may be inferring. ``--forgive`` deletes one file.
"""

import time
from pathlib import Path

from msgspec import Struct

from edge_agent.releases.probation import read_trial
from edge_agent.releases.quarantine import Quarantine, Quarantined
from edge_agent.releases.slot_files import CURRENT, PREVIOUS, Slot, installed, linked
from federation.errors import ConfigError, ReleaseError
from federation.release import check_files

_SHOWN = 12
"""Hex digits of a hash that people see; as many as the logs have."""


class Installed(Struct, frozen=True, kw_only=True):
    """A release on this device.

    Attributes:
        number: Of the release.
        sha256: Of its model.
        place: ``current``, ``previous``, or empty for one that is only kept.
        format: Of the weights.
        run: Whose model, and
        round: after which round.
        manifest: Version of the manifest that brought it.
        bytes: Of the model.
        damage: What is wrong with its files; empty for nothing.
    """

    number: int
    sha256: str
    place: str
    format: str
    run: str
    round: int
    manifest: int
    bytes: int
    damage: str


class Probation(Struct, frozen=True, kw_only=True):
    """The probation of the current release.

    Attributes:
        since: Unix seconds.
        starts: Process starts since then, less the orderly stops.
    """

    since: float
    starts: int


class Models(Struct, frozen=True, kw_only=True):
    """What ``edge-agent models --json`` prints.

    Attributes:
        folder: Where the models are.
        current: Number of the release that runs when the device starts; None for no usable one.
        previous: Number of the one to go back to; None for none.
        probation: Of the current one; None if it was confirmed.
        releases: The current one first, then the previous one, then the newest.
        quarantine: The latest first.
    """

    folder: str
    current: int | None
    previous: int | None
    probation: Probation | None
    releases: tuple[Installed, ...]
    quarantine: tuple[Quarantined, ...]


def collect(folder: Path) -> Models:
    """Look at a folder of models.

    Args:
        folder: ``STATE/models``.

    Raises:
        ConfigError: If it cannot be read.
    """
    quarantine = Quarantine(folder, time.time)
    places = {linked(folder, name): name for name in (PREVIOUS, CURRENT)}
    order = {CURRENT: 0, PREVIOUS: 1, "": 2}
    found = [_installed(slot, places.get(slot.folder, "")) for slot in installed(folder)]
    found.sort(key=lambda one: (order[one.place], -one.number))
    usable = {one.place: one for one in found if not one.damage and quarantine.find(one.sha256) is None}
    current = usable.get(CURRENT)
    trial = None if current is None else read_trial(folder, current.sha256)
    probation = None
    if trial is not None:
        probation = Probation(since=trial.since, starts=trial.starts)
    return Models(
        folder=str(folder),
        current=current.number if current else None,
        previous=usable[PREVIOUS].number if PREVIOUS in usable else None,
        probation=probation,
        releases=tuple(found),
        quarantine=tuple(quarantine.all()),
    )


def render(report: Models) -> str:
    """Lay a report out for a terminal."""
    lines = [f"models in {report.folder}"]
    if report.current is None:
        lines.append("no model runs: waiting for a release")
    if report.releases:
        lines += ["", f"{'':<9} {'release':<8} {'model':<{_SHOWN}}  {'format':<6} {'round':<6} {'bytes':>11}"]
    for one in report.releases:
        note = f"  damaged: {one.damage}" if one.damage else ""
        if one.place == CURRENT and report.probation is not None:
            note += f"  on probation since {_clock(report.probation.since)}, {report.probation.starts} starts"
        lines.append(
            f"{one.place:<9} {one.number:<8} {one.sha256[:_SHOWN]}  {one.format:<6} {one.round:<6} {one.bytes:>11,}{note}"
        )
    if report.quarantine:
        lines += ["", "quarantine (forgive one with --forgive NUMBER):"]
    for record in report.quarantine:
        lines.append(f"  {_name(record)}, {_clock(record.time)}: {record.fault.value}: {record.detail}")
    return "\n".join(lines)


def take_out(folder: Path, which: str) -> str:
    """Take one release out of quarantine.

    Args:
        folder: ``STATE/models``.
        which: Its number, or the beginning of its SHA-256.

    Returns:
        What it is called.

    Raises:
        ConfigError: If none or several are meant, or its record cannot be deleted.
    """
    quarantine = Quarantine(folder, time.time)
    records = quarantine.all()
    meant = [one for one in records if which.isdecimal() and one.number == int(which)]
    meant = meant or [one for one in records if which and one.sha256.startswith(which)]
    if len(meant) != 1:
        known = ", ".join(_name(one) for one in records) or "nothing"
        many = "nothing" if not meant else f"{len(meant)} models"
        raise ConfigError(f"--forgive {which} means {many} in quarantine; there is {known}")
    quarantine.forgive(meant[0].sha256)
    return _name(meant[0])


def _installed(slot: Slot, place: str) -> Installed:
    try:
        check_files(slot.folder, slot.release)
        damage = ""
    except ReleaseError as error:
        damage = error.detail
    release = slot.release
    return Installed(
        number=release.number,
        sha256=slot.sha256,
        place=place,
        format=release.format.value,
        run=release.run,
        round=release.round,
        manifest=slot.manifest_version,
        bytes=release.model.length,
        damage=damage,
    )


def _name(record: Quarantined) -> str:
    number = "a release" if record.number is None else f"release {record.number}"
    return f"{number} ({record.sha256[:_SHOWN]})"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
