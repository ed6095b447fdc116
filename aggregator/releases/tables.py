"""Releases and the devices that follow them, for a terminal."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from aggregator.releases.status import FollowerStatus, ReleaseStatus
from aggregator.tables import foreign, make_table, number_text


def releases_table(releases: Sequence[ReleaseStatus]) -> Table:
    """The releases as a table."""
    headings = (
        "release", "round", "format", "KB", "accuracy", "state", "share", "confirmed", "failed", "waiting", "why",
    )  # fmt: skip
    cells: list[tuple[str | Text, ...]] = []
    for row in releases:
        failed = str(row.failed or "")
        if row.faults:
            failed += f" ({', '.join(f'{code} {count}' for code, count in sorted(row.faults.items()))})"
        cells.append(
            (
                str(row.number),
                str(row.round),
                row.format,
                f"{row.bytes / 1000:,.0f}",
                number_text(row.accuracy, ".2%"),
                row.state,
                number_text(row.share or None, ".0%"),
                f"{row.confirmed}/{row.devices}" if row.devices else "",
                failed,
                str(row.waiting or ""),
                foreign(row.reason),
            )
        )
    return make_table(headings, cells)


def followers_table(followers: Sequence[FollowerStatus]) -> Table:
    """The devices that run models as a table."""
    headings = ("device", "inference", "runs release", "last reported", "p99 ms", "last fault", "detail")
    cells: list[tuple[str | Text, ...]] = [
        (
            row.agent,
            "" if row.online is None else "online" if row.online else "offline",
            "" if row.running is None else str(row.running),
            "" if row.release is None else f"{row.release} {row.state}",
            number_text(row.p99_ms, ".1f"),
            row.fault,
            foreign(row.detail),
        )
        for row in followers
    ]
    return make_table(headings, cells)
