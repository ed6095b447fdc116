"""Noise that devices add together against noise that a trusted aggregator adds, at the same epsilon.

``python -m benchmarks.secagg --part distributed``, or by itself ``python -m benchmarks.distributed``.

Updates have heavy tails, agree in part, and are longer than the clip norm, so that each uses up its whole sensitivity. One side
clips, rotates, rounds, adds Skellam noise, sums mod R and decodes; the other adds Gaussian noise to the sum of the clipped updates.
The Gaussian's noise multiplier follows from epsilon in one round, exactly: there is least noise, and hence rounding weighs most. The
distributed one is raised until its own accounting gives the same epsilon, so what that accounting gives away is in the figures. The error is the distance of the sum from that of the
clipped updates.
"""

import time
from collections.abc import Callable, Iterator
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from benchmarks.runner import Options, Results, main, middle, say
from federation.wire.codec import Schema
from federation.wire.shared_scale import SharedScale
from privacy.distributed import (
    epsilon_of,
    least_agents,
    noise_multiplier_for,
    share_variance,
)
from privacy.gaussian import draw, fill
from privacy.rounded_sum import NoisySum
from privacy.skellam import Skellam, keystream

QUESTION = "error of the sum with distributed noise against the central Gaussian's at equal epsilon"
PARTS = ("distributed",)

CNN: Schema = {"features": (51_200, 2), "fc1.weight": (640, 128), "fc1.bias": (128,), "fc2.weight": (166, 10), "rest": (2,)}  # fmt: skip
"""As many values as the seed CNN has: 186,110."""

MILLION: Schema = {"weight": (1_000_000,)}
CLIP_NORM, DELTA = 2.0, 1e-5
EPSILONS = (8.0, 3.0)
AGENTS = (10, 50, 100)
MODULI = (8, 16)
REPEATS, QUICK_REPEATS = 7, 5
GAUSSIAN_DRAWS = 10
DROPOUTS = 0.3
TABLE_AGENTS, TABLE_MODULI = (10, 50, 100, 1000), (8, 16, 32)
SPEED_VALUES, SPEED_REPEATS = 1_000_000, 7

Update = dict[str, NDArray[np.float32]]


def measure(options: Options, results: Results) -> None:
    """Errors, then speed."""
    repeats = QUICK_REPEATS if options.quick else REPEATS
    quantization_table()
    say(
        f"{'values':>9} {'agents':>6} {'modulus':>7} {'epsilon':>7} {'z':>6} {'central z':>9}  error over the central one"
    )
    worst = -1.0
    for bits in MODULI:
        excesses = []
        for agents in AGENTS:
            for epsilon in EPSILONS:
                excesses.append(_excess(CNN, agents, bits, epsilon, repeats))
                if not options.quick and agents in {AGENTS[0], AGENTS[-1]}:
                    excesses.append(_excess(MILLION, agents, bits, epsilon, repeats))
        results.add(
            f"distributed_excess_2_{bits}", max(excesses), "%", f"sum's error over the central Gaussian's at equal epsilon, "
            f"mod 2^{bits}: worst of 10 to 100 agents, medians of {repeats}",
        )  # fmt: skip
        worst = max(worst, *excesses)
    results.add("distributed_excess", worst, "%", "the worst of all of them")
    dropped = _excess(CNN, AGENTS[-1], MODULI[0], EPSILONS[0], repeats, dropouts=DROPOUTS)
    results.add(
        "distributed_excess_dropouts",
        dropped,
        "%",
        f"2^{MODULI[0]}, {AGENTS[-1]} agents, {DROPOUTS:.0%} vanish as assumed",
    )
    speed(results)


def quantization_table() -> None:
    """What rounding alone costs, without noise."""
    say(
        "error of the mean update by rounding, relative to the clip norm, 186,110 values (- where it cannot be)"
    )
    say(f"{'agents':>7} " + " ".join(f"{f'2^{bits}':>9}" for bits in TABLE_MODULI))
    for agents in TABLE_AGENTS:
        cells = []
        for bits in TABLE_MODULI:
            half = ((1 << bits) - 1) // 2 // agents
            cells.append(f"{_rounding_error(agents, bits):9.2e}" if half else f"{'-':>9}")
        say(f"{agents:>7} " + " ".join(cells))


def _rounding_error(agents: int, bits: int) -> float:
    """Of one device, over the root of how many: errors of devices are independent."""
    scale = SharedScale.of(CNN, clip_norm=CLIP_NORM, modulus_bits=bits, agents=agents)
    update = next(updates(CNN, 1))
    seed = bytes(16)
    decoded = scale.mean(scale.reduced(scale.integers(update, seed)), seed, 1)
    return sqrt(_squared(decoded, clipped(update))) / CLIP_NORM / sqrt(agents)


