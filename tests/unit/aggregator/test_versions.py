"""aggregator.versions: what a plan offers to those who have the last version, an older one, or none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.records import StoredVersion
from aggregator.store import Store
from aggregator.versions import WHOLE, Offered, Versions, remember_seed
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.codec import encode
from federation.wire.messages import RoundPlan, TaskSpec, TrainSpec
from federation.wire.versions import apply_delta, cheapest_route, model_digest

TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
CHUNK_BYTES = 256
KEEP = 3
SHAPE = (40, 30)
"""Long enough that the delta of ``sq:16`` takes a hundredth of it, and that of ``float32`` all of it."""

Model = dict[str, NDArray[np.float32]]
Advance = Callable[..., Model]


def info(number: int) -> CheckpointInfo:
    return CheckpointInfo(federation="garden", round=number, task=TASK)


def noise(number: int) -> Model:
    return {"weight": np.random.default_rng(number).standard_normal(SHAPE).astype(np.float32)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state", "garden", create=True)
    store.write_checkpoint(0, checkpoint_bytes(info(0), noise(0)))
    return store


@pytest.fixture
def advance(store: Store) -> Advance:
    """Close a round: what the fold leaves on disk and in the database."""

    def close(number: int, encoding: str = "sq:16", change: Model | None = None) -> Model:
        _, base = read_checkpoint(store.checkpoint_path(number - 1))
        delta = noise(number) if change is None else change
        if encoding == WHOLE:
            model = {name: base[name] + delta[name] for name in base}
        else:
            frame = encode(delta, encoding, np.random.default_rng(number))
            model = apply_delta(base, frame, encoding)
            store.write_delta(number, frame)
        store.write_checkpoint(number, checkpoint_bytes(info(number), model))
        store.close_round(number, 0.1, StoredVersion(model_digest(model), encoding))
        return model

    return close


def plan_of(offered: Offered) -> RoundPlan:
    """The plan that such an offer makes; its own checks hold."""
    return RoundPlan(
        run="0" * 16,
        round=1,
        attempt=1,
        task=TASK,
        train=TrainSpec(),
        base=offered.base,
        full=offered.full,
        deltas=offered.deltas,
        up_encoding="sq:16",
        max_noise=0.0,
        cohort=("pi1",),
        deadline_s=1.0,
        issued_at=0.0,
        upload_chunk_bytes=CHUNK_BYTES,
    )


def cost(offered: Offered, held: str = "", *, may_build: bool = True) -> int:
    """Bytes that a device fetches which holds this version."""
    return cheapest_route(plan_of(offered), {held}, may_build=may_build).fetched_bytes


def full_of(offered: Offered) -> Path:
    """The file that newcomers get."""
    path, ref = offered.objects[-1]
    assert ref == offered.full.object
    assert path.stat().st_size == ref.length
    return path


def digest(store: Store, number: int) -> str:
    return model_digest(read_checkpoint(store.checkpoint_path(number))[1])


def test_the_first_round_offers_the_initial_model_and_the_seed_that_makes_it(store: Store) -> None:
    offered = Versions(store, KEEP).offer(0, CHUNK_BYTES)
    assert (offered.base, offered.deltas) == (digest(store, 0), ())
    assert full_of(offered) == store.checkpoint_path(0)
    assert offered.full.seed is None, "nobody knows how this one was made"
    remember_seed(store, 7)
    built = Versions(store, KEEP).offer(0, CHUNK_BYTES)
    assert (built.full.version, built.full.seed) == (digest(store, 0), 7)
    assert (cost(built), cost(built, may_build=False)) == (0, offered.full.object.length)


def test_who_has_the_last_version_fetches_one_delta_and_who_has_older_ones_several(
    store: Store, advance: Advance
) -> None:
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    for number in range(1, KEEP + 1):
        advance(number)
        offered = versions.offer(number, CHUNK_BYTES)
    assert [delta.base for delta in offered.deltas] == [digest(store, number) for number in range(KEEP)]
    assert {delta.encoding for delta in offered.deltas} == {"sq:16"}
    costs = [cost(offered, digest(store, number)) for number in range(KEEP + 1)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0
    assert 0 < costs[-2] == store.delta_path(KEEP).stat().st_size < offered.full.object.length / 10
    assert cost(offered) == offered.full.object.length + costs[0], "a newcomer: the model, and all deltas"


def test_the_delta_that_most_agents_need_is_brought_first_and_the_full_model_last(
    store: Store, advance: Advance
) -> None:
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    for number in (1, 2):
        advance(number)
    offered = versions.offer(2, CHUNK_BYTES)
    files = [path for path, _ in offered.objects]
    assert files == [store.delta_path(2), store.delta_path(1), store.checkpoint_path(0)]
    assert all(path.stat().st_size == ref.length for path, ref in offered.objects)


def test_a_full_model_is_renewed_once_more_deltas_lead_from_it_than_are_kept(
    store: Store, advance: Advance
) -> None:
    remember_seed(store, 7)
    versions = Versions(store, KEEP)
    keys = [full_of(versions.offer(0, CHUNK_BYTES))]
    for number in range(1, 2 * KEEP + 3):
        advance(number)
        offered = versions.offer(number, CHUNK_BYTES)
        plan_of(offered)
        keys.append(full_of(offered))
        assert len(offered.deltas) == min(number, KEEP)
        assert (offered.full.seed is None) == (number > KEEP)
    expected = [0] * (KEEP + 1) + [KEEP + 1] * (KEEP + 1) + [2 * KEEP + 2]
    assert keys == [store.checkpoint_path(number) for number in expected]


def test_a_full_model_is_renewed_when_the_deltas_since_are_longer_than_half_of_it(
    store: Store, advance: Advance
) -> None:
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    advance(1, "int8")
    first = versions.offer(1, CHUNK_BYTES)
    assert full_of(first) == store.checkpoint_path(0), "a quarter"
    advance(2, "float16")
    second = versions.offer(2, CHUNK_BYTES)
    assert full_of(second) == store.checkpoint_path(2), "three quarters"
    assert len(second.deltas) == 2, "they still lead on who has the former versions"
    assert cost(second) == second.full.object.length
    advance(3, "float32")
    third = versions.offer(3, CHUNK_BYTES)
    assert full_of(third) == store.checkpoint_path(3)
    assert cost(third) <= 1.5 * third.full.object.length


def test_whole_models_need_no_deltas(store: Store, advance: Advance) -> None:
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    for number in (1, 2):
        advance(number, WHOLE)
        offered = versions.offer(number, CHUNK_BYTES)
        assert (offered.base, offered.full.version) == (digest(store, number), digest(store, number))
        assert (offered.deltas, full_of(offered)) == ((), store.checkpoint_path(number))


def test_deltas_lead_on_from_whole_models_but_not_over_them(store: Store, advance: Advance) -> None:
    """As settings change from run to run, after which a delta may be left from a fold that was repeated."""
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    advance(1)
    store.write_delta(2, b"of a fold that was interrupted and repeated without one")
    advance(2, WHOLE)
    advance(3)
    offered = versions.offer(3, CHUNK_BYTES)
    assert [delta.base for delta in offered.deltas] == [digest(store, 2)]
    assert full_of(offered) == store.checkpoint_path(3)


def test_a_restart_makes_the_same_offer(store: Store, advance: Advance) -> None:
    remember_seed(store, 7)
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    for number in range(1, KEEP + 3):
        advance(number)
        offered = versions.offer(number, CHUNK_BYTES)
        assert Versions(Store(store.folder, "garden"), KEEP).offer(number, CHUNK_BYTES) == offered
        assert versions.offer(number, CHUNK_BYTES) == offered, "as in the next attempt of a round"


def test_another_broker_gets_other_chunks_of_the_same_objects(store: Store, advance: Advance) -> None:
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    advance(1)
    one, other = versions.offer(1, CHUNK_BYTES), versions.offer(1, 2 * CHUNK_BYTES)
    assert [ref.sha256 for _, ref in one.objects] == [ref.sha256 for _, ref in other.objects]
    assert {ref.chunk_bytes for _, ref in other.objects} == {2 * CHUNK_BYTES}


def test_a_state_folder_from_before_there_were_versions(store: Store, advance: Advance) -> None:
    for number in (1, 2):
        advance(number, WHOLE)
    store.read("DROP TABLE versions")
    store.read("DELETE FROM meta WHERE key = 'key_frame'")
    with Store(store.folder, "garden") as later:
        versions = Versions(later, KEEP)
        versions.prune(2)
        offered = versions.offer(2, CHUNK_BYTES)
        assert (offered.base, offered.deltas) == (digest(store, 2), ())
        assert full_of(offered) == store.checkpoint_path(2)
        advance(3)
        offered = versions.offer(3, CHUNK_BYTES)
    assert [delta.base for delta in offered.deltas] == [digest(store, 2)]
    assert full_of(offered) == store.checkpoint_path(2)


@pytest.mark.parametrize("keep_checkpoints", [1, 2, 3])
def test_what_this_plan_and_the_former_name_is_not_pruned(
    store: Store, advance: Advance, keep_checkpoints: int
) -> None:
    versions = Versions(store, KEEP)
    former = versions.offer(0, CHUNK_BYTES)
    for number in range(1, 4 * KEEP):
        advance(number)
        versions.prune(keep_checkpoints)
        assert all(path.exists() for path, _ in former.objects), "agents may be at work on the last plan"
        offered = versions.offer(number, CHUNK_BYTES)
        assert all(path.exists() for path, _ in offered.objects)
        checkpoints = list(store.folder.glob("checkpoints/*.safetensors"))
        assert len(checkpoints) <= max(2, keep_checkpoints) + 1
        assert len(list(store.folder.glob("checkpoints/*.delta"))) <= KEEP + 1
        former = offered


def test_all_checkpoints_are_kept_on_demand(store: Store, advance: Advance) -> None:
    versions = Versions(store, 1)
    versions.offer(0, CHUNK_BYTES)
    for number in range(1, 5):
        advance(number)
        versions.prune(0)
        versions.offer(number, CHUNK_BYTES)
    assert all(store.checkpoint_path(number).exists() for number in range(5))
    assert not store.delta_path(2).exists(), "deltas are of no use to anybody any more"


def test_a_lost_delta_or_key_frame_is_done_without(store: Store, advance: Advance) -> None:
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    for number in (1, 2, 3):
        advance(number)
    store.delta_path(2).unlink()
    offered = versions.offer(3, CHUNK_BYTES)
    assert [delta.base for delta in offered.deltas] == [digest(store, 2)]
    assert full_of(offered) == store.checkpoint_path(3)
    advance(4)
    store.checkpoint_path(3).unlink()
    assert full_of(versions.offer(4, CHUNK_BYTES)) == store.checkpoint_path(4)


def test_a_round_that_changed_nothing_is_stepped_over(store: Store, advance: Advance) -> None:
    """All updates were zero: the next version is the former one, and a delta between them would lead in a circle."""
    remember_seed(store, 7)
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    still = {"weight": np.zeros(SHAPE, np.float32)}
    advance(1, change=still)
    first = versions.offer(1, CHUNK_BYTES)
    assert (first.base, first.deltas, first.full.seed) == (digest(store, 0), (), 7)
    plan_of(first)
    advance(2)
    advance(3, change=still)
    third = versions.offer(3, CHUNK_BYTES)
    plan_of(third)
    assert [delta.base for delta in third.deltas] == [digest(store, 0)]
    assert cost(third, digest(store, 0)) == store.delta_path(2).stat().st_size
    assert full_of(third) == store.checkpoint_path(0)


def test_a_run_that_comes_back_to_an_earlier_version_does_not_lead_in_a_circle(
    store: Store, advance: Advance
) -> None:
    versions = Versions(store, KEEP)
    versions.offer(0, CHUNK_BYTES)
    there = {"weight": np.where(noise(1)["weight"] > 0, noise(0)["weight"], 0).astype(np.float32)}
    back = {"weight": -there["weight"]}
    advance(1, "float32", change=there)
    versions.offer(1, CHUNK_BYTES)
    advance(2, "float32", change=back)
    assert digest(store, 2) == digest(store, 0)
    assert digest(store, 1) != digest(store, 0)
    offered = versions.offer(2, CHUNK_BYTES)
    plan_of(offered)
    assert [delta.base for delta in offered.deltas] == [digest(store, 1)]
    assert cost(offered, digest(store, 0)) == 0
