"""aggregator.store: what was committed is there after any end of the process, and nothing else is."""

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from aggregator.records import StoredVersion
from aggregator.store import REFUSALS_KEPT, Store
from federation.errors import ConfigError, Rejection
from federation.task.model_card import HoldOutMetrics
from federation.wire.messages import AgentState, Capabilities, Telemetry, TrainMetrics, UpdateOffer
from federation.wire.transfer import make_ref

SESSION = "0" * 16
OFFER = UpdateOffer(
    run="0" * 16,
    round=1,
    base="b" * 64,
    object=make_ref(b"update" * 30, 64),
    encoding="float32",
    samples=10,
    metrics=TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=1.0),
)
VERSION = StoredVersion("d" * 64, "sq:4")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state", "home", create=True)


def again(store: Store) -> Store:
    """The store as the next process finds it."""
    return Store(store.folder, "home")


def accept(store: Store, agent: str, number: int = 1) -> Path:
    path = store.update_path(number, agent)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"update")
    store.record_update(number, agent, OFFER)
    return path


def test_a_round_from_its_opening_to_its_metrics(store: Store) -> None:
    store.open_round(1, 1, ("pi1", "pi2"), base="b" * 64, encoding="float32", deadline_s=60.0)
    accept(store, "pi2")
    accept(store, "pi1")
    updates = again(store).updates(1)
    assert list(updates) == ["pi1", "pi2"], "sorted: the order of the fold"
    assert (updates["pi1"].samples, updates["pi1"].metrics) == (10, OFFER.metrics)
    assert (updates["pi1"].sha256, updates["pi1"].bytes) == (OFFER.object.sha256, 180)
    store.open_round(1, 2, ("pi1", "pi2", "pi3"), base="b" * 64, encoding="float32", deadline_s=60.0)
    (row,) = again(store).rounds()
    assert (row.round, row.attempt, row.phase, row.cohort) == (1, 2, "open", ("pi1", "pi2", "pi3"))
    assert row.deadline_at > row.opened_at + 59
    store.start_folding(1)
    assert again(store).rounds()[0].phase == "folding"
    store.write_checkpoint(1, b"weights")
    store.close_round(1, 0.5, VERSION)
    store.record_evaluation(1, 0.25, 0.75, 1.5)
    store.write_metrics(1, HoldOutMetrics(loss=0.25, accuracy=0.75, samples=4))
    (row,) = again(store).rounds()
    assert (row.phase, row.fold_s, row.loss, row.accuracy, row.evaluate_s) == ("closed", 0.5, 0.25, 0.75, 1.5)
    assert store.checkpoint_path(1).read_bytes() == b"weights"
    assert list(store.updates(1)) == ["pi1", "pi2"], "facts are kept"
    assert not store.update_path(1, "pi1").exists(), "their files are not"


def test_an_update_counts_once(store: Store) -> None:
    store.open_round(1, 1, ("pi1",), base="b" * 64, encoding="float32", deadline_s=60.0)
    accept(store, "pi1")
    with pytest.raises(sqlite3.IntegrityError):
        store.record_update(1, "pi1", OFFER)
    assert list(again(store).updates(1)) == ["pi1"]


def store_update(store: Store) -> None:
    path = store.update_path(1, "pi1")
    path.parent.mkdir()
    path.write_bytes(b"update")


STEPS: dict[str, Callable[[Store], object]] = {
    "begun": Store.lock,
    "opened": lambda store: store.open_round(
        1, 1, ("pi1", "pi2"), base="b" * 64, encoding="float32", deadline_s=60.0
    ),
    "stored": store_update,
    "recorded": lambda store: store.record_update(1, "pi1", OFFER),
    "folding": lambda store: store.start_folding(1),
    "encoded": lambda store: store.write_delta(1, b"delta"),
    "averaged": lambda store: store.write_checkpoint(1, b"weights"),
    "closed": lambda store: store.close_round(1, 0.5, VERSION),
    "evaluated": lambda store: store.record_evaluation(1, 0.25, 0.75, 1.0),
}


def serve_and_die(folder: Path, steps: list[str]) -> None:
    store = Store(folder, "home", create=True)
    for step in steps:
        STEPS[step](store)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("last", STEPS)
