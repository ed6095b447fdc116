"""The releases of a federation with all that was signed of them: what ``aggregator releases`` lists."""

import msgspec
from rich.console import Console

from aggregator.database import Database
from aggregator.releases.records import REFUSED_KEY, StoredRelease
from aggregator.releases.status import ReleaseStatus, release_statuses
from aggregator.releases.store import ReleaseStore
from aggregator.tables import make_table, number_text
from federation.wire.release import Channel, Release


class ReleaseRow(msgspec.Struct, frozen=True, kw_only=True):
    """One release.

    Attributes:
        status: What has become of it, and what devices say.
        release: As it was signed; the digests of the chunks are left out.
        sha256: Of the model file.
        delta_bytes: Length of the delta; None without one.
        on_disk: Whether its files are there, so that it can be announced again.
    """

    status: ReleaseStatus
    release: dict[str, object]
    sha256: str
    delta_bytes: int | None
    on_disk: bool


class ReleaseList(msgspec.Struct, frozen=True, kw_only=True):
    """All releases.

    Attributes:
        stable: Number of the stable release; None before the first.
        canary: Number of the release that is on its way there; None if there is none.
        waiting: Requests that no server has answered yet.
        refused: Why the last run's model was not released by itself; empty if it was, or none was to be.
        releases: Oldest first.
    """

    stable: int | None
    canary: int | None
    waiting: int
    refused: str
    releases: list[ReleaseRow]


def collect_releases(database: Database) -> ReleaseList:
    """Read the store; the server may be running."""
    store = ReleaseStore(database)
    stable, canary = store.current(Channel.STABLE), store.current(Channel.CANARY)
    stored = {row.number: row for row in store.releases()}
    return ReleaseList(
        stable=None if stable is None else stable.number,
        canary=None if canary is None else canary.number,
        waiting=len(store.requests()),
        refused=database.recall(REFUSED_KEY) or "",
        releases=[_row(status, stored[status.number]) for status in release_statuses(database)],
    )


def _row(status: ReleaseStatus, stored: StoredRelease) -> ReleaseRow:
    release = stored.release
    return ReleaseRow(
        status=status,
        release=_plain(release),
        sha256=release.model.sha256,
        delta_bytes=None if release.delta is None else release.delta.object.length,
        on_disk=stored.on_disk,
    )


_OBJECTS = ("model", "golden", "delta")


def _plain(release: Release) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(release)
    return {name: value for name, value in fields.items() if name not in _OBJECTS}


def list_text(found: ReleaseList) -> str:
    """For a terminal."""
    headings = (
        "release", "round", "format", "MB", "delta", "top-1", "epsilon (delta)", "state", "share", "devices", "confirmed",
        "failed",
    )  # fmt: skip
    cells = []
    for row in found.releases:
        status, privacy = row.status, row.release["privacy"]
        epsilon = f"{privacy['epsilon']:.3g} ({privacy['delta']:g})" if isinstance(privacy, dict) else ""
        faults = ", ".join(f"{count} {code}" for code, count in sorted(status.faults.items()))
        cells.append(
            (
                str(status.number),
                str(status.round),
                status.format,
                f"{status.bytes / 1e6:.2f}",
                "" if row.delta_bytes is None else f"{row.delta_bytes / status.bytes:.0%}",
                number_text(status.accuracy, ".2%"),
                epsilon,
                f"{status.state}: {status.reason}" if status.reason else status.state,
                number_text(status.share or None, ".0%"),
                str(status.devices or ""),
                str(status.confirmed or ""),
                f"{status.failed} ({faults})" if status.failed else "",
            )
        )
    console = Console(highlight=False, markup=False)
    with console.capture() as capture:
        console.print(make_table(headings, cells))
        if found.refused:
            console.print(found.refused, soft_wrap=True)
        if found.waiting:
            waiting = "1 request waits" if found.waiting == 1 else f"{found.waiting} requests wait"
            console.print(f"{waiting} for a server: start `aggregator serve --stay`")
    return capture.get().rstrip("\n")
