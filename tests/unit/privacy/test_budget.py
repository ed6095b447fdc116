"""What a device may do in a round: how noise follows from a target, and every refusal before training."""

from dataclasses import replace

import pytest

from privacy.accounting import Spend, epsilon_pld
from privacy.budget import Limits, PrivateRound, Terms, plan_round, steps_of
from privacy.errors import OverBudgetError, TermsError
from privacy.ledger_format import Entry

LIMITS = Limits(max_epsilon=8.0, max_delta=1e-5)
TARGET = Terms(
    run="a" * 16,
    round=1,
    rounds=10,
    clip_norm=1.5,
    delta=1e-5,
    epsilon=3.0,
    noise_multiplier=0.0,
    batch_size=64,
    epochs=1,
    max_steps=0,
)
NOISE = replace(TARGET, epsilon=0.0, noise_multiplier=1.1)
SAMPLES = 12_000


def paid(private: PrivateRound, number: int, run: str = TARGET.run) -> Entry:
    return Entry(
        number=number,
        time=0.0,
        kind="dp-sgd",
        run=run,
        round=number,
        attempt=1,
        model="b" * 64,
        noise_multiplier=private.noise_multiplier,
        clip_norm=private.clip_norm,
        sample_rate=private.sample_rate,
        steps=private.steps,
        delta=1e-5,
        data="digits",
    )


def epsilon(entries: list[Entry]) -> float:
    return epsilon_pld([entry.spend for entry in entries], 1e-5)


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "max_steps", "expected"),
    [
        (12_000, 64, 1, 0, (0.00534, 187)),
        (12_000, 64, 3, 0, (0.00534, 561)),
        (12_000, 64, 3, 200, (0.00534, 200)),
        (100, 64, 1, 0, (0.64, 2)),
        (64, 64, 2, 0, (1.0, 2)),
        (1, 1, 1, 0, (1.0, 1)),
    ],
)
def test_steps_follow_from_the_snapped_rate(
    samples: int, batch: int, epochs: int, max_steps: int, expected: tuple[float, int]
) -> None:
    assert steps_of(samples, batch, epochs, max_steps) == expected


def test_given_noise_is_used_as_it_is() -> None:
    assert plan_round(NOISE, [], LIMITS, SAMPLES) == PrivateRound(1.1, 1.5, 0.00534, 187)


def test_a_target_lasts_for_all_rounds_and_little_is_left() -> None:
    ledger: list[Entry] = []
    for number in range(1, 11):
        private = plan_round(replace(TARGET, round=number), ledger, LIMITS, SAMPLES)
        ledger.append(paid(private, number))
    assert len({entry.noise_multiplier for entry in ledger}) == 1
    assert 2.95 < epsilon(ledger) <= 3.0


def test_a_round_that_is_paid_twice_makes_the_rest_noisier() -> None:
    ledger: list[Entry] = []
    for number in (1, 2, 2, 3):
        private = plan_round(replace(TARGET, round=number, rounds=3), ledger, LIMITS, SAMPLES)
        ledger.append(paid(private, len(ledger) + 1))
    noises = [entry.noise_multiplier for entry in ledger]
    assert noises[0] == noises[1] < noises[2] == noises[3]
    assert epsilon(ledger) <= 3.0


def test_another_run_spends_from_the_device_but_not_from_this_run() -> None:
    other = [paid(PrivateRound(0.7, 1.5, 0.00534, 1870), 1, run="b" * 16)]
    first = plan_round(TARGET, [], LIMITS, SAMPLES)
    assert plan_round(TARGET, other, LIMITS, SAMPLES) == first
    with pytest.raises(OverBudgetError):
        plan_round(TARGET, other, Limits(max_epsilon=epsilon(other), max_delta=1e-5), SAMPLES)


def test_the_run_can_be_exhausted_before_the_device_is() -> None:
    ledger = [paid(PrivateRound(0.6, 1.5, 0.00534, 1870), 1)]
    with pytest.raises(OverBudgetError, match="of 3 is spent"):
        plan_round(TARGET, ledger, LIMITS, SAMPLES)


def test_no_plan_exceeds_what_the_device_allows() -> None:
    limits, ledger = replace(LIMITS, max_epsilon=2.0), [paid(plan_round(NOISE, [], LIMITS, SAMPLES), 1)]
    while epsilon([*ledger, ledger[-1]]) <= 2.0:
        ledger.append(paid(plan_round(NOISE, ledger, limits, SAMPLES), len(ledger) + 1))
    with pytest.raises(OverBudgetError, match="this device allows 2") as refused:
        plan_round(NOISE, ledger, limits, SAMPLES)
    assert epsilon(ledger) > 1.8
    assert refused.value.spent == epsilon(ledger)
    assert f"{epsilon([*ledger, ledger[-1]]):.3g}" in str(refused.value)
    assert "--max-epsilon" in str(refused.value)


def test_a_budget_of_zero_pays_for_nothing() -> None:
    with pytest.raises(OverBudgetError, match="budget is zero"):
        plan_round(replace(NOISE, noise_multiplier=1e6), [], replace(LIMITS, max_epsilon=0.0), SAMPLES)


@pytest.mark.parametrize(
    "terms",
    [
        replace(TARGET, rounds=1_000_000),
        replace(TARGET, rounds=1_000_000, epochs=1000, batch_size=1),
        replace(TARGET, delta=5e-324),
        replace(NOISE, noise_multiplier=1e12, batch_size=SAMPLES),
    ],
)
def test_extreme_plans_are_paid_without_much_memory(terms: Terms) -> None:
    assert plan_round(terms, [], LIMITS, SAMPLES).noise_multiplier > 2.0


def test_next_to_no_epsilon_needs_much_noise() -> None:
    private = plan_round(replace(TARGET, epsilon=5e-324), [], LIMITS, SAMPLES)
    assert epsilon_pld([Spend(private.noise_multiplier, private.sample_rate, 1870)], 1e-5) == 0.0


@pytest.mark.parametrize("noise", [5e-324, 1e-12, 1e-3])
def test_next_to_no_noise_is_over_any_budget(noise: float) -> None:
    with pytest.raises(OverBudgetError):
        plan_round(replace(NOISE, noise_multiplier=noise), [], LIMITS, SAMPLES)


@pytest.mark.parametrize(
    ("terms", "samples", "says"),
    [
        (NOISE, 63, "a batch of 64"),
        (NOISE, 0, "a batch of 64"),
        (replace(NOISE, delta=2e-5), SAMPLES, "this device allows 1e-05"),
        (NOISE, 100_000, "publishes a sample at random"),
    ],
)
def test_terms_that_do_not_fit_the_data_are_refused(terms: Terms, samples: int, says: str) -> None:
    with pytest.raises(TermsError, match=says) as refused:
        plan_round(terms, [], LIMITS, samples)
    assert str(samples) not in str(refused.value), "it is sent to the aggregator"


def test_a_batch_as_large_as_the_data_claims_no_amplification() -> None:
    private = plan_round(replace(NOISE, noise_multiplier=5.0), [], LIMITS, 64)
    assert private.spend == Spend(5.0, 1.0, 1)
