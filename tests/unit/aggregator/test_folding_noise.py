"""Folds with client-level privacy: one update moves the model by C / n at most, and no sum is shown with two noises."""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from aggregator.central_noise import CentralNoise
from aggregator.config import AggregatorConfig
from aggregator.folding import Down, Fold, FoldResult
from aggregator.privacy_config import ClientConfig, PrivacyConfig
from aggregator.records import StoredUpdate
from aggregator.round_noise import noisy_rounds
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
    "b": np.full(3, 0.25, np.float32),
    "scale": np.array(0.5, np.float32),
    "w": np.zeros((80, 80), np.float32),
}
SCHEMA = schema_of(BASE)
FULL = Down("full", max_noise=0.0, seed=0)
DOWN = Down("sq:4", max_noise=0.03, seed=0)
CLIP_NORM = 0.5
TINY = 1e-5
"""A noise multiplier that leaves what is clipped visible."""

Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state", "garden", create=True)
    store.write_checkpoint(0, checkpoint_bytes(INFO, BASE))
    return store


def delta_of(seed: int, norm: float) -> Arrays:
    rng = np.random.default_rng(seed)
    delta = {name: rng.standard_normal(array.shape) for name, array in BASE.items()}
    length = math.sqrt(sum(float(np.sum(array**2)) for array in delta.values()))
    return {name: (array * norm / length).astype(np.float32) for name, array in delta.items()}


def put(store: Store, **deltas: Arrays) -> dict[str, StoredUpdate]:
    stored = {}
    for samples, (agent, delta) in enumerate(deltas.items(), 1):
        path = store.update_path(1, agent)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(delta, "float32", np.random.default_rng(0)))
        metrics = TrainMetrics(loss=None, accuracy=None, steps=1, train_s=0.0)
        stored[agent] = StoredUpdate(agent, "0" * 64, path.stat().st_size, 10**samples, metrics, path)
    return stored


def paid(store: Store, noise_multiplier: float, *, quantile: float = 0.0) -> CentralNoise:
    client = ClientConfig(
        noise_multiplier=noise_multiplier, clip_norm=CLIP_NORM, quantile=quantile, epsilon=1e12
    )
    noise = CentralNoise(AggregatorConfig(privacy=PrivacyConfig(client=client)), store)
    if not noisy_rounds(store):
        noise.open(1, SCHEMA, wanted=4, online=4)
    return noise


def fold(
    store: Store,
    updates: dict[str, StoredUpdate],
    noise_multiplier: float,
    down: Down = FULL,
    *,
    quantile: float = 0.0,
) -> FoldResult:
    noise = paid(store, noise_multiplier, quantile=quantile).of_round(1)
    return Fold(store, INFO, SCHEMA, "float32", noise, equal=True).close(updates, FedAvg(), down)


def change(store: Store) -> dict[str, NDArray[np.float64]]:
    _, model = read_checkpoint(store.checkpoint_path(1))
    return {name: model[name].astype(np.float64) - BASE[name] for name in BASE}


def norm_of(arrays: dict[str, NDArray[np.float64]]) -> float:
    return math.sqrt(sum(float(np.sum(array**2)) for array in arrays.values()))


def test_updates_are_clipped_and_weigh_the_same_whatever_samples_they_claim(store: Store) -> None:
    deltas = {"pi1": delta_of(1, 0.4), "pi2": delta_of(2, 3.0)}
    fold(store, put(store, **deltas), TINY)
    for name, array in change(store).items():
        expected = (deltas["pi1"][name] + deltas["pi2"][name] * (CLIP_NORM / 3.0)) / 4
        np.testing.assert_allclose(array, expected, atol=1e-5)


@pytest.mark.parametrize("norm", [1.0, 1e3, 1e15])
def test_an_update_of_any_norm_moves_the_model_by_the_clip_norm_over_n_at_most(
    store: Store, norm: float
) -> None:
    fold(store, put(store, pi1=delta_of(1, norm)), TINY)
    assert norm_of(change(store)) == pytest.approx(CLIP_NORM / 4, rel=1e-3)


@pytest.mark.parametrize("down", [FULL, Down("float32", max_noise=0.0, seed=0)])
def test_the_noise_is_as_large_as_was_paid_for(store: Store, down: Down) -> None:
    fold(store, put(store, pi1={name: np.zeros_like(array) for name, array in BASE.items()}), 2.0, down)
    noise = change(store)["w"].ravel() / (2.0 * CLIP_NORM / 4)
    assert stats.kstest(noise, "norm").pvalue > 1e-7