def test_a_kill_after_any_step_keeps_what_was_committed(tmp_path: Path, last: str) -> None:
    steps = list(STEPS)[: list(STEPS).index(last) + 1]
    server = multiprocessing.get_context("fork").Process(target=serve_and_die, args=(tmp_path, steps))
    server.start()
    server.join()
    assert server.exitcode == -signal.SIGKILL
    with Store(tmp_path, "home") as store:
        store.lock()
        store.sweep()
        done = set(steps)
        rows = store.rounds()
        assert len(rows) == ("opened" in done)
        assert list(store.updates(1)) == (["pi1"] if "recorded" in done else [])
        assert store.update_path(1, "pi1").exists() == ("recorded" in done and "closed" not in done)
        assert store.delta_path(1).exists() == ("encoded" in done)
        assert store.checkpoint_path(1).exists() == ("averaged" in done)
        assert store.version(1) == (VERSION if "closed" in done else None)
        if rows:
            phase = "closed" if "closed" in done else "folding" if "folding" in done else "open"
            assert (rows[0].phase, rows[0].accuracy) == (phase, 0.75 if "evaluated" in done else None)


def test_the_folder_of_another_federation_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="holds the federation 'home', not 'away'"):
        Store(store.folder, "away")


def test_a_folder_that_is_no_state_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the state folder"):
        Store(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_newer_fedge_is_refused(store: Store) -> None:
    store.remember("schema", "2")
    with pytest.raises(ConfigError, match="newer fedge"):
        again(store)


def test_a_damaged_database_is_named(store: Store) -> None:
    store.close()
    (store.folder / "store.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match=r"cannot open .*store\.sqlite"):
        again(store)


def test_whether_a_folder_is_served_can_be_asked_without_disturbing_anybody(store: Store) -> None:
    with again(store) as reader:
        assert not reader.served()
        store.lock()
        assert store.served()
        assert reader.served()
        store.close()
        assert not reader.served()
        reader.lock()


def test_one_process_serves_a_folder(store: Store) -> None:
    store.lock()
    with again(store) as reader, pytest.raises(ConfigError, match="another aggregator is serving"):
        reader.lock()
    store.close()
    with again(store) as next_one:
        next_one.lock()


def test_a_run_keeps_its_name_and_its_facts(store: Store) -> None:
    store.remember("task", "one")
    store.remember("task", "two")
    with again(store) as later:
        assert (later.run, later.federation) == (store.run, "home")
        assert (later.recall("task"), later.recall("nothing")) == ("two", None)


def test_a_sweep_deletes_leftovers_only(store: Store) -> None:
    store.write_checkpoint(0, b"weights")
    store.open_round(2, 1, ("pi1", "pi2"), base="b" * 64, encoding="float32", deadline_s=60.0)
    kept = [accept(store, "pi1", 2), store.incoming_path("pi2", "c" * 64), store.checkpoint_path(0)]
    kept[1].write_bytes(b"half")
    leftovers = [store.update_path(2, "pi2"), store.update_path(1, "pi1")]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"left")
    interrupted = store.checkpoint_path(0).with_name(".round-000001.safetensors.abc")
    interrupted.write_bytes(b"half")
    store.sweep()
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in [*leftovers, interrupted])
    store.close_round(2, 0.1, VERSION)
    assert not list((store.folder / "incoming").iterdir())
    assert not list((store.folder / "updates").iterdir())


def test_a_new_upload_of_an_agent_takes_the_place_of_its_former_one_only(store: Store) -> None:
    others = [store.incoming_path(agent, "a" * 64) for agent in ("pi1", "pi10", "pi", "pi-1")]
    for path in others:
        path.write_bytes(b"x")
    store.incoming_path("pi1", "b" * 64)
    assert [path.exists() for path in others] == [False, True, True, True]


