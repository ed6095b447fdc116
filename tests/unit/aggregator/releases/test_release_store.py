"""aggregator.releases.store: what is known of releases survives, in the order in which it must."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from releases import add_release, make_release

from aggregator.releases.records import ReleaseState, RequestKind
from aggregator.releases.reports import REPORTED_RELEASES, SESSIONS_KEPT
from aggregator.releases.store import MANIFESTS_KEPT, ReleaseStore
from aggregator.store import Store
from federation.errors import ConfigError, ReleaseFault
from federation.release import MANIFEST_FILE, MODEL_FILE, check_files
from federation.wire.predictions import ModelState
from federation.wire.release import Channel, Manifest, Release, ReleaseReport, RolloutState


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "state", "home", create=True) as store:
        yield store


@pytest.fixture
def store(database: Store) -> ReleaseStore:
    return ReleaseStore(database)


def manifest(version: int, channel: Channel, release: Release | None) -> Manifest:
    return Manifest(
        version=version,
        channel=channel,
        issued_at=1.0,
        expires_at=2.0,
        release=release,
        share=1.0 if channel is Channel.STABLE else 0.5,
        next_key=bytes(32),
    )


def report(
    number: int, *, session: str = "1" * 16, state: RolloutState = RolloutState.FETCHING
) -> ReleaseReport:
    return ReleaseReport(
        session=session, number=number, sha256="b" * 64, manifest=5, state=state, time=1.0, fault=None
    )


def test_a_release_is_moved_in_whole_and_known_to_other_processes(
    tmp_path: Path, database: Store, store: ReleaseStore
) -> None:
    assert store.next_number() == 1
    release = make_release(tmp_path / "made", 1, delta=True)
    stored = store.add(release, tmp_path / "made")
    assert stored.state is ReleaseState.STORED
    assert not list((tmp_path / "made").iterdir())
    with Store(database.folder) as other:
        again = ReleaseStore(other).release(1)
    assert again == stored
    assert again is not None
    assert again.release == release
    assert again.on_disk
    check_files(again.folder, release)
    assert [ref for _, ref in again.objects] == [
        release.model,
        release.golden,
        release.delta and release.delta.object,
    ]
    assert store.next_number() == 2


def test_a_release_that_lacks_a_file_is_refused_and_leaves_no_row(
    tmp_path: Path, store: ReleaseStore
) -> None:
    release = make_release(tmp_path / "made", 1)
    (tmp_path / "made" / MODEL_FILE).unlink()
    with pytest.raises(ConfigError, match=MODEL_FILE):
        store.add(release, tmp_path / "made")
    assert store.releases() == []
    assert store.next_number() == 1


def test_two_processes_that_make_the_same_number_do_not_overwrite_each_other(
    tmp_path: Path, store: ReleaseStore
) -> None:
    first = add_release(store, tmp_path)
    other = make_release(tmp_path / "other", 1, delta=True)
    with pytest.raises(ConfigError, match="already"):
        store.add(other, tmp_path / "other")
    check_files(first.folder, first.release)


def test_what_a_killed_process_has_left_without_a_row_gives_way(tmp_path: Path, store: ReleaseStore) -> None:
    for left_over in (store.folder(1), store.folder(1).with_name(".1")):
        left_over.mkdir(parents=True)
        (left_over / "torn").write_bytes(b"half")
    stored = add_release(store, tmp_path)
    assert sorted(path.name for path in stored.folder.parent.iterdir()) == ["1"]
    check_files(stored.folder, stored.release)


def test_states_have_reasons_and_the_release_to_go_back_to_is_found(
    tmp_path: Path, store: ReleaseStore
) -> None:
    for _ in range(5):
        add_release(store, tmp_path)
    for number in (1, 2, 3):
        store.mark(number, ReleaseState.STABLE, "")
        store.mark(number, ReleaseState.RETIRED, "")
    store.mark(3, ReleaseState.WITHDRAWN, "the operator took it back")
    store.mark(4, ReleaseState.HALTED, "2 of 3 devices")
    before = store.before(5)
    assert before is not None
    assert before.number == 2, "3 was taken back, 4 never was stable"
    halted = store.release(4)
    assert halted is not None
    assert (halted.state, halted.reason, halted.stable_at) == (ReleaseState.HALTED, "2 of 3 devices", None)
    assert store.before(1) is None


def test_versions_rise_whatever_happens_to_the_manifests_and_to_the_clock(
    database: Store, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.next_manifest_version()
    assert first >= int(time.time()) - 5, "a restored backup goes on above what it had issued"
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert store.next_manifest_version() == first + 1
    with Store(database.folder) as other:
        assert ReleaseStore(other).next_manifest_version() == first + 2


def test_the_newest_manifest_of_each_channel_is_kept(
    tmp_path: Path, database: Store, store: ReleaseStore
) -> None:
    stored = add_release(store, tmp_path)
    assert store.manifest(Channel.STABLE) is None
    store.record_manifest(manifest(1, Channel.STABLE, stored.release), b"stable")
    for version in range(2, MANIFESTS_KEPT + 50):
        store.record_manifest(manifest(version, Channel.CANARY, None), b"canary %d" % version)
    newest, stable = store.manifest(Channel.CANARY), store.manifest(Channel.STABLE)
    assert newest is not None
    assert stable is not None
    assert newest.envelope == b"canary %d" % (MANIFESTS_KEPT + 49)
    assert stable.envelope == b"stable"
    assert stable.manifest.release == stored.release
    assert (stored.folder / MANIFEST_FILE).read_bytes() == b"stable"
    assert database.read("SELECT count(*) FROM manifests").fetchone()[0] == MANIFESTS_KEPT + 1


def test_a_request_of_another_process_is_noticed_and_answered_once(
    database: Store, store: ReleaseStore
) -> None:
    assert store.changed()
    assert not store.changed()
    with Store(database.folder) as other:
        asking = ReleaseStore(other)
        asked = asking.request(RequestKind.CANARY, 7, 0.25)
        assert asking.outcome(asked) is None
        assert store.changed()
        (request,) = store.requests()
        assert (request.id, request.kind, request.number, request.share) == (
            asked,
            RequestKind.CANARY,
            7,
            0.25,
        )
        store.answer(asked, "announced")
        assert asking.outcome(asked) == "announced"
    assert store.requests() == []


def test_the_last_word_of_a_device_counts_and_is_forgotten_with_it(
    tmp_path: Path, store: ReleaseStore
) -> None:
    add_release(store, tmp_path)
    store.record_report("pi1", report(1))
    refused = msgspec.structs.replace(report(1), state=RolloutState.REFUSED, fault=ReleaseFault.TOO_SLOW)
    store.record_report("pi1", refused)
    store.record_report("pi2", report(1))
    assert {agent: row.report for agent, row in store.reports(1).items()} == {
        "pi1": refused,
        "pi2": report(1),
    }
    store.forget_follower("pi1")
    assert set(store.reports(1)) == set(store.followers()) == {"pi2"}


def test_what_devices_say_does_not_grow_without_end(
    tmp_path: Path, database: Store, store: ReleaseStore
) -> None:
    newest = REPORTED_RELEASES + 4
    store.add(make_release(tmp_path / "made", newest), tmp_path / "made")
    for number in range(1, newest + 1):
        store.record_report("pi1", report(number, session=f"{number:016x}"))
    assert database.read("SELECT count(*) FROM reports").fetchone()[0] == REPORTED_RELEASES
    sessions = store.followers()["pi1"].sessions
    assert len(sessions) == SESSIONS_KEPT
    assert sessions[-1] == f"{newest:016x}"


def test_which_model_a_device_runs_is_kept_beside_its_reports(store: ReleaseStore) -> None:
    model = ModelState(
        installed_version="3",
        latest_version="4",
        in_progress=True,
        title="home",
        online=True,
        session="2" * 16,
    )
    store.record_model("pi1", model)
    store.record_report("pi1", report(4, session="2" * 16))
    follower = store.followers()["pi1"]
    assert follower.model == model
    assert follower.sessions == ("2" * 16,)
    store.record_model("pi1", msgspec.structs.replace(model, online=False))
    assert store.followers()["pi1"].sessions == ("2" * 16,)


def test_files_of_old_releases_are_deleted_but_not_those_in_use(tmp_path: Path, store: ReleaseStore) -> None:
    for _ in range(5):
        add_release(store, tmp_path)
    store.prune(2, frozenset({1}))
    assert [row.number for row in store.releases() if row.on_disk] == [1, 4, 5]