def test_a_round_of_nobody_is_noise_alone(store: Store) -> None:
    result = fold(store, {}, 2.0)
    assert result.damaged == ()
    assert norm_of(change(store)) == pytest.approx(2.0 * CLIP_NORM / 4 * math.sqrt(6404), rel=0.06)


def test_updates_of_which_none_can_be_read_are_no_round_of_nobody(store: Store) -> None:
    updates = put(store, pi1=delta_of(1, 1.0))
    updates["pi1"].path.unlink()
    with pytest.raises(VerificationError, match="check the disk"):
        fold(store, updates, 2.0)


def test_the_version_is_what_devices_make_of_the_noisy_delta(store: Store) -> None:
    result = fold(store, put(store, pi1=delta_of(1, 1.0)), 2.0, DOWN)
    theirs = apply_delta(BASE, store.delta_path(1).read_bytes(), "sq:4")
    assert result.version.digest == model_digest(theirs)
    assert model_digest(read_checkpoint(result.path)[1]) == result.version.digest


@pytest.mark.parametrize("down", [FULL, DOWN])
def test_a_fold_that_is_repeated_after_its_model_was_named_keeps_that_model(store: Store, down: Down) -> None:
    """Killed between the fold and the close: the model may have been seen."""
    updates = put(store, pi1=delta_of(1, 1.0), pi2=delta_of(2, 1.0))
    first = fold(store, updates, 2.0, down, quantile=0.5)
    seen = first.path.read_bytes()
    clip_norm = noisy_rounds(store)[0].next_clip_norm
    # The settings may have changed since: the delta that leads to it has not.
    again = fold(store, updates, 2.0, Down("int8", max_noise=0.0, seed=9), quantile=0.5)
    assert again.version == first.version
    assert again.path.read_bytes() == seen
    (round_1,) = noisy_rounds(store)
    assert round_1.next_clip_norm == clip_norm


@pytest.mark.parametrize("step", ["write_delta", "write_checkpoint"])
def test_a_fold_that_was_cut_off_before_its_model_was_named_draws_new_noise(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    updates = put(store, pi1=delta_of(1, 1.0))

    def power_cut(*_: object) -> None:
        raise ConnectionAbortedError

    with monkeypatch.context() as patched:
        patched.setattr(Store, step, power_cut)
        with pytest.raises(ConnectionAbortedError):
            fold(store, updates, 2.0, DOWN)
    assert not store.checkpoint_path(1).exists()
    (announced,) = noisy_rounds(store)
    result = fold(store, updates, 2.0, DOWN)
    (kept,) = noisy_rounds(store)
    assert announced.digest is not None
    assert kept.digest == result.version.digest != announced.digest
    theirs = apply_delta(BASE, store.delta_path(1).read_bytes(), "sq:4")
    assert result.version.digest == model_digest(theirs), "the delta of the first noise is overwritten"


def test_a_model_of_a_former_run_is_not_taken_for_this_rounds(store: Store) -> None:
    updates = put(store, pi1=delta_of(1, 1.0))
    former = fold(store, updates, 2.0).version
    store.begin_run()
    paid(store, 2.0).open(1, SCHEMA, wanted=4, online=4)
    assert fold(store, updates, 2.0).version != former


def test_nothing_is_named_before_it_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is on the disk when the checkpoint gets its name."""
    kept: list[str | None] = []
    write = Store.write_checkpoint

    def look(self: Store, number: int, data: bytes) -> Path:
        kept.append(noisy_rounds(self)[0].digest)
        return write(self, number, data)

    monkeypatch.setattr(Store, "write_checkpoint", look)
    result = fold(store, put(store, pi1=delta_of(1, 1.0)), 2.0)
    assert kept == [result.version.digest]


def test_a_plain_fold_with_terms_counts_heads(store: Store) -> None:
    deltas = {"pi1": delta_of(1, 1.0), "pi2": delta_of(2, 1.0)}
    Fold(store, INFO, SCHEMA, "float32", equal=True).close(put(store, **deltas), FedAvg(), FULL)
    for name, array in change(store).items():
        np.testing.assert_allclose(array, (deltas["pi1"][name] + deltas["pi2"][name]) / 2, atol=1e-7)
