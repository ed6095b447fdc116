"""Averaging from the disk: exact, in order, and what happens when the disk has changed an update."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.folding import fold
from aggregator.records import StoredUpdate
from aggregator.store import Store
from aggregator.strategies import FedAvg
from federation.errors import VerificationError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.codec import encode
from federation.wire.messages import TaskSpec, TrainMetrics

TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
INFO = CheckpointInfo(federation="garden", round=1, task=TASK)
BASE = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([0.25], dtype=np.float32),
}
SAMPLES = {"pi1": 10, "pi2": 30, "pi3": 60}


def delta_of(agent: str) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(SAMPLES[agent])
    return {name: rng.normal(size=array.shape).astype(np.float32) for name, array in BASE.items()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state", "garden", create=True)
    store.write_checkpoint(0, checkpoint_bytes(INFO, BASE))
    return store


@pytest.fixture
def updates(store: Store) -> dict[str, StoredUpdate]:
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


def test_the_weighted_mean_is_added_to_the_base(store: Store, updates: dict[str, StoredUpdate]) -> None:
    result = fold(store, INFO, updates, "float32", FedAvg())
    info, arrays = read_checkpoint(result.path)
    assert (info, result.damaged) == (INFO, ())
    for name, array in expected(*SAMPLES).items():
        np.testing.assert_array_equal(arrays[name], array)


def test_again_gives_the_same_bytes(store: Store, updates: dict[str, StoredUpdate]) -> None:
    first = fold(store, INFO, updates, "float32", FedAvg()).path.read_bytes()
    assert fold(store, INFO, updates, "float32", FedAvg()).path.read_bytes() == first


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_an_update_that_the_disk_has_changed_is_left_out_and_named(
    damage: str, store: Store, updates: dict[str, StoredUpdate]
) -> None:
    path = updates["pi2"].path
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    result = fold(store, INFO, updates, "float32", FedAvg())
    assert result.damaged == ("pi2",)
    for name, array in expected("pi1", "pi3").items():
        np.testing.assert_array_equal(read_checkpoint(result.path)[1][name], array)


def test_with_no_update_left_nothing_is_written(store: Store, updates: dict[str, StoredUpdate]) -> None:
    for update in updates.values():
        update.path.unlink()
    with pytest.raises(VerificationError, match=r"none of the 3 updates of round 1 .* check the disk"):
        fold(store, INFO, updates, "float32", FedAvg())
    assert not store.checkpoint_path(1).exists()
