"""aggregator.traffic and presence: what is kept of the bytes that a round moves, and of uploads in progress."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_link import ADDRESS, MemoryBroker, MemoryLink
from structlog.testing import capture_logs

from aggregator.presence import TELEMETRY_INTERVAL_S, Presence
from aggregator.status import collect
from aggregator.status_view import render
from aggregator.store import Store
from aggregator.traffic import ACCOUNT_S, WATCH_S, StoredTraffic, StoredUpload, TrafficLog, Watch
from federation.logs import PROGRESS_LOG_S
from federation.wire.credit import Progress
from federation.wire.messages import (
    AgentState,
    Capabilities,
    RoundTraffic,
    Telemetry,
    Traffic,
    encode_json,
)

SESSION = "fedcba9876543210"
ABLE = Capabilities(
    version="0", device="cpu", threads=1, memory_mb=1, samples=10, encodings=("float32",), platform="test"
)


def moved(sent: int, received: int) -> Traffic:
    return Traffic(sent_bytes=sent, received_bytes=received, sent_payload_bytes=sent - 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "state", "home", create=True) as store:
        for number in (1, 2):
            store.open_round(number, 1, ("pi1", "pi2"), base="0" * 64, encoding="float32", deadline_s=60)
        yield store


@pytest.fixture
def link() -> MemoryLink:
    link = MemoryBroker().make_link(ADDRESS, "server", on_event=lambda _: None)
    link.start()
    return link


def test_an_older_state_folder_gets_the_tables(tmp_path: Path) -> None:
    with Store(tmp_path, "home", create=True) as store:
        run = store.run
    with sqlite3.connect(tmp_path / "store.sqlite") as db:
        db.executescript("DROP TABLE traffic; DROP TABLE uploads;")
    with Store(tmp_path, "home") as store:
        log = TrafficLog(store)
        log.record(1, "pi1", moved(5, 6))
        assert log.read() == [StoredTraffic(1, "pi1", moved(5, 6))]
        assert log.uploads() == []
        assert store.run == run


def test_an_agents_later_word_replaces_the_former_and_the_servers_adds_up(store: Store) -> None:
    log = TrafficLog(store)
    for sent in (10, 30):
        log.record(1, "pi1", moved(sent, 7))
        log.add(1, "aggregator", moved(sent, 7))
    added = moved(10, 7).plus(moved(30, 7))
    assert log.read() == [StoredTraffic(1, "aggregator", added), StoredTraffic(1, "pi1", moved(30, 7))]


class Reports:
    """One agent's telemetry at the door."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now = 0.0
        self.presence = Presence(
            store=store,
            enrolled=lambda _: True,
            encoding="float32",
            on_gone=lambda _: None,
            on_back=lambda _: None,
        )
        birth = AgentState(state="online", session=SESSION, capabilities=ABLE)
        self.presence.state("pi1", encode_json(birth), retained=False)

    def say(
        self, number: int, traffic: Traffic, *, after_s: float, run: str | None = None, session: str = SESSION
    ) -> None:
        self.now += after_s
        telemetry = Telemetry(
            session=session,
            phase="idle",
            uptime_s=self.now,
            cpu_percent=0,
            process_mb=1,
            available_mb=1,
            disk_free_mb=1,
            total=traffic,
            traffic=RoundTraffic(run=run or self.store.run, round=number, moved=traffic),
        )
        self.presence.telemetry("pi1", encode_json(telemetry), self.now)

    @property
    def kept(self) -> dict[int, Traffic]:
        return {entry.round: entry.moved for entry in TrafficLog(self.store).read()}


def test_a_rounds_bytes_are_kept_even_right_after_another_report(store: Store) -> None:
    reports = Reports(store)
    reports.say(1, moved(10, 20), after_s=100)
    reports.say(2, moved(30, 40), after_s=TELEMETRY_INTERVAL_S / 10)
    assert reports.kept == {1: moved(10, 20), 2: moved(30, 40)}
    (agent,) = store.agents()
    assert agent.telemetry is not None
    assert agent.telemetry.total == moved(10, 20), "the rest of a report that comes so soon is not written"
    reports.say(2, moved(35, 40), after_s=TELEMETRY_INTERVAL_S)
    assert reports.kept[2] == moved(35, 40)


def test_a_flood_of_corrections_is_written_at_the_pace_of_reports(store: Store) -> None:
    reports = Reports(store)
    reports.say(2, moved(10, 20), after_s=100)
    for sent in range(20):
        reports.say(2, moved(100 + sent, 20), after_s=TELEMETRY_INTERVAL_S / 100)
    assert reports.kept == {2: moved(10, 20)}


