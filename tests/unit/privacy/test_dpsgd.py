"""DP-SGD: the clipped sum against a loop, the noise against its formula, and what Opacus would do wrong by itself."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from federation.task.models import build
from federation.wire.messages import TaskSpec
from privacy import dpsgd
from privacy.budget import PrivateRound
from privacy.clipping import Mode, Sums, trainable
from privacy.errors import TermsError

MODELS = [
    ("cnn", 8),
    ("scattering", 8),
    ("resnet18", 16),
    ("mobilenet_v2", 32),
    ("mobilenet_v3_small", 32),
    ("efficientnet_b0", 32),
    ("squeezenet1_1", 32),
    ("shufflenet_v2_x0_5", 32),
]

SEEDS = {"squeezenet1_1": 3}
"""Others may begin with a last ReLU that lets nothing through."""

Gradients = list[torch.Tensor]


class Twice(nn.Module):
    """Calls one layer twice: norms of its calls do not add up."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.inner(torch.tanh(self.inner(images.flatten(1))))))
        return logits


class Towers(nn.Module):
    """The layer that is called first does not lie before all others."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        logits: torch.Tensor = self.left(flat) * self.right(flat)
        return logits


class Borrowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.hidden = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        logits: torch.Tensor = self.inner(flat) + nn.functional.linear(flat, self.hidden.weight)
        return logits


class Root(nn.Module):
    """Gives an infinite slope for an image of nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        logits: torch.Tensor = torch.sqrt(self.inner(flat) ** 2 + flat.square().sum(dim=1, keepdim=True))
        return logits


def convolutions() -> nn.Module:
    """Every way in which a convolution may look at its image."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(4, 8, 3, padding="same", groups=2, bias=False),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=8),
        nn.Conv2d(8, 6, 1, padding_mode="circular", padding=(0, 1)),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


def linear_on_maps() -> nn.Module:
    """A linear layer on four dimensions, for which Opacus has no norm."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))


OWN: dict[str, Callable[[], nn.Module]] = {
    "twice": Twice,
    "towers": Towers,
    "convolutions": convolutions,
    "linear_on_maps": linear_on_maps,
}


def vision(name: str, size: int) -> nn.Module:
    labels = ("a", "b", "c")
    task = TaskSpec(
        model=name, labels=labels, channels=1, height=size, width=size, mean=(0.5,), std=(0.5,), dp_ready=True
    )
    model = build(task, seed=SEEDS.get(name, 1))
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            vars(module)["p"] = 0.0  # a loop and a batch would drop out differently
    return model


def loop(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[Gradients]:
    """Gradients of single samples, one backward pass after the other."""
    return [
        list(
            torch.autograd.grad(
                nn.functional.cross_entropy(model(image[None]), label[None]), trainable(model)
            )
        )
        for image, label in zip(images, labels, strict=True)
    ]


def norms_of(gradients: list[Gradients]) -> torch.Tensor:
    return torch.stack([torch.cat([part.flatten() for part in each]).norm() for each in gradients])


def clipped_by_loop(gradients: list[Gradients], clip_norm: float) -> Gradients:
    factors = (clip_norm / norms_of(gradients)).clamp(max=1)
    return [sum(f * g for f, g in zip(factors, parts, strict=True)) for parts in zip(*gradients, strict=True)]


def clipped(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, clip_norm: float
) -> tuple[Gradients, Mode]:
    sums: Sums = {parameter: torch.zeros_like(parameter) for parameter in trainable(model)}
    with dpsgd.clipping(model, clip_norm, images[:1]) as clipper:
        clipper.add(images, labels, sums, len(images))
    return list(sums.values()), clipper.mode


def assert_equals_a_loop(model: nn.Module, size: int) -> Mode:
    model = model.double()
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(4, 1, size, size, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1])
    single = loop(model, images, labels)
    norms = norms_of(single)
    clip_norm = float(norms.max() + norms.min()) / 2  # some are clipped, some are not
    assert norms.min() < clip_norm < norms.max()
    found, mode = clipped(model, images, labels, clip_norm)
    for ours, expected in zip(found, clipped_by_loop(single, clip_norm), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9 * clip_norm)
    return mode


@pytest.mark.parametrize(("name", "size"), MODELS, ids=str)
def test_clipped_sums_equal_a_loop(name: str, size: int) -> None:
    assert assert_equals_a_loop(vision(name, size), size) is Mode.GHOST


@pytest.mark.parametrize("name", OWN)
def test_clipped_sums_of_odd_models_equal_a_loop(name: str) -> None:
    torch.manual_seed(1)
    assert assert_equals_a_loop(OWN[name](), 4) is (Mode.HOOKS if name == "twice" else Mode.GHOST)


