"""What attackers can really tell from a training, without privacy and at epsilon 2: lower bounds, membership, pictures.

Everything as `privacy audit` does it: one fresh run for each seed and setting, trained centrally with the private step that
devices use.
"""

import time

import msgspec

from benchmarks.rounds import Data, find_data
from benchmarks.runner import BenchmarkError, Options, Results, main, middle, say
from federation.task.data import open_data, task_from_data
from federation.task.images import ImageData
from federation.task.models import build
from federation.wire.messages import TrainSpec
from privacy.commands.findings import Attack
from privacy.commands.fresh import Fresh, Outcome, attack_fresh
from privacy.commands.pictures import recover
from privacy.commands.training import Protection

QUESTION = "what can attackers tell from a training, without privacy and at epsilon 2?"
PARTS = ("membership", "pictures")

SEEDS = 5
EPSILON, DELTA = 2.0, 1e-5

OFF = TrainSpec(epochs=20, batch_size=32, learning_rate=0.02)
"""Long enough to remember single samples."""

PRIVATE = TrainSpec(epochs=15, batch_size=500, learning_rate=0.05)
"""Learns as well as these few samples and this epsilon allow: what has learned nothing cannot leak."""

CANARIES, GRADIENT_CANARIES = 1000, 500
POOL_OFF, POOL_PRIVATE = 2000, 3000
DIGITS_CANARIES, DIGITS_POOL = 500, 900
"""There are 1,437 training images."""

SHOWN = 5


def measure(options: Options, results: Results) -> None:
    """Run the parts that were asked for."""
    where = find_data()
    task = msgspec.structs.replace(task_from_data(where.spec, "cnn"), dp_ready=True)
    data = open_data(where.spec, task, train=True)
    if "membership" in options.parts:
        membership(1 if options.quick else SEEDS, where, data, results)
    if "pictures" in options.parts:
        pictures(where, data, results)


def membership(seeds: int, where: Data, data: ImageData, results: Results) -> None:
    """Bounds and membership for each seed, both settings."""
    off: list[Outcome] = []
    private: list[Outcome] = []
    for seed in range(seeds):
        off.append(_run(where, data, seed, protected=False))
        private.append(_run(where, data, seed, protected=True))
    runs = f"{seeds} seed{'s' if seeds > 1 else ''}"
    scope = f"{runs}; cnn, about {off[0].trained:,} samples without and {private[0].trained:,} with privacy, coins decide"
    key = where.suffix
    spent = max(run.epsilon for run in private if run.epsilon is not None)
    results.add(
        f"bound_off{key}",
        min(_bound(run) for run in off),
        "",
        f"without privacy: lower bound on epsilon (95 %), least of {scope}",
    )
    results.add(
        f"bound_eps2{key}",
        max(_bound(run) for run in private),
        "",
        f"at epsilon {spent:.3f}, delta {DELTA:g}: lower bound, largest of {runs} and of all attacks",
    )
    for name, some in (("off", off), ("eps2", private)):
        results.add(
            f"auc_{name}{key}",
            middle(_of(run, "mislabelled").membership.auc.value for run in some),
            "",
            f"of mislabelled canaries, median of {runs}; 0.5 is guessing",
        )
        results.add(
            f"tpr_{name}{key}",
            100 * middle(_of(run, "mislabelled").membership.tpr.value for run in some),
            "%",
            "of the same at 1 % false positives; 1 is guessing",
        )
        results.add(
            f"auc_loss_{name}{key}",
            middle(_of(run, "loss").membership.auc.value for run in some),
            "",
            "membership of ordinary pictures by their loss",
        )
        results.add(
            f"top1_{name}{key}",
            100 * middle(run.accuracy for run in some),
            "%",
            "on pictures that the coins left out",
        )
    results.add(
        f"auc_gradient_eps2{key}",
        middle(_of(run, "gradient").membership.auc.value for run in private),
        "",
        "of gradient canaries (white box), median",
    )
    results.add(
        f"bound_gradient_eps2{key}",
        middle(_of(run, "gradient").bound_epsilon for run in private),
        "",
        "of the same: lower bound, median",
    )


def pictures(where: Data, data: ImageData, results: Results) -> None:
    """Gradient inversion, mean correlation with the originals."""
    say(f"pictures: {SHOWN} recovered from gradients of the fresh model")
    began = time.monotonic()
    _, plain, masked, noised = recover(build(data.task), data, SHOWN, seed=0)
    for name, picture in (("plain", plain), ("masked", masked), ("noised", noised)):
        value = sum(picture.similarity) / SHOWN
        how = f"mean correlation of {SHOWN} recovered pictures with the originals; {picture.title}"
        results.add(f"inversion_{name}{where.suffix}", value, "", how)
    results.add(f"inversion_s{where.suffix}", time.monotonic() - began, "s", "that all of them took")


def _run(where: Data, data: ImageData, seed: int, *, protected: bool) -> Outcome:
    digits = bool(where.suffix)
    pool = POOL_PRIVATE if protected else POOL_OFF
    began = time.monotonic()
    found = attack_fresh(
        Fresh(
            data=data,
            spec=PRIVATE if protected else OFF,
            protection=Protection(epsilon=EPSILON, delta=DELTA, clip_norm=1.0) if protected else None,
            delta=DELTA,
            pictures=DIGITS_POOL if digits else pool,
            canaries=DIGITS_CANARIES if digits else CANARIES,
            gradient_canaries=GRADIENT_CANARIES,
            reference=False,
            seed=seed,
        )
    )
    shown = ", ".join(
        f"{attack.key} AUC {attack.membership.auc.value:.3f} bound {attack.bound_epsilon:.2f}"
        for attack in found.attacks
    )
    setting = "without privacy" if found.epsilon is None else f"epsilon {found.epsilon:.3f}"
    say(f"  seed {seed}, {setting}: {shown}; top-1 {found.accuracy:.1%}, {time.monotonic() - began:.0f} s")
    return found


def _bound(run: Outcome) -> float:
    return max(attack.bound_epsilon for attack in run.attacks)


def _of(run: Outcome, key: str) -> Attack:
    for attack in run.attacks:
        if attack.key == key:
            return attack
    raise BenchmarkError(f"the audit has no attack {key!r}")


if __name__ == "__main__":
    main("audit", QUESTION, measure, PARTS)
