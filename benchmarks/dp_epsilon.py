"""Is the epsilon that a device reports right, and what does the accounting cost after a hundred rounds?

The reference is dp-accounting's own PLD accountant with bins so narrow that its rounding no longer shows. Both round up, so
the report must not be below it.
"""

import math
import time
from dataclasses import replace

from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from benchmarks.runner import Options, Results, middle, say
from privacy.accounting import Spend, epsilon_pld
from privacy.budget import Limits, Terms, plan_round
from privacy.ledger_format import DP_SGD, Entry

DELTA = 1e-5
SAME = 1e-4
"""Relative difference that is the reference's own rounding."""

_WIDEST, _SHARE = 1e-4, 0.005
"""Bins of the reference: at most so wide, and so narrow a share of epsilon / sqrt(steps)."""

LIMITS = Limits(max_epsilon=50.0, max_delta=DELTA)
RUN = Terms(
    run="0" * 16,
    round=1,
    rounds=10,
    clip_norm=1.0,
    delta=DELTA,
    epsilon=3.0,
    noise_multiplier=0.0,
    batch_size=64,
    epochs=1,
    max_steps=0,
)

FIXED: dict[str, list[Spend]] = {
    "textbook": [Spend(1.1, 0.01, 1000)],
    "MNIST, a fifth, 10 epochs": [Spend(1.1, 0.00534, 1870)],
    "little noise": [Spend(0.6, 0.02, 500)],
    "much noise": [Spend(5.0, 0.05, 2000)],
    "a single step": [Spend(1.0, 0.1, 1)],
    "five large batches": [Spend(0.8, 0.3, 5)],
    "half of the data": [Spend(5.0, 0.5, 100)],
    "no sampling": [Spend(20.0, 1.0, 100)],
    "no sampling, one step": [Spend(4.0, 1.0, 1)],
    "tiny rate": [Spend(0.8, 0.0005, 5000)],
    "tiny epsilon": [Spend(30.0, 0.01, 100)],
    "two kinds": [Spend(1.1, 0.01, 500), Spend(0.8, 0.02, 100)],
    "sampled and not": [Spend(1.0, 0.01, 500), Spend(10.0, 1.0, 5)],
    "three kinds": [Spend(0.9, 0.005, 400), Spend(2.0, 0.1, 40), Spend(1.3, 0.03, 300)],
    "ever more noise": [Spend(0.8 + 0.1 * number, 0.01, 100) for number in range(8)],
    "ever more data": [Spend(1.0, round(0.02 / number, 4), 50 * number) for number in range(1, 7)],
}
"""What a ledger may hold, as it stands."""


def histories() -> dict[str, list[Spend]]:
    """What ledgers hold after runs whose noise the device has derived itself."""
    return {
        "a run at epsilon 1": spends(device_run(replace(RUN, epsilon=1.0), [12_000] * 10)),
        "a run, rounds 3 and 7 paid twice": spends(device_run(RUN, [12_000] * 10, again=(3, 7))),
        "a run, data grows": spends(device_run(RUN, [4_000 + 500 * number for number in range(10)])),
        "a run at epsilon 7, small data": spends(device_run(replace(RUN, epsilon=7.0), [600] * 10)),
    }


def device_run(terms: Terms, samples: list[int], again: tuple[int, ...] = ()) -> list[Entry]:
    """The ledger of a device after a run.

    Args:
        terms: Of the first round.
        samples: That the device has in each round.
        again: Rounds that were broken off and trained once more.
    """
    ledger: list[Entry] = []
    for number, count in enumerate(samples, 1):
        for _ in range(1 + (number in again)):
            pay(replace(terms, round=number), ledger, count)
    return ledger


def pay(terms: Terms, ledger: list[Entry], samples: int) -> None:
    """One round more, as a device plans and pays it."""
    private = plan_round(terms, ledger, LIMITS, samples)
    ledger.append(
        Entry(
            number=len(ledger) + 1,
            time=0.0,
            kind=DP_SGD,
            run=terms.run,
            round=terms.round,
            attempt=1,
            model="0" * 64,
            noise_multiplier=private.noise_multiplier,
            clip_norm=private.clip_norm,
            sample_rate=private.sample_rate,
            steps=private.steps,
            delta=terms.delta,
            data="",
        )
    )


def spends(ledger: list[Entry]) -> list[Spend]:
    """What a ledger holds."""
    return [entry.spend for entry in ledger]


def reference(what: list[Spend], epsilon: float) -> float:
    """Epsilon by dp-accounting.

    Args:
        what: In any order.
        epsilon: About what comes out; the bins follow from it.
    """
    width = min(_WIDEST, _SHARE * epsilon / math.sqrt(sum(spend.steps for spend in what)))
    accountant = PLDAccountant(value_discretization_interval=width)
    steps: dict[tuple[float, float], int] = {}
    for spend in what:
        key = spend.noise_multiplier, spend.sample_rate
        steps[key] = steps.get(key, 0) + spend.steps
    for (noise, rate), count in steps.items():
        step = GaussianDpEvent(noise)
        accountant.compose(step if rate == 1 else PoissonSampledDpEvent(rate, step), count)
    return float(accountant.get_epsilon(DELTA))


def accounting_seconds(rounds: int, growth: int) -> float:
    """What a round's accounting takes: the plan, and both figures of the report; median of the last five.

    Args:
        rounds: After so many.
        growth: Samples that the device gains from round to round: another sampling rate each time.
    """
    terms, ledger, taken = replace(RUN, rounds=rounds, epsilon=20.0), list[Entry](), []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        pay(replace(terms, round=number), ledger, 12_000 + growth * number)
        epsilon_pld(spends(ledger), DELTA)
        epsilon_pld(spends(ledger[-1:]), DELTA)
        taken.append(time.perf_counter() - began)
    return middle(taken[-5:])


def measure_epsilon(options: Options, results: Results) -> None:
    """The part ``epsilon`` of ``python -m benchmarks.dp``."""
    settings = FIXED | histories()
    say(f"reported epsilon against dp-accounting's PLD in {len(settings)} settings, delta {DELTA:g}")
    excesses = []
    for name, what in settings.items():
        reported = epsilon_pld(what, DELTA)
        exact = reference(what, reported)
        excesses.append(reported / exact - 1)
        say(f"  {name:<34} reported {reported:9.5f}  PLD {exact:9.5f}  {excesses[-1]:+.4%}")
    results.add(
        "epsilon_settings",
        len(excesses),
        "",
        "settings, of rounds that differ among each other in half of them",
    )
    results.add(
        "epsilon_worst_excess", 100 * max(excesses), "%", "reported epsilon above dp-accounting's PLD at most"
    )
    results.add(
        "epsilon_below",
        sum(excess < -SAME for excess in excesses),
        "",
        "settings in which the report was below it",
    )
    rounds = 30 if options.quick else 100
    alike, unlike = accounting_seconds(rounds, 0), accounting_seconds(rounds, 120)
    results.add("accounting_s", alike, "s", f"accounting of a round after {rounds} that were alike")
    results.add(
        "accounting_s_unlike", unlike, "s", f"accounting of a round after {rounds} with 1 % more data each"
    )
