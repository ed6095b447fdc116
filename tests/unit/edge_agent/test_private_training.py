import subprocess
import sys
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import nn

from edge_agent.training import Cancelled, TorchTrainer, Trained, TrainingError
from federation.task.data import open_data, task_from_data
from federation.task.evaluate import evaluate
from federation.task.models import build, load_arrays, state_arrays
from federation.wire.messages import FullModel, RoundPlan, TaskSpec, TrainSpec
from federation.wire.terms import PrivacyTerms, SampleTerms
from federation.wire.transfer import make_ref
from privacy import dpsgd
from privacy.budget import PrivateRound

SHARE = "digits@iid,agent=1/10"
TERMS = PrivacyTerms(sample=SampleTerms(clip_norm=1.0, delta=1e-5, rounds=10, epsilon=3.0))
PAID = PrivateRound(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.2, steps=4)

Arrays = dict[str, np.ndarray]


def never() -> bool:
    return False


def ready(model: str) -> TaskSpec:
    return msgspec.structs.replace(task_from_data("digits", model), dp_ready=True)


class _Counting(nn.Module):
    """Keeps a mean of all images that it has seen."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += images.detach().mean()
        logits: torch.Tensor = self.head(images.flatten(1))
        return logits


def counting(_task: TaskSpec) -> nn.Module:
    return nn.Sequential(_Counting())


class _Buffered(nn.Module):
    """Learns, and keeps a constant in a buffer: Opacus refuses such layers."""

    factor: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(10, 64))
        self.weight = nn.Parameter(torch.ones(10, 64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(images, self.weight * self.factor)


def buffered(_task: TaskSpec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), _Buffered())


def make_plan(task: TaskSpec, **train: object) -> RoundPlan:
    return RoundPlan(
        run="0" * 16,
        round=1,
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
        privacy=TERMS,
    )


def train(
    plan: RoundPlan,
    private: PrivateRound | None = PAID,
    trainer: TorchTrainer | None = None,
    cancelled: Callable[[], bool] = never,
    spec: str = SHARE,
) -> Trained:
    trainer = trainer or TorchTrainer(spec, device="cpu", threads=1)
    base = state_arrays(build(plan.task, seed=1))
    return trainer.train(base, plan, "pi", cancelled, private)


def same(first: Arrays, second: Arrays) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_private_federation_of_one_learns_the_digits() -> None:
    task = ready("scattering")
    plan = make_plan(task, learning_rate=2.0, momentum=0.0, batch_size=256)
    private = PrivateRound(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.2, steps=40)
    result = train(plan, private, spec="digits")

    base = state_arrays(build(task, seed=1))
    model = build(task)
    load_arrays(model, {name: base[name] + result.delta[name] for name in base})
    assert evaluate(model, open_data("digits", task, train=False)).accuracy > 0.85


@pytest.mark.parametrize("model", ["cnn", "mobilenet_v3_small"])
def test_a_private_round_tells_steps_and_nothing_of_the_fit(model: str) -> None:
    with capture_logs() as logs:
        result = train(make_plan(ready(model)))

    assert (result.metrics.loss, result.metrics.accuracy) == (None, None)
    assert result.metrics.steps == PAID.steps
    (event,) = [event for event in logs if event["event"] == "model_trained"]
    assert event["clipping"] == "ghost"
    assert "loss" not in event
    assert not any("running" in name for name in result.delta)


def test_the_same_plan_never_gives_the_same_private_update() -> None:
    trainer, plan = TorchTrainer(SHARE, device="cpu", threads=1), make_plan(ready("cnn"))

    assert not same(train(plan, trainer=trainer).delta, train(plan, trainer=trainer).delta)


def test_plain_training_goes_on_as_before_after_private_training() -> None:
    task = ready("cnn")
    plain = msgspec.structs.replace(make_plan(task), privacy=PrivacyTerms())
    used = TorchTrainer(SHARE, device="cpu", threads=1)
    train(make_plan(task), trainer=used)

    assert same(train(plain, None, used).delta, train(plain, None).delta)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momentum_and_adam_are_fed_the_noisy_gradient(optimizer: str) -> None:
    result = train(make_plan(ready("cnn"), optimizer=optimizer, learning_rate=0.01))

    assert all(
        np.isfinite(change).all() and np.count_nonzero(change) > 0.9 * change.size
        for change in result.delta.values()
    ), "noise in every weight"


def test_a_plan_with_terms_is_not_trained_unpaid() -> None:
    with pytest.raises(TrainingError, match="promises privacy for samples, but no noise was paid"):
        train(make_plan(ready("cnn")), None)


def test_a_batch_larger_than_the_data_is_refused_without_its_size() -> None:
    with pytest.raises(TrainingError, match="fewer samples than a batch of 145") as caught:
        train(make_plan(ready("cnn"), batch_size=145))

    assert "144" not in str(caught.value)


def test_it_stops_between_two_batches_when_cancelled() -> None:
    asked = 0

    def third_time() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    trainer = TorchTrainer(SHARE, device="cpu", threads=1)
    with pytest.raises(Cancelled):
        train(make_plan(ready("cnn")), trainer=trainer, cancelled=third_time)

    assert asked == 3
    assert train(make_plan(ready("cnn")), trainer=trainer).metrics.steps == PAID.steps


def test_divergence_names_the_learning_rate() -> None:
    with pytest.raises(TrainingError, match=r"a weight became NaN or infinite .* learning_rate 1e\+12"):
        train(make_plan(ready("cnn"), learning_rate=1e12, weight_decay=1e30))


def test_statistics_do_not_leave_a_private_round() -> None:
    task = msgspec.structs.replace(
        task_from_data("digits", f"{__name__}:{counting.__name__}"), dp_ready=False
    )
    with pytest.raises(TrainingError, match=r"'0.seen'.*without noise|has changed in private training"):
        train(make_plan(task))


def test_without_opacus_the_device_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    dpsgd._opacus.cache_clear()
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    trainer = TorchTrainer(SHARE, device="cpu", threads=1)
    with pytest.raises(TrainingError, match=r"Opacus.*pip install 'fedge\[train\]'"):
        trainer.samples(ready("cnn"))
    with pytest.raises(TrainingError, match="Opacus"):
        train(make_plan(ready("cnn")))


def test_a_model_that_cannot_be_trained_is_told_before_anything_is_paid() -> None:
    task = ready(f"{__name__}:{buffered.__name__}")
    with pytest.raises(TrainingError, match=r"gradients of single samples cannot be had.*buffers"):
        TorchTrainer(SHARE, device="cpu", threads=1).samples(task)
    with pytest.raises(TrainingError, match="buffers"):
        train(make_plan(task))


def test_private_training_does_not_load_the_compiler() -> None:
    # 150 MB that a small device does not have.
    script = f"""
import sys, numpy as np
from torch import nn
import torch
from edge_agent.optimizers import make_optimizer
from federation.wire.messages import TrainSpec
from privacy import dpsgd
from privacy.budget import PrivateRound
model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
dpsgd.train(
    model, make_optimizer(model, TrainSpec()), {PAID!r}, samples=9,
    batch=lambda rows: (torch.zeros(len(rows), 4), torch.zeros(len(rows), dtype=torch.int64)),
)
sys.exit("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_fixed_part_makes_of_images_is_computed_once() -> None:
    task = ready("scattering")
    kept = TorchTrainer(SHARE, device="cpu", threads=1)
    never_kept = TorchTrainer(SHARE, device="cpu", threads=1, memory_limit_mb=0)
    plain = msgspec.structs.replace(make_plan(task, learning_rate=0.5), privacy=PrivacyTerms())
    first = train(plain, None, kept).delta
    for name, change in train(plain, None, never_kept).delta.items():
        np.testing.assert_allclose(first[name], change, atol=1e-5)

    assert kept._features is not None
    features = kept._features
    assert same(train(plain, None, kept).delta, first)
    assert kept._features is features
    assert never_kept._features is None