@pytest.mark.parametrize(
    ("keep", "spare", "left"),
    [
        (0, 9, [0, 1, 2, 3]),
        (1, 9, [3]),
        (2, 3, [2, 3]),
        (2, 0, [0, 2, 3]),
        (9, 0, [0, 1, 2, 3]),
    ],
)
def test_the_newest_checkpoints_and_the_spared_one_are_kept(
    store: Store, keep: int, spare: int, left: list[int]
) -> None:
    for number in range(4):
        store.write_checkpoint(number, b"weights")
        store.write_delta(number, b"delta")
        store.write_metrics(number, HoldOutMetrics(loss=0.0, accuracy=1.0, samples=1))
    store.prune_checkpoints(keep, spare=spare)
    for number in range(4):
        path = store.checkpoint_path(number)
        assert path.exists() == path.with_suffix(".json").exists() == (number in left)
        assert store.delta_path(number).exists(), "they are pruned apart"


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_the_newest_deltas_are_kept(store: Store, keep: int, left: list[int]) -> None:
    for number in range(1, 4):
        store.write_checkpoint(number, b"weights")
        store.write_delta(number, b"delta")
    store.prune_deltas(keep)
    for number in range(1, 4):
        assert store.delta_path(number).exists() == (number in left)
        assert store.checkpoint_path(number).exists()


def test_a_version_is_known_once_it_was_recorded(store: Store) -> None:
    assert store.version(1) is None
    store.record_version(1, "e" * 64, "full")
    assert again(store).version(1) == StoredVersion("e" * 64, "full")
    store.open_round(1, 1, ("pi1",), base="b" * 64, encoding="float32", deadline_s=60.0)
    store.close_round(1, 0.5, VERSION)
    assert again(store).version(1) == VERSION, "a fold that is repeated has the last word"
    assert store.version(2) is None


def test_the_folder_of_a_fedge_that_knew_no_versions_gets_a_table_for_them(store: Store) -> None:
    store.open_round(1, 1, ("pi1",), base="b" * 64, encoding="float32", deadline_s=60.0)
    store.read("DROP TABLE versions")
    store.close()
    with again(store) as later:
        assert [row.round for row in later.rounds()] == [1]
        assert later.version(0) is None
        later.close_round(1, 0.5, VERSION)
        assert later.version(1) == VERSION


def test_agents_are_kept_as_they_last_announced_themselves(store: Store) -> None:
    able = Capabilities(
        version="1", device="cpu", threads=1, memory_mb=1, samples=5, encodings=("float32",), platform="x"
    )
    health = Telemetry(
        session=SESSION, phase="idle", uptime_s=1, cpu_percent=2, process_mb=3, available_mb=4, disk_free_mb=5
    )
    store.record_agent("pi1", AgentState(state="online", session=SESSION, capabilities=able))
    store.record_telemetry("pi1", health)
    store.record_agent("pi1", AgentState(state="offline", session=SESSION))
    (agent,) = again(store).agents()
    assert (agent.agent, agent.online, agent.capabilities, agent.telemetry) == ("pi1", False, able, health)
    store.record_agent("pi1", AgentState(state="online", session=SESSION, capabilities=able))
    store.forget_presence()
    assert not again(store).agents()[0].online


def test_the_refusal_log_is_bounded_and_the_newest_come_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REFUSALS_KEPT >= 1000
    monkeypatch.setattr("aggregator.store.REFUSALS_KEPT", 5)
    for number in range(12):
        store.record_refusal(number, "pi1", Rejection.LATE, f"number {number}")
    later = again(store)
    assert [row[:4] for row in later.refusals(2)] == [
        (11, "pi1", "late", "number 11"),
        (10, "pi1", "late", "number 10"),
    ]
    assert later.refusal_counts() == {"late": 5}


def test_a_full_disk_is_named_and_nothing_is_lost(store: Store) -> None:
    store.open_round(1, 1, ("pi1",), base="b" * 64, encoding="float32", deadline_s=60.0)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ConfigError, match="full; free disk space"):
        store.remember("big", "x" * 1_000_000)
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.remember("small", "y")
    assert again(store).recall("small") == "y"
    assert again(store).recall("big") is None
    assert again(store).rounds()[0].phase == "open"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file/state"):
        Store(tmp_path / "file" / "state", "home", create=True)


def test_a_new_run_keeps_what_was_learned_and_drops_the_open_round(store: Store) -> None:
    former = store.run
    for number in (1, 2):
        store.open_round(number, 1, ("pi1",), base="b" * 64, encoding="float32", deadline_s=60.0)
        path = accept(store, "pi1", number)
        if number == 1:
            store.close_round(1, 0.1, VERSION)
    store.begin_run()
    store.sweep()
    assert not path.exists()
    later = again(store)
    assert later.run != former
    assert [(row.round, row.phase) for row in later.rounds()] == [(1, "closed")]
    assert (list(later.updates(1)), list(later.updates(2))) == (["pi1"], [])
