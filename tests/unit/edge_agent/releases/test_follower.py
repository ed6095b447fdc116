"""edge_agent.releases.follower: over a link in memory, with real slots, real self-tests and a real loop over frames."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import structlog
from memory_link import MemoryBroker
from release_authority import Authority, blind_to_white, good, key_of
from stations import AGENT, TOPICS, MemoryServer, Pictures, Station, bundle_of, options_of

from edge_agent.releases import follower as follower_module
from edge_agent.releases.follower import Follower
from edge_agent.releases.options import FollowerOptions
from edge_agent.releases.rollout_memory import FILE
from federation.errors import ReleaseFault
from federation.task.model_delta import make_delta
from federation.wire.predictions import PredictionMessage
from federation.wire.release import Channel, RolloutState
from federation.wire.signing import public_key_hex

Start = Callable[..., Station]

CONFIRMED, PROBATION = RolloutState.CONFIRMED, RolloutState.PROBATION


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(MemoryBroker(), Authority())


@pytest.fixture
def start(tmp_path: Path, server: MemoryServer) -> Iterator[Start]:
    """Start the device, or its next life."""
    alive: list[Station] = []

    def begin(options: FollowerOptions | None = None, **more: object) -> Station:
        for former in alive:
            former.stop()
        station = Station(tmp_path / "models", server.authority, server.broker.make_link, options, **more)  # type: ignore[arg-type]
        alive[:] = [station.start()]
        return station

    yield begin
    for station in alive:
        station.stop()


def kept(folder: Path) -> dict[str, object]:
    memory: dict[str, object] = msgspec.json.decode((folder / "models" / FILE).read_bytes())
    return memory


def test_releases_come_over_the_broker_and_take_over_between_two_frames(
    server: MemoryServer, start: Start, tmp_path: Path
) -> None:
    first = server.make(1, good(tmp_path, 1))
    server.seed(first)
    server.announce(first)
    station = start()
    server.hears(1, CONFIRMED)
    second_files = good(tmp_path, 2)
    delta = make_delta(server.authority.objects[first.model.sha256], second_files.model)
    second = server.make(2, second_files, delta=(first.model.sha256, delta))
    server.seed(second, without=server.chunk_topics(second.model))
    server.announce(second)
    station.runs(2)
    report = server.hears(2, CONFIRMED)
    assert report.running == 2
    assert report.frames >= 5
    assert station.lost() == set()
    assert not station.seen.problems
    assert [state for number, state, _ in server.heard() if number == 2] == [
        RolloutState.FETCHING,
        RolloutState.TESTING,
        PROBATION,
        CONFIRMED,
    ]
    state = server.shows(lambda state: "confirmed" in state.state, "confirmed")
    assert (state.installed_version, state.latest_version, state.in_progress) == ("2", "2", False)
    assert server.link().filters.keys() == {
        TOPICS.model(AGENT),
        TOPICS.release("stable"),
        TOPICS.release("canary"),
    }, "chunks are not subscribed any more"
    # The next life needs no broker and no test to go on.
    server.broker.retained.clear()
    start().runs(2)
    assert server.hears(2, CONFIRMED).running == 2


def test_a_release_that_fails_in_operation_gives_way_to_the_one_before_and_never_comes_back(
    server: MemoryServer, start: Start, tmp_path: Path
) -> None:
    first = server.make(1, good(tmp_path, 1))
    server.seed(first)
    server.announce(first)
    pictures = Pictures()
    station = start(options_of(probation_s=0.1), pictures=pictures)
    server.hears(1, CONFIRMED)
    bad = server.make(2, blind_to_white(tmp_path, 2))
    server.seed(bad)
    server.announce(bad)
    pictures.values = (20, 255)
    report = server.hears(2, RolloutState.ROLLED_BACK, ReleaseFault.NON_FINITE)
    assert report.running == 1
    station.runs(1)
    assert station.lost() == set()
    server.announce(bad)
    server.hears(2, RolloutState.REFUSED, ReleaseFault.QUARANTINED)
    station = start()
    station.runs(1)
    server.shows(lambda state: state.online and state.installed_version == "1", "the first release")


def test_a_corrupt_chunk_is_waited_for_and_a_lost_link_costs_nothing(
    server: MemoryServer, start: Start, tmp_path: Path
) -> None:
    release = server.make(1, good(tmp_path, 1))
    server.seed(release)
    topic = TOPICS.object_chunk(release.model.sha256, 0)
    right = server.broker.retained[topic]
    server.publish(topic, b"\0" * len(right))
    server.announce(release)
    station = start()
    server.hears(1, RolloutState.FETCHING)
    server.broker.cut(server.link())
    server.broker.restore(server.link())
    server.publish(topic, right)
    station.runs(1)
    server.hears(1, CONFIRMED)


@pytest.mark.parametrize(
    ("forge", "fault"),
    [
        (lambda server, manifest: server.authority.sign(manifest)[:-1] + b"\0", ReleaseFault.BAD_SIGNATURE),
        (lambda server, manifest: server.authority.sign(manifest)[:-9], ReleaseFault.MALFORMED),
        (
            lambda server, manifest: server.authority.sign(manifest, key=key_of("stranger")),
            ReleaseFault.BAD_SIGNATURE,
        ),
        (
            lambda server, manifest: server.authority.sign(manifest, federation="house"),
            ReleaseFault.WRONG_FEDERATION,
        ),
        (
            lambda server, _: server.authority.sign(server.authority.manifest(None, Channel.CANARY)),
            ReleaseFault.MALFORMED,
        ),
    ],
    ids=["tampered", "cut off", "a stranger", "another federation", "another channel"],
)
def test_a_manifest_that_is_not_for_this_device_is_shown_and_not_followed(
    server: MemoryServer,
    start: Start,
    forge: Callable[[MemoryServer, object], bytes],
    fault: ReleaseFault,
) -> None:
    release = server.authority.release(1)
    server.seed(release)
    server.publish(TOPICS.release("stable"), forge(server, server.authority.manifest(release)))
    start()
    state = server.shows(lambda state: fault.value in state.state, fault.value)
    assert not state.in_progress
    assert not server.reports()
    assert not any("object" in topic for topic, _ in server.link().heard)


def test_keys_rotate_on_disk_before_anything_else_and_the_former_key_counts_no_more(
    server: MemoryServer, start: Start, tmp_path: Path
) -> None:
    authority = server.authority
    third = key_of("third")
    rotated = authority.sign(authority.manifest(None, next_key=third), key=authority.successor)
    server.publish(TOPICS.release("stable"), rotated)
    start()
    keys = [public_key_hex(authority.successor), public_key_hex(third)]
    server.shows(lambda _: (tmp_path / "models" / FILE).exists(), "the memory")
    server.shows(lambda _: kept(tmp_path)["keys"] == keys, "the new keys on disk")
    start()
    server.announce(None)
    state = server.shows(lambda state: "refused" in state.state, "refused")
    assert "bad_signature" in state.state


def test_a_disk_that_does_not_take_the_keys_holds_the_release_back_until_it_does(
    server: MemoryServer, start: Start, tmp_path: Path
) -> None:
    authority = server.authority
    folder = tmp_path / "models"
    (folder / FILE).mkdir(parents=True)  # nothing can be renamed to it
    rotated = authority.sign(authority.manifest(authority.release(1)), key=authority.successor)
    server.publish(TOPICS.release("stable"), rotated)
    with structlog.testing.capture_logs() as logs:
        start()
        server.shows(lambda _: any(line["event"] == "keys_not_pinned" for line in logs), "a full disk")
        assert not server.reports()
        (folder / FILE).rmdir()
        server.hears(1, RolloutState.FETCHING)
    assert kept(tmp_path)["keys"] == [public_key_hex(authority.successor)] * 2


def test_without_a_broker_the_current_model_runs_and_predictions_are_left(
    server: MemoryServer, start: Start, tmp_path: Path
) -> None:
    release = server.make(1, good(tmp_path, 1))
    server.seed(release)
    server.announce(release)
    station = start()
    server.hears(1, CONFIRMED)
    server.broker.cut(server.link())
    before = len(station.seen.predictions)
    server.shows(lambda _: len(station.seen.predictions) > before + 5, "labels go on")
    message = PredictionMessage(label="dark", confidence=1.0, top=(), source="1", latency_ms=1.0, time=1.0)
    station.follower.publish_prediction(message)
    assert not any(topic == TOPICS.predictions(AGENT) for _, topic, _ in server.broker.log)


def test_a_last_will_of_an_earlier_life_is_answered(server: MemoryServer, start: Start) -> None:
    start()
    mine = server.shows(lambda state: state.online, "online")
    will = msgspec.structs.replace(mine, session="0" * 16, online=False)
    server.publish(TOPICS.model(AGENT), msgspec.json.encode(will))
    server.shows(lambda state: state.online and state.session == mine.session, "online again")


def test_the_goodbye_is_on_the_broker(server: MemoryServer, start: Start) -> None:
    station = start()
    server.shows(lambda state: state.online, "online")
    station.follower.stop()
    state = server.state()
    assert state is not None
    assert not state.online


def test_a_failure_that_nobody_foresaw_is_told_and_begun_anew(
    server: MemoryServer, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "RESTART_S", 0.05)
    release = server.make(1, good(tmp_path, 1))
    server.seed(release)
    server.announce(release)
    failures: list[str] = []

    def install(engine: object, release: object) -> None:
        if not failures:
            failures.append("once")
            raise RuntimeError("nobody foresaw this")
        station.loop.install(engine, release)  # type: ignore[arg-type]

    with structlog.testing.capture_logs() as logs:
        station = start(install=install)
        station.runs(1)
    assert any(line["event"] == "follower_failed" for line in logs)


def test_home_assistant_is_told_only_where_predictions_are_sent(server: MemoryServer, start: Start) -> None:
    start(options_of(publish=True))
    topics = [
        TOPICS.discovery_config("sensor", AGENT, "label"),
        TOPICS.discovery_config("update", AGENT, "model"),
    ]
    server.shows(lambda _: all(topic in server.broker.retained for topic in topics), "discovery")
    server.broker.retained.clear()
    start(options_of(publish=True, home_assistant=False))
    server.shows(lambda state: state.online, "online")
    start(options_of())
    server.shows(lambda state: state.online, "online")
    assert not any(topic.startswith("homeassistant") for topic in server.broker.retained)


def test_a_device_with_a_model_of_its_own_follows_nothing(server: MemoryServer, start: Start) -> None:
    station = start()
    station.follower.stop()
    lonely = Follower(
        bundle_of(server.authority),
        None,
        options_of(publish=True),
        install=station.loop.install,
        health=station.loop.health,
        make_link=server.broker.make_link,
    )
    lonely.start()
    try:
        server.shows(lambda state: state.online and "owner" in state.state, "online")
        assert set(server.link().filters) == {TOPICS.model(AGENT)}
    finally:
        lonely.stop()
