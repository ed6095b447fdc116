"""What one round of private training may cost, and how it is trained so that it costs no more."""

from collections.abc import Sequence
from dataclasses import dataclass

from privacy.accounting import Spend, epsilon_pld, noise_multiplier_for, snapped_up, within
from privacy.errors import OverBudgetError, TermsError
from privacy.ledger_format import Entry

MOST_NOISE = 4.0
"""Times the least noise of a run: rounds that were paid for more than once make the later ones noisier, up to here. An update
counts as much as any other, so one with four times the noise weighs as sixteen in the variance of the average."""


@dataclass(frozen=True, slots=True)
class PrivateRound:
    """How a device trains in one round under DP-SGD: what was paid for, to be carried out to the letter.

    Attributes:
        noise_multiplier: Standard deviation of the noise on a batch's summed gradient, in units of ``clip_norm``.
        clip_norm: L2 norm to which the gradient of each sample is clipped.
        sample_rate: Probability with which each sample enters a batch, independently of all others (Poisson).
        steps: Optimizer steps, empty batches included.
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    steps: int

    @property
    def spend(self) -> Spend:
        """What it costs."""
        return Spend(self.noise_multiplier, self.sample_rate, self.steps)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a plan asks of sample-level privacy.

    Attributes:
        run: Of the plan.
        round: Of the plan.
        rounds: Of the run.
        clip_norm: L2 norm to which the gradient of each sample is clipped.
        delta: At which epsilon is stated.
        epsilon: Most that the run may spend; 0 if ``noise_multiplier`` is given.
        noise_multiplier: To be used as it is; 0 if ``epsilon`` is given.
        batch_size: Samples per step, on average.
        epochs: Passes over the data, on average.
        max_steps: After which training ends early; 0 for no limit.
    """

    run: str
    round: int
    rounds: int
    clip_norm: float
    delta: float
    epsilon: float
    noise_multiplier: float
    batch_size: int
    epochs: int
    max_steps: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device spends at most on its data in a federation, whatever any plan says.

    Attributes:
        max_epsilon: Over all runs; 0 forbids private training.
        max_delta: Largest delta that a plan may state epsilon at.
    """

    max_epsilon: float
    max_delta: float


def plan_round(terms: Terms, paid: Sequence[Entry], limits: Limits, samples: int) -> PrivateRound:
    """Decide how a device trains in a round, and that it may.

    A step takes each sample with probability q = batch_size / n, rounded up to three digits; an epoch is round(1/q)
    steps. Noise, where the plan gives a target epsilon, is what the run used last if the rounds that are left fit with
    it, else the least with which they fit, counting what the run has spent on this device already. Where that would be more
    than :data:`MOST_NOISE` times what the run began with, the budget counts as exhausted.

    Args:
        terms: Of the plan.
        paid: The whole ledger.
        limits: Of the device.
        samples: In the device's training data, n.

    Returns:
        What must be paid for before the first step.

    Raises:
        TermsError: If the data or the terms do not allow private training.
        OverBudgetError: If the round would exceed the run's epsilon or the device's.
    """
    _check_terms(terms, limits, samples)
    rate, steps = steps_of(samples, terms.batch_size, terms.epochs, terms.max_steps)
    noise = terms.noise_multiplier or _noise_for_run(terms, paid, rate, steps)
    private = PrivateRound(noise, terms.clip_norm, rate, steps)
    spends = [entry.spend for entry in paid]
    if not within([*spends, private.spend], terms.delta, limits.max_epsilon):
        spent = epsilon_pld(spends, terms.delta)
        after = epsilon_pld([*spends, private.spend], terms.delta)
        raise OverBudgetError(
            f"epsilon {spent:.3g} is spent on this device's data (delta {terms.delta:g}); round {terms.round} would make "
            f"it {after:.3g}, and this device allows {limits.max_epsilon:g}: let the federation ask for more noise or "
            "fewer steps, or start the agent with a larger --max-epsilon if the owners of the data agree",
            spent=spent,
            limit=limits.max_epsilon,
        )
    return private


def steps_of(samples: int, batch_size: int, epochs: int, max_steps: int) -> tuple[float, int]:
    """The sampling rate and the steps of a round.

    Args:
        samples: In the training data; not fewer than ``batch_size``.
        batch_size: On average.
        epochs: Passes over the data, on average.
        max_steps: Limit; 0 for none.

    Returns:
        q in (0, 1], and steps.
    """
    rate = min(1.0, snapped_up(batch_size / samples))
    steps = epochs * max(1, round(1 / rate))
    return rate, min(steps, max_steps) if max_steps else steps


def _check_terms(terms: Terms, limits: Limits, samples: int) -> None:
    # The texts travel to the aggregator: they do not tell how many samples there are.
    if samples < terms.batch_size:
        raise TermsError(
            f"this device has fewer training samples than a batch of {terms.batch_size}: private training needs a batch "
            "drawn from many. Add images, or let the federation use a smaller train.batch_size"
        )
    if terms.delta > limits.max_delta:
        raise TermsError(
            f"the plan states epsilon at delta {terms.delta:g}, this device allows {limits.max_delta:g} at most: let the "
            "federation lower privacy.sample.delta"
        )
    if terms.delta * samples >= 1:
        raise TermsError(
            f"delta {terms.delta:g} is not below 1 / training samples of this device: a mechanism that publishes a sample at "
            "random would satisfy it. Let the federation lower privacy.sample.delta"
        )
    if not limits.max_epsilon:
        raise OverBudgetError(
            "this device's privacy budget is zero (--max-epsilon 0): it takes part in no round that costs any",
            spent=0.0,
            limit=0.0,
        )


def _noise_for_run(terms: Terms, paid: Sequence[Entry], rate: float, steps: int) -> float:
    of_run = [entry.spend for entry in paid if entry.run == terms.run]
    left = steps * max(1, terms.rounds - terms.round + 1)
    if not of_run:
        return noise_multiplier_for(terms.epsilon, terms.delta, of_run, rate, left)
    same = of_run[-1].noise_multiplier
    if within([*of_run, Spend(same, rate, left)], terms.delta, terms.epsilon):
        return same
    noise = noise_multiplier_for(terms.epsilon, terms.delta, of_run, rate, left)
    least = min(spend.noise_multiplier for spend in of_run)
    if noise > MOST_NOISE * least:
        spent = epsilon_pld(of_run, terms.delta)
        raise OverBudgetError(
            f"epsilon {spent:.3g} of {terms.epsilon:g} is spent in this run (delta {terms.delta:g}); what is left is enough "
            f"for round {terms.round} only with noise {noise:g}, where the run began with {least:g}: such an update would "
            "harm the model. This device sits out the rest of the run; the next run has a budget of its own",
            spent=spent,
            limit=terms.epsilon,
        )
    return noise
