import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edge_agent import training
from edge_agent.training import Cancelled, TorchTrainer, Trained, TrainingError, round_seed
from federation.errors import ConfigError
from federation.task.data import open_data, task_from_data
from federation.task.evaluate import evaluate
from federation.task.models import build, load_arrays, state_arrays
from federation.wire.messages import FullModel, RoundPlan, TaskSpec, TrainSpec
from federation.wire.transfer import make_ref
from federation.wire.versions import model_digest

DIGITS = task_from_data("digits", "cnn")
SHARE = "digits@iid,agent=1/10"
SHARE_SAMPLES = 144

Arrays = dict[str, np.ndarray]


def never() -> bool:
    return False


class _Glutton(nn.Module):
    """Wants more memory in training than any machine has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            torch.empty(2**52, dtype=torch.uint8)
        logits: torch.Tensor = self.head(images.flatten(1))
        return logits


def glutton(_task: TaskSpec) -> nn.Module:
    return _Glutton()


def with_dropout(_task: TaskSpec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))


def with_batch_norm(_task: TaskSpec) -> nn.Module:
    """momentum=None averages over all batches that the integer counter has counted."""
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, momentum=None), nn.Linear(64, 10))


def half_frozen(_task: TaskSpec) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model[1].requires_grad_(requires_grad=False)
    return model


def task_of(factory: Callable[[TaskSpec], nn.Module]) -> TaskSpec:
    return task_from_data("digits", f"{__name__}:{factory.__name__}")


def make_plan(task: TaskSpec = DIGITS, *, number: int = 1, **train: object) -> RoundPlan:
    return RoundPlan(
        run="0" * 16,
        round=number,
        attempt=1,
        task=task,
        train=TrainSpec(**({"learning_rate": 0.05} | train)),  # type: ignore[arg-type]
        base="0" * 64,
        full=FullModel(version="0" * 64, object=make_ref(b"model", 64)),
        deltas=(),
        up_encoding="float32",
        max_noise=0.0,
        cohort=("pi",),
        deadline_s=60.0,
        issued_at=0.0,
        upload_chunk_bytes=1024,
    )


def make_trainer(spec: str = SHARE) -> TorchTrainer:
    return TorchTrainer(spec, device="cpu", threads=1)


def base_of(task: TaskSpec) -> Arrays:
    return state_arrays(build(task, seed=1))


def train(plan: RoundPlan, trainer: TorchTrainer | None = None, agent: str = "pi") -> Trained:
    return (trainer or make_trainer()).train(base_of(plan.task), plan, agent, never)


def same(first: Arrays, second: Arrays) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


def test_base_plus_delta_knows_the_digits() -> None:
    base = base_of(DIGITS)
    kept = {name: array.copy() for name, array in base.items()}
    result = make_trainer("digits").train(base, make_plan(epochs=3), "pi", never)

    assert same(base, kept)
    assert list(result.delta) == list(base)
    assert all(d.dtype == np.float32 and d.flags["C_CONTIGUOUS"] for d in result.delta.values())
    assert result.samples == 1437
    assert result.metrics.steps == 3 * 45
    assert result.metrics.loss is not None
    assert result.metrics.loss < 0.3
    model = build(DIGITS)
    load_arrays(model, {name: base[name] + result.delta[name] for name in base})
    assert evaluate(model, open_data("digits", DIGITS, train=False)).accuracy > 0.9


def test_one_step_of_sgd_is_minus_learning_rate_times_gradient() -> None:
    plan = make_plan(learning_rate=0.1, momentum=0.0, weight_decay=0.01, batch_size=1000)
    result = train(plan)
    model = build(DIGITS)
    load_arrays(model, base_of(DIGITS))
    data = open_data(SHARE, DIGITS, train=True)
    images, labels = data.batch(np.arange(len(data)))
    torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))

    assert result.metrics.steps == 1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = -0.1 * (parameter.grad + 0.01 * parameter.detach())
        np.testing.assert_allclose(result.delta[name], expected.numpy(), atol=1e-6)


def test_adam_moves_every_weight_about_the_learning_rate_at_first() -> None:
    result = train(make_plan(optimizer="adam", learning_rate=0.001, batch_size=1000))

    assert np.abs(result.delta["fc3.bias"]).tolist() == pytest.approx([0.001] * 10, rel=1e-3)


@pytest.mark.parametrize(
    "task", [DIGITS, task_of(with_dropout), task_of(with_batch_norm)], ids=lambda t: t.model
)
def test_two_runs_give_the_same_bits_whatever_was_trained_before(task: TaskSpec) -> None:
    fresh, used = make_trainer(), make_trainer()
    train(make_plan(task, number=1), used)
    torch.manual_seed(99)

    assert same(train(make_plan(task, number=2), fresh).delta, train(make_plan(task, number=2), used).delta)


def test_round_name_and_seed_each_change_the_order() -> None:
    trainer = make_trainer()
    first = train(make_plan(), trainer).delta
    others = [
        train(make_plan(number=2), trainer).delta,
        train(make_plan(), trainer, agent="pi2").delta,
        train(make_plan(seed=1), trainer).delta,
    ]

    assert not any(same(first, other) for other in others)
    seeds = {round_seed(make_plan(number=number), agent) for number in (1, 2) for agent in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_the_round_seed_is_the_documented_hash() -> None:
    # printf '7/3/pi' | sha256sum
    assert round_seed(make_plan(number=3, seed=7), "pi") == 0xA2F042957E8ED8C0


def test_max_steps_ends_training_early() -> None:
    result = train(make_plan(epochs=5, batch_size=10, max_steps=7))

    assert result.metrics.steps == 7


def test_every_image_is_used_once_an_epoch() -> None:
    batches = list(training._batches(10, 4, np.random.default_rng(0), drop_single=False))

    assert [len(rows) for rows in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches)) == list(range(10))


@pytest.mark.parametrize(
    ("samples", "batch_size", "sizes"), [(9, 4, [4, 4]), (8, 4, [4, 4]), (10, 4, [4, 4, 2])]
)
def test_a_last_batch_of_one_is_left_out_for_batch_norm(
    samples: int, batch_size: int, sizes: list[int]
) -> None:
    batches = training._batches(samples, batch_size, np.random.default_rng(0), drop_single=True)

    assert [len(rows) for rows in batches] == sizes


def test_batch_norm_survives_a_last_batch_of_one() -> None:
    result = train(make_plan(task_of(with_batch_norm), batch_size=SHARE_SAMPLES - 1))

    assert result.metrics.steps == 1
    assert np.abs(result.delta["1.running_mean"]).max() > 0


def test_batches_of_one_are_refused_where_batch_norm_cannot_take_them() -> None:
    with pytest.raises(TrainingError, match=r"batches of 1.*larger batch_size"):
        train(make_plan(task_of(with_batch_norm), batch_size=1))


def test_frozen_weights_stay() -> None:
    delta = train(make_plan(task_of(half_frozen))).delta

    assert not delta["1.weight"].any()
    assert delta["3.weight"].any()


def test_it_stops_between_two_batches_when_cancelled() -> None:
    asked = 0

    def third_time() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    trainer = make_trainer()
    with pytest.raises(Cancelled):
        trainer.train(base_of(DIGITS), make_plan(batch_size=10), "pi", third_time)

    assert asked == 3
    assert same(train(make_plan(), trainer).delta, train(make_plan()).delta)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_divergence_names_the_learning_rate(optimizer: str) -> None:
    with pytest.raises(TrainingError, match=r"NaN or infinite .* learning_rate 1e\+12"):
        train(make_plan(learning_rate=1e12, epochs=3, optimizer=optimizer))


def test_weights_that_became_infinite_in_the_last_step_are_not_sent() -> None:
    with pytest.raises(TrainingError, match="a weight became NaN or infinite"):
        train(make_plan(learning_rate=1e30, weight_decay=1e30, momentum=0.0, max_steps=1))


def test_too_little_memory_says_what_to_do() -> None:
    trainer = make_trainer()
    with pytest.raises(
        TrainingError, match=r"out of memory on cpu with batches of 32.*smaller batch_size.*--max-memory"
    ):
        train(make_plan(task_of(glutton)), trainer)

    assert train(make_plan(), trainer).samples == SHARE_SAMPLES


def test_a_base_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="another model"):
        make_trainer().train({"w": np.zeros(3, np.float32)}, make_plan(), "pi", never)


def test_a_changed_task_opens_the_data_anew(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    task = task_from_data(f"imagefolder:{tmp_path}", "cnn")
    trainer = make_trainer(f"imagefolder:{tmp_path}")
    assert trainer.samples(task) == 4
    Image.new("RGB", (8, 8)).save(tmp_path / "dog" / "new.png")
    assert trainer.samples(task) == 4

    assert trainer.samples(task_from_data(f"imagefolder:{tmp_path}", "cnn", height=9)) == 5


def test_the_initial_model_depends_on_task_and_seed_alone() -> None:
    trainer = make_trainer()
    first = trainer.initial(DIGITS, 7)
    trained = train(make_plan(max_steps=2), trainer)
    torch.manual_seed(5)
    assert model_digest(trainer.initial(DIGITS, 7)) == model_digest(first), "also after training"
    assert model_digest(first) == model_digest(state_arrays(build(DIGITS, seed=7))), (
        "as the aggregator builds it"
    )
    assert model_digest(first) != model_digest(trainer.initial(DIGITS, 8))
    assert same(train(make_plan(max_steps=2), trainer).delta, trained.delta), "and training goes on as it did"


def test_an_initial_model_of_batch_norms_has_its_buffers_and_no_counters() -> None:
    initial = make_trainer().initial(task_of(with_batch_norm), 1)
    assert {name for name in initial if "running" in name} == {"1.running_mean", "1.running_var"}
    assert all(array.dtype == np.float32 for array in initial.values())


def test_a_trainer_tells_its_device_and_threads() -> None:
    trainer = make_trainer()

    assert trainer.device_name == "cpu"
    assert trainer.threads == 1
    assert TorchTrainer(SHARE).device_name in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "cpu:1", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{device}' is not there: this machine has cpu"):
        TorchTrainer(SHARE, device=device)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_does_not_load_the_compiler(optimizer: str) -> None:
    # In a process of its own, since another test may have loaded it: 150 MB that a small device does not have.
    script = f"""
import sys
from edge_agent.training import TorchTrainer
from federation.task.data import task_from_data
from federation.task.models import build, state_arrays
from federation.wire.messages import FullModel, RoundPlan, TrainSpec
from federation.wire.transfer import make_ref
task = task_from_data("digits", "cnn")
plan = RoundPlan(
    run="0" * 16, round=1, attempt=1, task=task, train=TrainSpec(max_steps=2, optimizer="{optimizer}"),
    base="0" * 64, full=FullModel(version="0" * 64, object=make_ref(b"x", 64)), deltas=(), up_encoding="float32",
    max_noise=0.0, cohort=("a",), deadline_s=1.0, issued_at=1.0, upload_chunk_bytes=64,
)
TorchTrainer("digits", threads=1).train(state_arrays(build(task)), plan, "a", lambda: False)
sys.exit("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
