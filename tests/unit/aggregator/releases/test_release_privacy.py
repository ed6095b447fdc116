"""aggregator.releases.privacy: what a release says that training has cost, or that it says nothing."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from aggregator.records import StoredVersion
from aggregator.releases.privacy import privacy_of
from aggregator.store import Store
from federation.wire.messages import TrainMetrics, UpdateOffer
from federation.wire.release import ReleasePrivacy
from federation.wire.terms import Spent
from federation.wire.transfer import make_ref
from privacy.accounting import Spend, epsilon_pld
from privacy.distributed import epsilon_of
from privacy.rounded_sum import NoisySum

DELTA = 1e-5
SPENT = Spent(
    epsilon=1.0,
    round_epsilon=0.5,
    delta=DELTA,
    noise_multiplier=1.1,
    clip_norm=1.0,
    steps=10,
    entry=1,
    head="e" * 64,
)
OFFER = UpdateOffer(
    run="0" * 16,
    round=1,
    base="b" * 64,
    object=make_ref(bytes(64), 64),
    encoding="float32",
    samples=1,
    metrics=TrainMetrics(loss=None, accuracy=None, steps=1, train_s=1.0),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "state", "garden", create=True) as opened:
        yield opened


def close_round(store: Store, number: int, spent: dict[str, Spent | None]) -> None:
    store.open_round(number, 1, tuple(spent), base="0" * 64, encoding="float32", deadline_s=1.0)
    for agent, words in spent.items():
        store.record_update(number, agent, msgspec.structs.replace(OFFER, run=store.run, spent=words))
    store.close_round(number, 0.1, StoredVersion(f"{number:064x}", "full"))


def said(epsilon: float, entry: int, delta: float = DELTA) -> Spent:
    return msgspec.structs.replace(SPENT, epsilon=epsilon, entry=entry, delta=delta)


def privacy(store: Store, number: int) -> ReleasePrivacy | None:
    found, _ = privacy_of(store, number)
    return found


def test_training_without_privacy_says_nothing(store: Store) -> None:
    assert privacy_of(store, 0) == (None, "")


@pytest.mark.parametrize(("number", "epsilon"), [(1, 1.5), (2, 2.5)])
def test_the_largest_of_all_devices_up_to_the_round(store: Store, number: int, epsilon: float) -> None:
    close_round(store, 1, {"pi1": said(1.0, 1), "pi2": said(1.5, 1)})
    close_round(store, 2, {"pi1": said(2.5, 2), "pi2": said(2.0, 2)})
    assert privacy(store, number) == ReleasePrivacy(epsilon=epsilon, delta=DELTA, level="sample")


def test_a_device_that_took_part_once_still_counts(store: Store) -> None:
    close_round(store, 1, {"pi1": said(4.0, 1), "pi2": said(1.0, 1)})
    close_round(store, 2, {"pi2": said(2.0, 2)})
    found = privacy(store, 2)
    assert found is not None
    assert found.epsilon == 4.0


def test_the_largest_delta_is_told(store: Store) -> None:
    close_round(store, 1, {"pi1": said(4.0, 1, 1e-6), "pi2": said(1.0, 1, 1e-4)})
    found = privacy(store, 1)
    assert found is not None
    assert (found.epsilon, found.delta) == (4.0, 1e-4)


def test_one_update_without_noise_leaves_no_figure(store: Store) -> None:
    close_round(store, 1, {"pi1": said(1.0, 1), "pi2": None})
    close_round(store, 2, {"pi1": said(2.0, 2)})
    found, remark = privacy_of(store, 2)
    assert found is None
    assert "1 of the rounds that made this model had no sample-level noise (first 1)" in remark


def test_a_round_without_noise_after_the_released_one_does_not_matter(store: Store) -> None:
    close_round(store, 1, {"pi1": said(1.0, 1)})
    close_round(store, 2, {"pi1": None})
    assert privacy(store, 1) is not None
    assert privacy(store, 2) is None


def test_a_ledger_that_went_back_is_told(store: Store) -> None:
    close_round(store, 1, {"pi1": said(3.0, 5)})
    close_round(store, 2, {"pi1": said(1.0, 2)})
    found, remark = privacy_of(store, 2)
    assert found is not None
    assert found.epsilon == 3.0
    assert "leaves something out: the ledgers of pi1" in remark


def pay_centrally(store: Store, number: int, noise: float, *, digest: str | None = None) -> None:
    with store.transaction() as db:
        db.execute(
            "INSERT INTO noisy_rounds VALUES (?, ?, ?, 1.0, 0.5, 5.0, 8.0, ?, ?, 'full', NULL)",
            (store.run, number, noise, DELTA, digest or f"{number:064x}"),
        )


def test_noise_of_the_aggregator_counts_up_to_the_round(store: Store) -> None:
    for number in (1, 2, 3):
        pay_centrally(store, number, 2.0)
        close_round(store, number, {"pi1": None})
    assert privacy(store, 2) == ReleasePrivacy(
        epsilon=epsilon_pld([Spend(2.0, 1.0, 2)], DELTA), delta=DELTA, level="client"
    )


def test_a_model_of_the_aggregator_without_its_noise_leaves_no_figure(store: Store) -> None:
    pay_centrally(store, 1, 2.0)
    close_round(store, 1, {"pi1": None})
    pay_centrally(store, 2, 2.0, digest="f" * 64)
    close_round(store, 2, {"pi1": None})
    found, remark = privacy_of(store, 2)
    assert found is None
    assert "no client-level noise (first 2)" in remark


def test_whole_devices_are_told_where_both_layers_were_paid(store: Store) -> None:
    pay_centrally(store, 1, 2.0)
    close_round(store, 1, {"pi1": said(1.0, 1)})
    found = privacy(store, 1)
    assert found is not None
    assert found.level == "client"


def test_noise_that_devices_add_together_counts(store: Store) -> None:
    each = NoisySum(8.0, 2.0, 4.0)
    for number in (1, 2):
        with store.transaction() as db:
            db.execute(
                "INSERT INTO masked_noise VALUES (?, ?, 2.0, 0.5, ?, ?, ?, 8.0, ?)",
                (store.run, number, each.noise, each.norm, each.largest, DELTA),
            )
        close_round(store, number, {"pi1": None})
    assert privacy(store, 2) == ReleasePrivacy(
        epsilon=epsilon_of([each, each], DELTA), delta=DELTA, level="client"
    )
    close_round(store, 3, {"pi1": None})
    found, remark = privacy_of(store, 3)
    assert found is None
    assert "no distributed noise (first 3)" in remark
