"""aggregator.releases.making: what is released is what was exported, checked and measured; and says what training has cost."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from release_folders import FEDERATION, PICTURES, exported, make_stable, pictures

from aggregator.config import AggregatorConfig, ReleaseConfig
from aggregator.records import StoredVersion
from aggregator.releases.checks import Order
from aggregator.releases.making import WORTH_IT, MadeRelease, make_release
from aggregator.releases.records import DELTA_FILE
from aggregator.releases.store import ReleaseStore
from aggregator.store import Store
from federation.errors import ConfigError, VerificationError
from federation.release import GOLDEN_FILE, MODEL_FILE, check_files
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.engine import Engine
from federation.task.model_delta import apply_delta
from federation.wire.messages import TaskSpec, TrainMetrics, UpdateOffer
from federation.wire.release import ModelFormat, ReleasePrivacy
from federation.wire.terms import Spent
from federation.wire.transfer import make_ref

RIGHT = 2 * PICTURES / (2 * PICTURES + 1)


class Workbench:
    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self.releases = ReleaseStore(store)
        self.config = AggregatorConfig(federation=FEDERATION, state_dir=str(store.folder))

    def settings(self, **fields: object) -> None:
        release = msgspec.structs.replace(ReleaseConfig(), **fields)
        self.config = msgspec.structs.replace(self.config, release=release)

    def release(self, folder: Path | None, **order: object) -> MadeRelease:
        return make_release(self.store, self.config, changed(Order(folder=folder), **order))

    def stable(self, folder: Path, **order: object) -> MadeRelease:
        made = self.release(folder, **order)
        make_stable(self.releases, made.stored)
        return made

    def left_over(self) -> list[str]:
        return [path.name for path in (self.store.folder / "releases").glob(".*")]


def changed(order: Order, **fields: object) -> Order:
    return dataclasses.replace(order, **fields)  # type: ignore[arg-type]  # a test names the fields


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    with Store(tmp_path / "state", FEDERATION, create=True) as store:
        yield Workbench(tmp_path, store)


def test_a_folder_is_released_as_it_is(bench: Workbench) -> None:
    folder = exported(bench.folder / "export")
    stored = bench.release(folder, notes="hand-made").stored
    release = stored.release
    check_files(stored.folder, release)
    assert (stored.folder / MODEL_FILE).read_bytes() == (folder / MODEL_FILE).read_bytes()
    assert (release.number, release.run, release.round) == (1, bench.store.run, 3)
    assert (release.format, release.notes) == (ModelFormat.FP32, "hand-made")
    assert release.requirements == Engine(folder / MODEL_FILE).card.requirements
    assert release.model.chunk_bytes == bench.config.broker.chunk_bytes
    assert (release.delta, release.metrics, release.privacy) == (None, None, None)
    assert bench.left_over() == []


def test_the_model_in_a_folder_may_be_named(bench: Workbench) -> None:
    folder = exported(bench.folder / "export")
    assert bench.release(folder / MODEL_FILE).stored.number == 1


def test_accuracy_is_that_of_the_file_on_pictures_with_labels(bench: Workbench) -> None:
    bench.settings(data=pictures(bench.folder / "pictures"))
    metrics = bench.release(exported(bench.folder / "export")).stored.release.metrics
    assert metrics is not None
    assert metrics.accuracy == pytest.approx(RIGHT)
    assert (metrics.samples, metrics.drop_points) == (2 * PICTURES + 1, 0.0)


def test_what_an_unknown_format_has_cost_is_not_made_up(bench: Workbench) -> None:
    bench.settings(data=pictures(bench.folder / "pictures"))
    made = bench.release(exported(bench.folder / "export", weights=ModelFormat.INT8))
    assert made.stored.release.metrics is None
    assert any("has cost is not known" in remark for remark in made.remarks)
    assert made.found.now == pytest.approx(RIGHT)


def test_two_releases_with_a_delta_between_them(bench: Workbench) -> None:
    first = bench.stable(exported(bench.folder / "one", seed=1)).stored
    second = bench.release(exported(bench.folder / "two", scale=1.001, seed=1, number=4)).stored
    delta = second.release.delta
    assert delta is not None
    assert delta.base == first.release.model.sha256
    assert delta.object.length <= WORTH_IT * second.release.model.length
    model = second.release.model
    data = (second.folder / DELTA_FILE).read_bytes()
    old = (first.folder / MODEL_FILE).read_bytes()
    assert (
        apply_delta(old, data, length=model.length, sha256=model.sha256)
        == (second.folder / MODEL_FILE).read_bytes()
    )
    assert [ref for _, ref in second.objects][-1] == delta.object


def test_a_delta_that_saves_little_is_not_kept(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.stable(exported(bench.folder / "one", seed=1))
    monkeypatch.setattr("aggregator.releases.making.WORTH_IT", 0.01)
    second = bench.release(exported(bench.folder / "two", scale=-3.0, seed=2)).stored
    assert second.release.delta is None
    assert not (second.folder / DELTA_FILE).exists()


def test_without_a_stable_release_there_is_nothing_to_differ_from(bench: Workbench) -> None:
    bench.release(exported(bench.folder / "one"))
    assert bench.release(exported(bench.folder / "two", scale=2.0)).stored.release.delta is None


@pytest.mark.parametrize(("allowed", "released"), [(1.0, False), (99.9, True)])
def test_a_worse_model_passes_the_gate_only_within_the_setting(
    bench: Workbench, allowed: float, released: bool
) -> None:
    bench.settings(data=pictures(bench.folder / "pictures"), max_regression=allowed)
    bench.stable(exported(bench.folder / "good"), gated=True)
    worse = exported(bench.folder / "worse", scale=-1.0)
    if released:
        made = bench.release(worse, gated=True)
        assert any("stable release has 90.91%, this one 0.00%" in remark for remark in made.remarks)
        return
    with pytest.raises(VerificationError, match=r"0.00% right, 90.91 points below release 1 \(90.91%\)"):
        bench.release(worse, gated=True)
    assert len(bench.releases.releases()) == 1
    assert bench.left_over() == []


def test_by_hand_a_worse_model_is_released_with_a_word_about_it(bench: Workbench) -> None:
    bench.settings(data=pictures(bench.folder / "pictures"))
    bench.stable(exported(bench.folder / "good"))
    made = bench.release(exported(bench.folder / "worse", scale=-1.0))
    assert made.stored.number == 2
    assert any("90.91%, this one 0.00%" in remark for remark in made.remarks)


def test_what_cannot_be_compared_is_not_released_by_itself(bench: Workbench) -> None:
    bench.stable(exported(bench.folder / "good"), gated=True)
    with pytest.raises(VerificationError, match="cannot be compared with release 1"):
        bench.release(exported(bench.folder / "next", scale=2.0), gated=True)


def test_other_classes_must_be_meant(bench: Workbench) -> None:
    bench.stable(exported(bench.folder / "one"))
    other = exported(bench.folder / "two", labels=("dark", "bright", "night"))
    with pytest.raises(ConfigError, match=r"1 gone \(other\), 1 new \(night\).*--other-labels"):
        bench.release(other)
    made = bench.release(other, other_labels=True)
    assert any("1 new (night)" in remark for remark in made.remarks)


def test_what_training_has_cost_is_signed_with_the_model(bench: Workbench) -> None:
    spent = Spent(
        epsilon=2.5,
        round_epsilon=0.8,
        delta=1e-5,
        noise_multiplier=1.1,
        clip_norm=1.5,
        steps=100,
        entry=4,
        head="e" * 64,
    )
    for number, word in ((3, spent), (4, None)):
        bench.store.open_round(number, 1, ("pi1",), base="0" * 64, encoding="float32", deadline_s=1.0)
        offer = UpdateOffer(
            run=bench.store.run,
            round=number,
            base="b" * 64,
            object=make_ref(bytes(64), 64),
            encoding="float32",
            samples=1,
            metrics=TrainMetrics(loss=None, accuracy=None, steps=1, train_s=1.0),
            spent=word,
        )
        bench.store.record_update(number, "pi1", offer)
        bench.store.close_round(number, 0.1, StoredVersion(f"{number:064x}", "full"))
    private = bench.release(exported(bench.folder / "private", number=3)).stored.release
    assert private.privacy == ReleasePrivacy(epsilon=2.5, delta=1e-5, level="sample")
    made = bench.release(exported(bench.folder / "public", number=4, scale=2.0))
    assert made.stored.release.privacy is None
    assert any("had no sample-level noise (first 4)" in remark for remark in made.remarks)


def test_the_order_of_the_classes_does_not_matter(bench: Workbench) -> None:
    bench.stable(exported(bench.folder / "one"))
    assert (
        bench.release(exported(bench.folder / "two", labels=("other", "dark", "bright"))).stored.number == 2
    )


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"federation": "kitchen"}, ConfigError, "a model of federation 'kitchen', this is 'garden'"),
        ({"scale": float("nan")}, VerificationError, "NaN"),
        ({"requirements": None}, ConfigError, "does not say what it needs"),
    ],
)
def test_a_folder_that_devices_could_not_use_is_refused(
    bench: Workbench, fields: dict[str, object], error: type[Exception], said: str
) -> None:
    folder = exported(bench.folder / "export", **fields)  # type: ignore[arg-type]  # a test names the fields
    with pytest.raises(error, match=said):
        bench.release(folder)
    assert bench.releases.releases() == []
    assert bench.left_over() == []


def test_a_model_with_anothers_golden_set_is_refused(bench: Workbench) -> None:
    one = exported(bench.folder / "one")
    two = exported(bench.folder / "two", scale=-1.0, answers_of=one)
    with pytest.raises(VerificationError, match="golden frame 0"):
        bench.release(two)


@pytest.mark.parametrize("name", [MODEL_FILE, GOLDEN_FILE])
def test_a_folder_that_lacks_a_file_is_none(bench: Workbench, name: str) -> None:
    folder = exported(bench.folder / "export")
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"not a release folder: there is no {name}"):
        bench.release(folder)


def test_a_model_that_is_a_release_already_is_named(bench: Workbench) -> None:
    folder = exported(bench.folder / "export")
    bench.release(folder)
    with pytest.raises(ConfigError, match=r"release 1 already .*rollback --to 1"):
        bench.release(folder)


def test_notes_have_a_bound(bench: Workbench) -> None:
    with pytest.raises(ConfigError, match="1001 characters, at most 1000"):
        bench.release(exported(bench.folder / "export"), notes="x" * 1001)


def test_without_a_checkpoint_there_is_nothing_to_release(bench: Workbench) -> None:
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        bench.release(None)
    assert bench.left_over() == []


def test_the_newest_checkpoint_is_exported_as_the_settings_say(bench: Workbench) -> None:
    from federation.task.models import build, state_arrays

    task = TaskSpec(model="cnn", labels=("yes", "no"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
    for number in (1, 2):
        info = CheckpointInfo(federation=FEDERATION, round=number, task=task)
        bench.store.write_checkpoint(number, checkpoint_bytes(info, state_arrays(build(task, seed=number))))
    bench.settings(preprocess="none")
    made = bench.release(None)
    assert made.stored.release.round == 2
    assert made.stored.release.format is ModelFormat.FP32
    assert any("int8 is calibrated with pictures" in remark for remark in made.remarks)
    assert Engine(made.stored.folder / MODEL_FILE).card.preprocess == "none"
    with pytest.raises(ConfigError, match="no checkpoint of round 5: it has 1-2"):
        bench.release(None, round=5)
