"""The sum of masked updates: exact, or not at all; and running variances that stay positive."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.folding import Down
from aggregator.masked_sum import MaskedFold, keep_masked, positive_variances
from aggregator.masking import Masking
from aggregator.records import StoredUpdate
from aggregator.store import Store
from aggregator.strategies import FedAvg
from federation.errors import PeerError, Rejection
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.codec import schema_of
from federation.wire.messages import TaskSpec, TrainMetrics
from federation.wire.objects import PartialObject
from federation.wire.shared_scale import SharedScale
from federation.wire.transfer import chunk_span, make_ref
from privacy.secagg.masks import apply_mask, own_mask
from privacy.secagg.unmask import UnmaskPlan

TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
AGENTS = ("a", "b", "c")
ROSTER, SEED = bytes(32), bytes(range(16))
BASE = {
    "bn.running_var": np.array([1.0, 1e-5, 0.0], np.float32),
    "fc.weight": np.linspace(-1, 1, 40, dtype=np.float32).reshape(8, 5),
}
MASKING = Masking(
    attempt=1, scale=SharedScale.of(schema_of(BASE), clip_norm=10.0, modulus_bits=16, agents=3), seed=SEED
)
METRICS = TrainMetrics(loss=None, accuracy=None, steps=1, train_s=0.0)


class Sums:
    """A store with a base model, and three masked updates."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "state", "home", create=True)
        self.info = CheckpointInfo(federation="home", round=1, task=TASK)
        self.store.write_checkpoint(0, checkpoint_bytes(self.info, BASE))
        draw = np.random.default_rng(1)
        self.plain: dict[str, NDArray[np.unsignedinteger]] = {}
        self.updates: dict[str, StoredUpdate] = {}
        for name in AGENTS:
            integers = draw.integers(-300, 300, MASKING.scale.size, np.int32)
            self.plain[name] = MASKING.scale.reduced(integers)
            vector = self.plain[name].copy()
            apply_mask(vector, own_mask(self.seed(name), ROSTER))
            path = self.store.update_path(1, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(vector.tobytes())
            self.updates[name] = StoredUpdate(name, "0" * 64, vector.nbytes, 1, METRICS, path)
        self.fold = MaskedFold(self.store, self.info, MASKING)

    @staticmethod
    def seed(name: str) -> bytes:
        return name.encode() * 32

    def plan(self, survivors: tuple[str, ...] = AGENTS) -> UnmaskPlan:
        return UnmaskPlan(ROSTER, survivors, {name: self.seed(name) for name in survivors}, {}, {})

    def mean(self, survivors: tuple[str, ...] = AGENTS) -> dict[str, NDArray[np.float32]]:
        total = np.zeros(MASKING.scale.size, MASKING.scale.dtype)
        for name in survivors:
            total += self.plain[name]
        return MASKING.scale.mean(total, SEED, len(survivors))


@pytest.fixture
def sums(tmp_path: Path) -> Sums:
    return Sums(tmp_path)


@pytest.mark.parametrize("added", [(), ("b",), ("c", "a", "b"), ("a", "a")])
@pytest.mark.parametrize("survivors", [AGENTS, ("a", "c")])
def test_the_model_is_that_of_the_plain_sum_however_it_was_taken_up(
    sums: Sums, added: tuple[str, ...], survivors: tuple[str, ...]
) -> None:
    for name in added:
        sums.fold.add(sums.updates[name])
    result = sums.fold.close(sums.updates, sums.plan(survivors), FedAvg(), Down("full", 0.0, 0))
    mean = sums.mean(survivors)
    made = read_checkpoint(result.path)[1]
    np.testing.assert_array_equal(
        made["fc.weight"], (BASE["fc.weight"] + mean["fc.weight"].astype(np.float64)).astype(np.float32)
    )


@pytest.mark.parametrize("fault", ["gone", "torn"])
def test_without_one_of_the_updates_there_is_no_sum_and_the_model_stays(sums: Sums, fault: str) -> None:
    path = sums.updates["b"].path
    if fault == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    result = sums.fold.close(sums.updates, sums.plan(), FedAvg(), Down("full", 0.0, 0))
    assert result.damaged == ("b",)
    for name, array in read_checkpoint(result.path)[1].items():
        np.testing.assert_array_equal(array, BASE[name])


def test_a_sum_that_was_given_up_takes_nothing_more(sums: Sums) -> None:
    sums.fold.abandoned = True
    sums.fold.add(sums.updates["a"])
    assert not sums.fold._sum.total.any()


def test_running_variances_stay_positive() -> None:
    change = {
        "bn.running_var": np.array([-5.0, -1e-4, -1.0]),
        "fc.weight": np.full((8, 5), -5.0),
    }
    kept = positive_variances(BASE, change)
    np.testing.assert_allclose(BASE["bn.running_var"] + kept["bn.running_var"], [0.1, 1e-6, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(kept["fc.weight"], change["fc.weight"])


@pytest.mark.parametrize("beyond", [-2, 2])
def test_a_masked_update_of_another_length_is_refused(tmp_path: Path, beyond: int) -> None:
    data = bytes(MASKING.bytes + beyond)
    ref = make_ref(data, 64)
    partial = PartialObject(tmp_path / "part", ref)
    for index in range(ref.chunks):
        offset, length = chunk_span(ref, index)
        partial.write(index, data[offset : offset + length])
    with pytest.raises(PeerError) as refused:
        keep_masked(partial, tmp_path / "update", MASKING)
    assert refused.value.code is Rejection.WRONG_LENGTH
    assert not (tmp_path / "update").exists()
