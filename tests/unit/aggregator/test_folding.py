"""Averaging: exact, in any order, with equal bits after every interruption, and without what the disk has changed."""

from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.folding import Down, Fold, FoldResult
from aggregator.records import StoredUpdate, StoredVersion
from aggregator.store import Store
from aggregator.strategies import FedAvg
from federation.errors import VerificationError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.codec import encode, schema_of
from federation.wire.messages import TaskSpec, TrainMetrics
from federation.wire.versions import apply_delta, model_digest

TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
INFO = CheckpointInfo(federation="garden", round=1, task=TASK)
BASE = {
    "b": np.array([0.25], dtype=np.float32),
    "w": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32),
}
SCHEMA = schema_of(BASE)
FULL = Down("full", max_noise=0.0, seed=0)
DOWN = Down("sq:4", max_noise=0.03, seed=0)
SAMPLES = {"pi1": 10, "pi2": 30, "pi3": 60}


def delta_of(agent: str) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(SAMPLES[agent])
    return {name: rng.normal(size=array.shape).astype(np.float32) for name, array in BASE.items()}


Updates = dict[str, StoredUpdate]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state", "garden", create=True)
    store.write_checkpoint(0, checkpoint_bytes(INFO, BASE))
    return store


@pytest.fixture
def updates(store: Store) -> Updates:
    stored = {}
    for agent, samples in SAMPLES.items():
        path = store.update_path(1, agent)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(delta_of(agent), "float32", np.random.default_rng(0)))
        metrics = TrainMetrics(loss=0.0, accuracy=0.0, steps=1, train_s=0.0)
        stored[agent] = StoredUpdate(agent, "0" * 64, path.stat().st_size, samples, metrics, path)
    return stored


def expected(*agents: str) -> dict[str, NDArray[np.float32]]:
    model = {}
    for name, value in BASE.items():
        mean = np.zeros(value.shape, np.float64)
        for agent in agents:
            mean += SAMPLES[agent] * delta_of(agent)[name].astype(np.float64)
        model[name] = (value + mean / sum(SAMPLES[agent] for agent in agents)).astype(np.float32)
    return model


def new_fold(store: Store) -> Fold:
    return Fold(store, INFO, SCHEMA, "float32")


def fold(store: Store, updates: Mapping[str, StoredUpdate], down: Down = FULL) -> FoldResult:
    """All at once, as after a restart."""
    return new_fold(store).close(updates, FedAvg(), down)


def written(store: Store) -> tuple[bytes, bytes]:
    """What a fold leaves on the disk: the checkpoint, and the delta if there is one."""
    delta = store.delta_path(1)
    return store.checkpoint_path(1).read_bytes(), delta.read_bytes() if delta.exists() else b""


def test_the_weighted_mean_is_added_to_the_base(store: Store, updates: Updates) -> None:
    result = fold(store, updates)
    info, arrays = read_checkpoint(result.path)
    assert (info, result.damaged) == (INFO, ())
    for name, array in expected(*SAMPLES).items():
        np.testing.assert_array_equal(arrays[name], array)
    assert result.version == StoredVersion(model_digest(arrays), "full")
    assert not store.delta_path(1).exists()


@pytest.mark.parametrize("encoding", ["sq:4", "sq:16", "int8", "float16", "float32"])
def test_the_new_version_is_what_devices_make_of_the_delta(
    store: Store, updates: Updates, encoding: str
) -> None:
    result = fold(store, updates, Down(encoding, max_noise=0.03, seed=5))
    _, model = read_checkpoint(result.path)
    _, base = read_checkpoint(store.checkpoint_path(0))
    theirs = apply_delta(base, store.delta_path(1).read_bytes(), encoding)
    assert {name: array.tobytes() for name, array in model.items()} == {
        name: array.tobytes() for name, array in theirs.items()
    }
    assert result.version == StoredVersion(model_digest(theirs), encoding)