def test_bytes_of_rounds_that_never_were_are_ignored(store: Store) -> None:
    reports = Reports(store)
    reports.say(3, moved(10, 20), after_s=100)
    reports.say(1, moved(10, 20), after_s=100, run="0" * 16)
    reports.say(1, moved(10, 20), after_s=100, session="0" * 16)
    assert reports.kept == {}
    reports.say(1, moved(10, 20), after_s=100)
    assert reports.kept == {1: moved(10, 20)}


def test_only_agents_that_count_and_have_not_told_yet_are_waited_for(store: Store) -> None:
    reports = Reports(store)
    everybody = frozenset({"pi1", "pi2"})
    assert not reports.presence.owes_account(2, everybody), "nobody has said that it counts"
    reports.say(1, moved(10, 20), after_s=100)
    assert reports.presence.owes_account(2, everybody)
    assert not reports.presence.owes_account(1, everybody)
    assert not reports.presence.owes_account(2, frozenset({"pi2"}))
    death = AgentState(state="offline", session=SESSION)
    reports.presence.state("pi1", encode_json(death), retained=False)
    assert not reports.presence.owes_account(2, everybody), "it is gone"


def test_the_watch_counts_the_servers_bytes_while_a_round_is_open(store: Store, link: MemoryLink) -> None:
    log = TrafficLog(store)
    watch = Watch(log, link, list)
    link.publish("before", bytes(1000))
    watch.opened(1)
    began = link.traffic
    link.publish("during", bytes(500))
    watch.look(0.0)
    assert log.read() == [StoredTraffic(1, "aggregator", link.traffic.since(began))]
    link.publish("during", bytes(500))
    watch.look(ACCOUNT_S / 2)
    assert log.read() != [StoredTraffic(1, "aggregator", link.traffic.since(began))], "not yet written"
    watch.opened(1)  # announced again: the same round goes on
    watch.closed()
    total = link.traffic.since(began)
    assert total.sent_payload_bytes == 1000
    assert log.read() == [StoredTraffic(1, "aggregator", total)]
    link.publish("after", bytes(1000))
    watch.closed()
    watch.look(10 * ACCOUNT_S)
    assert log.read() == [StoredTraffic(1, "aggregator", total)]


def test_a_second_process_adds_the_rest_of_a_round(store: Store, link: MemoryLink) -> None:
    log = TrafficLog(store)
    for size in (300, 400):
        watch = Watch(log, link, list)
        watch.opened(2)
        link.publish("part", bytes(size))
        watch.closed()
    (entry,) = log.read()
    assert (entry.round, entry.moved.sent_payload_bytes) == (2, 700)


def test_uploads_in_progress_are_shown_and_logged_sparingly(store: Store, link: MemoryLink) -> None:
    uploads: list[Progress] = []
    log = TrafficLog(store)
    log.show_uploads([Progress("ghost", 1, 2)])
    watch = Watch(log, link, lambda: list(uploads))
    assert log.uploads() == [], "what a killed process left"
    with capture_logs() as lines:
        now = 0.0
        while now <= 2 * PROGRESS_LOG_S:
            uploads[:] = [Progress("pi1", round(now), 40), Progress("pi2", 0, 8)]
            watch.look(now)
            assert watch.due == now + WATCH_S
            assert log.uploads() == [StoredUpload("pi1", round(now), 40), StoredUpload("pi2", 0, 8)]
            now += WATCH_S
        uploads.clear()
        watch.look(now)
    assert log.uploads() == []
    assert [(line["event"], line["received"], line["total"]) for line in lines] == [
        ("updates_arriving", 10, 48),
        ("updates_arriving", 20, 48),
    ]


def test_status_shows_bytes_and_progress(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    log = TrafficLog(store)
    reports = Reports(store)
    reports.say(1, moved(150_000, 800_000), after_s=100)
    reports.say(2, moved(190_000, 750_000), after_s=100)
    log.record(2, "pi2", moved(10_000, 50_000))
    log.add(2, "aggregator", moved(900_000, 70_000))
    log.show_uploads([Progress("pi1", 3, 8)])
    report = collect(store.folder)
    assert report.rounds[1].agents_moved == moved(190_000, 750_000).plus(moved(10_000, 50_000))
    assert report.rounds[1].server_moved == moved(900_000, 70_000)
    (agent,) = report.agents
    assert agent["last_round"]["round"] == 2
    assert agent["last_round"]["moved"]["sent_bytes"] == 190_000
    assert agent["all_rounds"]["received_bytes"] == 1_550_000
    assert agent["upload"] == {"agent": "pi1", "received": 3, "total": 8}
    shown = render(report)
    for part in ("200/800", "190/750", "0.2/0.8", "idle 3/8 chunks"):
        assert part in shown, shown