def _excess(
    schema: Schema, agents: int, bits: int, epsilon: float, repeats: int, dropouts: float = 0.0
) -> float:
    """Per cent by which the error is larger, the median of the repeats; prints its row."""

    def scale_with(noise: float) -> SharedScale:
        return SharedScale.of(
            schema,
            clip_norm=CLIP_NORM,
            modulus_bits=bits,
            agents=agents,
            noise_multiplier=noise,
            dropouts=dropouts,
        )

    def sum_with(noise: float) -> NoisySum:
        scale = scale_with(noise)
        return NoisySum.of(
            noise_multiplier=noise, clip_norm=CLIP_NORM, step=scale.step, largest=scale.largest
        )

    central = _central_noise(epsilon)
    noise = noise_multiplier_for(epsilon, DELTA, 1, sum_with, digits=4)
    spent = epsilon_of([sum_with(noise)], DELTA)
    assert spent <= epsilon
    scale = scale_with(noise)
    variance = share_variance(
        noise_multiplier=noise, clip_norm=CLIP_NORM, step=scale.step, agents=agents, dropouts=dropouts
    )
    skellam, entropy = Skellam(variance), keystream()
    left = least_agents(agents, dropouts)
    ratios = []
    for repeat in range(repeats):
        seed = repeat.to_bytes(16)
        total = np.zeros(scale.size, dtype=scale.dtype)
        exact = {name: np.zeros(shape) for name, shape in schema.items()}
        for update in updates(schema, left, repeat):
            total += scale.reduced(
                scale.integers(update, seed, entropy) + skellam.sample(scale.size, entropy)
            )
            for name, value in clipped(update).items():
                exact[name] += value
        mean = scale.mean(total, seed, left)
        error = sqrt(sum(float(((mean[name] * float(left) - exact[name]) ** 2).sum()) for name in schema))
        gaussian = sqrt(
            sum(float((draw(shape, central * CLIP_NORM) ** 2).sum()) for shape in schema.values())
        )
        ratios.append(100 * (error / gaussian - 1))
    say(
        f"{sum(prod(shape) for shape in schema.values()):>9,} {agents:>6} {f'2^{bits}':>7} {epsilon:>7g} {noise:>6.4g} "
        f"{central:>9.4g}  {middle(ratios):+.2f} % ({min(ratios):+.2f} to {max(ratios):+.2f})"
        + (f", {agents - left} of them vanished" if left < agents else "")
    )
    return middle(ratios)


def _gaussian_error(schema: Schema, noise: float) -> float:
    """Root of the mean square over several draws, so that the ratio varies by the other side alone."""
    squares = [
        sum(float((draw(shape, noise * CLIP_NORM) ** 2).sum()) for shape in schema.values())
        for _ in range(GAUSSIAN_DRAWS)
    ]
    return sqrt(sum(squares) / len(squares))


def _central_noise(epsilon: float) -> float:
    """Noise multiplier of the Gaussian mechanism in one round, exactly (Balle and Wang 2018, theorem 8)."""

    def excess(noise: float) -> float:
        tail = np.exp(norm.logcdf(-epsilon * noise - 1 / (2 * noise)) + epsilon)
        return float(norm.cdf(-epsilon * noise + 1 / (2 * noise)) - tail) - DELTA

    return float(brentq(excess, 0.1, 100.0))


def updates(schema: Schema, count: int, seed: int = 0) -> Iterator[Update]:
    """Twice as long as the clip norm or so, in one direction by half."""
    rng = np.random.default_rng([seed, 7])
    size = sum(prod(shape) for shape in schema.values())
    unit = CLIP_NORM / sqrt(size)
    together = {name: rng.standard_t(5, shape).astype(np.float32) for name, shape in schema.items()}
    for _ in range(count):
        yield {
            name: np.float32(unit) * (together[name] + 2 * rng.standard_normal(shape, dtype=np.float32))
            for name, shape in schema.items()
        }


def clipped(update: Update) -> dict[str, NDArray[np.float64]]:
    """To the clip norm, in float64."""
    length = sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in update.values()))
    share = min(1.0, CLIP_NORM / length)
    return {name: np.multiply(value, share, dtype=np.float64) for name, value in update.items()}


def _squared(one: Update, other: dict[str, NDArray[np.float64]]) -> float:
    return sum(float(((one[name] - other[name]) ** 2).sum()) for name in one)


def speed(results: Results) -> None:
    """Of the sampler, and of all that a device does for distributed noise, a million values."""
    scale = SharedScale.of(MILLION, clip_norm=CLIP_NORM, modulus_bits=8, agents=100, noise_multiplier=1.0)
    skellam = Skellam((CLIP_NORM / scale.step) ** 2 / 100)
    update, out, seed, entropy = next(updates(MILLION, 1)), np.empty(SPEED_VALUES), bytes(16), keystream()
    noise = skellam.sample(scale.size)
    results.add(
        "skellam_ns", _ns(lambda: skellam.sample(SPEED_VALUES)), "ns", "CPU a value, exact Skellam noise"
    )
    results.add(
        "gaussian_ns", _ns(lambda: fill(out, 1.0)), "ns", "CPU a value, Gaussian noise from the same entropy"
    )
    results.add(
        "shared_scale_ns",
        _ns(lambda: scale.integers(update, seed, entropy)),
        "ns",
        "CPU a value, clip, rotate, round",
    )
    total = scale.reduced(noise)
    results.add(
        "shared_scale_back_ns",
        _ns(lambda: scale.mean(total, seed, 100)),
        "ns",
        "CPU a value, sum to mean update",
    )


def _ns(action: Callable[[], object]) -> float:
    """A value of a million, the median of the repeats, CPU time of this process."""
    times = []
    for _ in range(SPEED_REPEATS):
        start = time.process_time_ns()
        action()
        times.append((time.process_time_ns() - start) / SPEED_VALUES)
    return middle(times)


if __name__ == "__main__":
    main("distributed", QUESTION, measure, PARTS)