@pytest.mark.parametrize("share", [0.001, 0.03])
def test_the_noise_on_the_way_down_is_bounded_by_the_weights(
    store: Store, updates: Updates, share: float
) -> None:
    fold(store, updates, Down("sq:16", max_noise=share, seed=5))
    _, model = read_checkpoint(store.checkpoint_path(1))
    exact = expected(*SAMPLES)["w"].astype(np.float64)
    change = exact - BASE["w"]
    bound = share * max(np.mean(BASE["w"].astype(np.float64) ** 2), np.mean(change**2))
    # 4,096 values: their mean square error is within a tenth of its expectation.
    assert np.mean((model["w"] - exact) ** 2) <= 1.1 * bound


@pytest.mark.parametrize("before", range(len(SAMPLES) + 1))
def test_whatever_the_order_and_however_many_were_taken_up_before_the_close_the_bits_are_the_same(
    store: Store, updates: Updates, before: int
) -> None:
    fold(store, updates, DOWN)
    at_once = written(store)
    for order in permutations(SAMPLES):
        work = new_fold(store)
        for agent in order[:before]:
            work.add(updates[agent])
            work.add(updates[agent])  # a round that is extended announces again what it has
        work.close({agent: updates[agent] for agent in order}, FedAvg(), DOWN)
        assert written(store) == at_once


@pytest.mark.parametrize("step", ["write_delta", "write_checkpoint"])
def test_a_fold_that_was_cut_off_is_repeated_with_the_same_bits(
    store: Store, updates: Updates, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fold(store, updates, DOWN)
    undisturbed = written(store)
    store.checkpoint_path(1).unlink()
    store.delta_path(1).unlink()

    def power_cut(*_: object) -> None:
        raise ConnectionAbortedError

    with monkeypatch.context() as patched:
        patched.setattr(Store, step, power_cut)
        with pytest.raises(ConnectionAbortedError):
            fold(store, updates, DOWN)
    assert not store.checkpoint_path(1).exists()
    assert store.delta_path(1).exists() == (step == "write_checkpoint")
    fold(store, updates, DOWN)
    assert written(store) == undisturbed


def test_other_rounds_and_other_seeds_are_rounded_otherwise(store: Store, updates: Updates) -> None:
    def delta(seed: int) -> bytes:
        fold(store, updates, Down("sq:4", max_noise=0.0, seed=seed))
        return store.delta_path(1).read_bytes()

    assert delta(1) == delta(1)
    assert delta(1) != delta(2)


def test_an_update_that_is_taken_back_leaves_no_trace(store: Store, updates: Updates) -> None:
    """The averaging may have taken up more than the round closes with."""
    work = new_fold(store)
    for update in updates.values():
        work.add(update)
    left = {agent: updates[agent] for agent in ("pi1", "pi3")}
    result = work.close(left, FedAvg(), FULL)
    for name, array in expected("pi1", "pi3").items():
        np.testing.assert_array_equal(read_checkpoint(result.path)[1][name], array)


@pytest.mark.parametrize("early", [True, False], ids=["as it arrives", "at the close"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_an_update_that_the_disk_has_changed_is_left_out_and_named(
    damage: str, early: bool, store: Store, updates: Updates
) -> None:
    path = updates["pi2"].path
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    work = new_fold(store)
    if early:
        work.add(updates["pi2"])
    result = work.close(updates, FedAvg(), FULL)
    assert result.damaged == ("pi2",)
    for name, array in expected("pi1", "pi3").items():
        np.testing.assert_array_equal(read_checkpoint(result.path)[1][name], array)


def test_updates_that_change_nothing_make_the_same_version_again(store: Store, updates: Updates) -> None:
    for update in updates.values():
        nothing = {name: np.zeros_like(array) for name, array in BASE.items()}
        update.path.write_bytes(encode(nothing, "float32", np.random.default_rng(0)))
    assert fold(store, updates, DOWN).version.digest == model_digest(BASE)


def test_with_no_update_left_nothing_is_written(store: Store, updates: Updates) -> None:
    for update in updates.values():
        update.path.unlink()
    with pytest.raises(VerificationError, match=r"none of the 3 updates of round 1 .* check the disk"):
        fold(store, updates, DOWN)
    assert not store.checkpoint_path(1).exists()
    assert not store.delta_path(1).exists()
