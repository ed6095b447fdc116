"""Releases and the devices that follow them, read from the store, beside a running server or after it."""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import msgspec

from aggregator.database import Database
from aggregator.releases.records import (
    ReleaseState,
    StoredChannel,
    StoredFollower,
    StoredRelease,
    StoredReport,
)
from aggregator.releases.rollouts import FAILED
from aggregator.releases.store import ReleaseStore
from federation.wire.release import Channel, RolloutState, draw


class ReleaseStatus(msgspec.Struct, frozen=True):
    """One release.

    Attributes:
        number: Of the release.
        round: After which its model was taken.
        format: Of its weights.
        accuracy: Top-1 of the released file, in [0, 1]; None where nothing was measured.
        bytes: Of the model file.
        created_at: Unix seconds.
        state: ``stored``, ``canary``, ``stable``, ``retired``, ``halted`` or ``withdrawn``.
        reason: Why, for people.
        share: Of the devices that are to take it now.
        devices: Those devices, and whoever has reported on it.
        confirmed: How many of them run it for good.
        failed: How many have refused it or gone back.
        waiting: The rest.
        faults: Why devices failed: how many for each code.
    """

    number: int
    round: int
    format: str
    accuracy: float | None
    bytes: int
    created_at: float
    state: str
    reason: str
    share: float
    devices: int
    confirmed: int
    failed: int
    waiting: int
    faults: dict[str, int]


class FollowerStatus(msgspec.Struct, frozen=True):
    """One device that runs models.

    Attributes:
        agent: Its name.
        online: Whether its inference process lives; None if it has never said.
        running: Number of the release that it runs; None if it runs none.
        release: The release that it reported on last.
        state: How far it was with that.
        fault: Code of the last failure, on whichever release; empty if there was none.
        detail: What it wrote about that failure.
        p99_ms: 99th percentile from frame to label, as it last reported.
    """

    agent: str
    online: bool | None
    running: int | None
    release: int | None
    state: str
    fault: str
    detail: str
    p99_ms: float | None


def release_statuses(database: Database) -> list[ReleaseStatus]:
    """All releases, oldest first."""
    store = ReleaseStore(database)
    stable, canary = store.channel(Channel.STABLE), store.channel(Channel.CANARY)
    followers = store.followers().keys()
    first = _meant(canary, followers, database.federation)
    meant = {
        channel.number: (channel, agents)
        for channel, agents in ((stable, followers - first), (canary, first))
        if channel is not None
    }
    statuses = []
    for row in store.releases():
        channel, agents = meant.get(row.number, (None, set()))
        statuses.append(_status(row, channel, agents, store.reports(row.number)))
    return statuses


def _meant(canary: StoredChannel | None, followers: AbstractSet[str], federation: str) -> set[str]:
    """The devices that are to take the canary."""
    if canary is None or canary.number is None:
        return set()
    return {agent for agent in followers if draw(federation, agent, canary.number) < canary.share}


def _status(
    row: StoredRelease,
    channel: StoredChannel | None,
    meant: AbstractSet[str],
    reports: Mapping[str, StoredReport],
) -> ReleaseStatus:
    share = 0.0 if channel is None else channel.share
    first = 0 if channel is None else channel.first_manifest
    said = {
        agent: one.report
        for agent, one in reports.items()
        if one.report.manifest >= first or row.state is ReleaseState.STABLE
    }
    states = Counter(report.state for report in said.values())
    failed = [report for report in said.values() if report.state in FAILED]
    faults = Counter(report.fault.value if report.fault else report.state.value for report in failed)
    devices, confirmed = len(meant | set(said)), states[RolloutState.CONFIRMED]
    metrics = row.release.metrics
    return ReleaseStatus(
        number=row.number,
        round=row.release.round,
        format=row.release.format.value,
        accuracy=None if metrics is None else metrics.accuracy,
        bytes=row.release.model.length,
        created_at=row.release.created_at,
        state=row.state.value,
        reason=row.reason,
        share=share,
        devices=devices,
        confirmed=confirmed,
        failed=len(failed),
        waiting=devices - confirmed - len(failed),
        faults=dict(faults),
    )


def follower_statuses(database: Database) -> list[FollowerStatus]:
    """All devices that have ever said which model they run, by name."""
    store = ReleaseStore(database)
    said: dict[str, list[StoredReport]] = {}
    for row in store.releases():
        for agent, report in store.reports(row.number).items():
            said.setdefault(agent, []).append(report)
    return [
        _follower(follower, sorted(said.get(agent, []), key=lambda one: one.at))
        for agent, follower in store.followers().items()
    ]


def _follower(follower: StoredFollower, said: list[StoredReport]) -> FollowerStatus:
    model = follower.model
    last = said[-1].report if said else None
    failure = next((one.report for one in reversed(said) if one.report.state in FAILED), None)
    running = None if last is None else last.running
    if model is not None:
        running = int(model.installed_version) if model.installed_version.isdecimal() else None
    return FollowerStatus(
        agent=follower.agent,
        online=None if model is None else model.online,
        running=running,
        release=None if last is None else last.number,
        state="" if last is None else last.state.value,
        fault=failure.fault.value if failure is not None and failure.fault is not None else "",
        detail="" if failure is None else failure.detail,
        p99_ms=None if last is None else last.p99_ms,
    )
