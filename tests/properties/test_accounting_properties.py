"""Epsilon moves as the mathematics says, whatever the numbers; noise for a target always fits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accounting import RATE_DIGITS, Spend, epsilon_pld, epsilon_rdp, noise_multiplier_for, snapped_up

DELTA = 1e-5
ROUNDING = 1.0 + 1e-9
BINS = 1.005
"""A PLD's bins follow from the setting: two settings side by side may differ by the rounding of both."""

noises = st.floats(0.4, 50.0)
rates = st.floats(1e-4, 1.0)
steps = st.integers(1, 5000)
spends = st.builds(Spend, noises, rates, steps)
factors = st.floats(1.0, 3.0)
usual = st.builds(Spend, st.floats(0.7, 20.0), st.floats(1e-3, 0.3), st.integers(1, 1000))
few = settings(max_examples=15)
"""Of what takes a tenth of a second each."""


@given(spends, st.integers(0, 5000))
def test_more_steps_cost_more(spend: Spend, more: int) -> None:
    longer = Spend(spend.noise_multiplier, spend.sample_rate, spend.steps + more)
    assert epsilon_rdp([spend], DELTA) <= epsilon_rdp([longer], DELTA) * ROUNDING


@given(spends, factors)
def test_a_higher_rate_costs_more(spend: Spend, factor: float) -> None:
    denser = Spend(spend.noise_multiplier, min(1.0, spend.sample_rate * factor), spend.steps)
    assert epsilon_rdp([spend], DELTA) <= epsilon_rdp([denser], DELTA) * ROUNDING


@given(spends, factors)
def test_more_noise_costs_less(spend: Spend, factor: float) -> None:
    noisier = Spend(spend.noise_multiplier * factor, spend.sample_rate, spend.steps)
    assert epsilon_rdp([noisier], DELTA) <= epsilon_rdp([spend], DELTA) * ROUNDING


@given(spends, st.floats(1e-10, 1e-2), factors)
def test_a_larger_delta_states_less(spend: Spend, delta: float, factor: float) -> None:
    assert epsilon_rdp([spend], delta * factor) <= epsilon_rdp([spend], delta) * ROUNDING


@few
@given(usual, factors)
def test_the_reported_figure_moves_the_same_way(spend: Spend, factor: float) -> None:
    noise, rate, count = spend.noise_multiplier, spend.sample_rate, spend.steps
    middle = epsilon_pld([spend], DELTA)
    assert epsilon_pld([Spend(noise * factor, rate, count)], DELTA) <= middle * BINS
    assert epsilon_pld([Spend(noise, min(1.0, rate * factor), count)], DELTA) * BINS >= middle
    assert epsilon_pld([Spend(noise, rate, round(count * factor))], DELTA) * BINS >= middle
    assert middle <= epsilon_rdp([spend], DELTA)


@few
@given(st.lists(usual, min_size=2, max_size=3))
def test_rounds_together_cost_no_less_than_any_alone(rounds: list[Spend]) -> None:
    together = epsilon_pld(rounds, DELTA)
    each = [epsilon_pld([one], DELTA) for one in rounds]
    assert max(each) <= together * BINS
    assert together <= epsilon_rdp(rounds, DELTA) * ROUNDING


@few
@given(st.floats(0.3, 10.0), st.floats(1e-3, 0.3), st.integers(1, 1000))
def test_noise_for_a_target_fits(epsilon: float, rate: float, count: int) -> None:
    noise = noise_multiplier_for(epsilon, DELTA, [], rate, count)
    assert epsilon_pld([Spend(noise, rate, count)], DELTA) <= epsilon


@given(st.floats(1e-6, 1.0))
def test_rates_are_rounded_up_by_less_than_a_hundredth(rate: float) -> None:
    snapped = snapped_up(rate)
    assert rate <= snapped <= rate * 1.0101
    assert snapped_up(snapped) == snapped
    assert len(f"{snapped:.10g}".replace(".", "").strip("0").split("e")[0]) <= RATE_DIGITS