def test_hooks_know_the_gradients_of_all_convolutions() -> None:
    torch.manual_seed(1)
    body = convolutions()
    twice = nn.Sequential(body, nn.Linear(3, 3), nn.Tanh())
    twice.append(twice[1])  # makes hooks of it

    assert assert_equals_a_loop(twice, 4) is Mode.HOOKS


def small_round(**changes: float) -> PrivateRound:
    values = {"noise_multiplier": 1.0, "clip_norm": 1.0, "sample_rate": 0.5, "steps": 1} | changes
    return PrivateRound(**values)  # type: ignore[arg-type]


class Recorder:
    """An optimizer that keeps the gradients that it is given, and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.seen: list[Gradients] = []

    def step(self) -> None:
        self.seen.append([p.grad.clone() for p in trainable(self._model) if p.grad is not None])

    def flat(self, step: int = 0) -> torch.Tensor:
        return torch.cat([part.flatten() for part in self.seen[step]])


def data(samples: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(samples, 1, 4, 4, generator=generator), torch.arange(samples) % 3


def run(
    model: nn.Module,
    private: PrivateRound,
    *,
    samples: int = 12,
    rows_seen: list[np.ndarray] | None = None,
    **options: object,
) -> Recorder:
    images, labels = data(samples)

    def batch(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if rows_seen is not None:
            rows_seen.append(rows)
        return images[rows], labels[rows]

    recorder = Recorder(model)
    dpsgd.train(model, recorder, private, samples=samples, batch=batch, **options)  # type: ignore[arg-type]
    return recorder


@pytest.mark.parametrize("physical", [1, 5, 64])
@pytest.mark.parametrize("factory", [convolutions, Twice])
def test_a_step_without_noise_is_the_formula(factory: Callable[[], nn.Module], physical: int) -> None:
    model = factory()
    images, labels = data()
    # With all samples in each batch and noise below float32, the gradient is the clipped sum over q n = n.
    seen = run(model, small_round(noise_multiplier=1e-9, sample_rate=1.0), physical_batch=physical).seen[0]
    for ours, expected in zip(seen, clipped_by_loop(loop(model, images, labels), 1.0), strict=True):
        torch.testing.assert_close(ours, expected / 12, rtol=1e-4, atol=1e-6)


def test_the_divisor_is_the_expected_batch_and_not_the_drawn_one() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images, labels = data()
    rows: list[np.ndarray] = []
    seen = run(model, small_round(noise_multiplier=1e-9, sample_rate=0.5), rows_seen=rows).seen[0]
    drawn = np.unique(np.concatenate(rows[1:])) if len(rows) > 1 else np.empty(0, np.int64)
    expected = clipped_by_loop(loop(model, images[drawn], labels[drawn]), 1.0) if len(drawn) else [0.0, 0.0]
    for ours, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(wanted).expand_as(ours) / 6, rtol=1e-4, atol=1e-6)


def test_noise_is_sigma_times_clip_norm_in_every_weight() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2000))
    noise = run(model, small_round(noise_multiplier=3.0, clip_norm=0.5, sample_rate=1e-9)).flat() * (
        1e-9 * 12
    )

    # 34,000 weights: the standard error of the deviation is 0.4 %.
    assert float(noise.std()) == pytest.approx(1.5, rel=0.02)
    assert abs(float(noise.mean())) < 5 * 1.5 / np.sqrt(noise.numel())


def test_batches_of_nothing_are_steps_of_noise_alone() -> None:
    model = convolutions()
    for private in (small_round(sample_rate=1e-9, steps=3), small_round(sample_rate=0.08, steps=20)):
        recorder = run(model, private)
        assert len(recorder.seen) == private.steps
        assert all(bool(torch.isfinite(recorder.flat(step)).all()) for step in range(private.steps))


def test_no_seed_repeats_noise_or_batches() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    rows: list[list[np.ndarray]] = [[], []]
    noise = []
    for index in (0, 1):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 - the generator that a library might use
        noise.append(run(model, small_round(sample_rate=1e-9)).flat())
        torch.manual_seed(1)
        run(model, small_round(sample_rate=0.5), samples=1000, rows_seen=rows[index])

    assert not torch.equal(*noise)
    assert [list(part) for part in rows[0]] != [list(part) for part in rows[1]]


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.999])
def test_each_row_is_drawn_with_the_rate(rate: float) -> None:
    drawn = [len(dpsgd.poisson_rows(50_000, rate)) for _ in range(20)]

    deviation = np.sqrt(rate * (1 - rate) / 1_000_000)
    assert sum(drawn) / 1_000_000 == pytest.approx(rate, abs=6 * deviation)
    assert len(set(drawn)) > 1, "the size of a batch is random too"
    assert list(dpsgd.poisson_rows(5, 1.0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("physical", "sizes"), [(64, {16, 32, 48, 64}), (5, {5})])
def test_physical_batches_are_bounded_and_have_few_sizes(physical: int, sizes: set[int]) -> None:
    rows: list[np.ndarray] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    run(model, small_round(steps=8), samples=900, rows_seen=rows, physical_batch=physical)

    assert {len(part) for part in rows[1:]} <= sizes


def test_a_sample_without_a_finite_gradient_adds_nothing() -> None:
    torch.manual_seed(1)
    model = Root()
    nn.init.zeros_(model.inner.bias)
    images, labels = data()
    images[3] = 0.0
    found, _ = clipped(model, images, labels, 1.0)
    keep = torch.arange(12) != 3
    expected, _ = clipped(model, images[keep], labels[keep], 1.0)

    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_what_only_fills_up_a_batch_adds_nothing() -> None:
    model = convolutions()
    images, labels = data()
    sums: Sums = {parameter: torch.zeros_like(parameter) for parameter in trainable(model)}
    with dpsgd.clipping(model, 1.0, images[:1]) as clipper:
        clipper.add(images, labels, sums, 5)
    expected, _ = clipped(model, images[:5], labels[:5], 1.0)

    for ours, wanted in zip(sums.values(), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


def traces(model: nn.Module) -> list[str]:
    left = [name for p in model.parameters() for name in vars(p)]
    left += [name for p in model.parameters() if p.grad is not None for name in ["grad"]]
    for module in model.modules():
        left += [str(hook) for hook in (*module._forward_hooks.values(), *module._backward_hooks.values())]
        left += [name for name in ("activations", "max_batch_len") if hasattr(module, name)]
    return left


@pytest.mark.parametrize("factory", [convolutions, Twice])
def test_nothing_is_left_on_the_model_even_when_stopped(factory: Callable[[], nn.Module]) -> None:
    model = factory()
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 5:
            raise KeyboardInterrupt

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        run(model, small_round(sample_rate=1.0, steps=4), before_batch=stop, physical_batch=4)
    assert traces(model) == []
    assert model.state_dict().keys() == before.keys()

    for _ in range(2):  # round after round on the same model
        run(model, small_round())
        assert traces(model) == []


def test_a_loss_that_fails_in_the_middle_leaves_nothing() -> None:
    model = convolutions()
    images, labels = data()
    with pytest.raises(IndexError):
        clipped(model, images, labels + 5, 1.0)

    assert traces(model) == []
    assert clipped(model, images, labels, 1.0)[1] is Mode.GHOST


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4)), "'2'.*BatchNorm"),
        (
            nn.Sequential(nn.Flatten(1), nn.Conv1d(16, 3, 3, padding=1, padding_mode="circular")),
            "'1'.*'circular'",
        ),
        (nn.Sequential(nn.Flatten()), "no weights"),
        (Borrowing(), "'hidden.weight'"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model: nn.Module, words: str) -> None:
    with pytest.raises(TermsError, match=words):
        dpsgd.try_out(model, data(2)[0])


def test_trying_out_changes_nothing() -> None:
    model = convolutions()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    assert dpsgd.try_out(model, data(2)[0]) is Mode.GHOST
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert traces(model) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.0},
        {"clip_norm": float("inf")},
        {"sample_rate": 1.5},
        {"sample_rate": 0.0},
        {"steps": 0},
    ],
)
def test_a_round_out_of_range_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(TermsError, match=next(iter(changes))):
        run(convolutions(), small_round(**changes))


def test_memory_bounds_the_physical_batch() -> None:
    small, large = nn.Linear(10, 10), nn.Linear(2000, 2000)

    assert dpsgd.largest_physical_batch(small, 2**34) == 256
    assert dpsgd.largest_physical_batch(large, 2**34) == dpsgd.PHYSICAL_BATCH
    assert dpsgd.largest_physical_batch(large, 2**30) == 16
    assert dpsgd.largest_physical_batch(large, 0) == 1
    assert dpsgd.largest_physical_batch(nn.Linear(350, 350), 2**34) == 32, "34 would be filled up to 48"


def test_opacus_does_not_take_over_the_logging() -> None:
    script = """
import logging
from torch import nn
from privacy.dpsgd import check_model
check_model(nn.Linear(2, 2))
assert not logging.getLogger().handlers, logging.getLogger().handlers
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
