"""What the rounds of a run have spent of its client-level budget, for people and programs."""

from collections import Counter

import msgspec

from aggregator.round_noise import NoisyRound, bare_rounds, noisy_rounds
from aggregator.store import Store
from privacy.accounting import Spend, epsilon_pld, epsilon_rdp


class ClientPrivacy(msgspec.Struct, frozen=True):
    """Client-level privacy of a run.

    Attributes:
        epsilon: Spent so far, against those who see models and know no cohort.
        known_cohorts_epsilon: Spent so far on the device that was drawn most often, against those who know the cohorts,
            which plans name; None where no cohort was a secret draw.
        budget: Epsilon at which the run ends.
        delta: At which all of them are stated.
        paid_rounds: Rounds that were paid for, whether they were closed or not.
        bare_rounds: Rounds without noise. Above 0, epsilon says nothing about them.
        next_epsilon: What would be spent after one more round with the terms of the newest.
        exhausted: Whether that is above the budget, so that the run is over.
        noise_multiplier: Of the newest round.
        sampling_rate: Of the newest round.
        clip_norm: To which updates are clipped next.
    """

    epsilon: float
    known_cohorts_epsilon: float | None
    budget: float
    delta: float
    paid_rounds: int
    bare_rounds: int
    next_epsilon: float
    exhausted: bool
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float

    def to_text(self) -> str:
        """Lines for a terminal."""
        rounds = _rounds(self.paid_rounds)
        lines = [
            f"client-level privacy: epsilon {self.epsilon:.3g} of {self.budget:.4g} at delta {self.delta:g} after {rounds}",
            f"  the budget is spent: one more round would make {self.next_epsilon:.3g}"
            if self.exhausted
            else f"  one more round makes {self.next_epsilon:.3g}",
            f"  noise multiplier {self.noise_multiplier:g}, sampling rate {self.sampling_rate:g}, clip norm {self.clip_norm:.4g}",
        ]
        if self.known_cohorts_epsilon is not None:
            lines.append(f"  against whoever reads the plans: epsilon {self.known_cohorts_epsilon:.3g}")
        if self.bare_rounds:
            lines.append(f"  not counted: {_rounds(self.bare_rounds)} that had no noise")
        return "\n".join(lines)


def client_privacy(store: Store) -> ClientPrivacy | None:
    """Read it from the store; None where no round was paid for."""
    paid = noisy_rounds(store)
    if not paid:
        return None
    newest, spends = paid[-1], [row.spend for row in paid]
    after = epsilon_pld([*spends, newest.spend], newest.delta)
    return ClientPrivacy(
        epsilon=epsilon_pld(spends, newest.delta),
        known_cohorts_epsilon=_of_known_cohorts(store, paid),
        budget=newest.epsilon,
        delta=newest.delta,
        paid_rounds=len(paid),
        bare_rounds=len(bare_rounds(store)),
        next_epsilon=after,
        exhausted=after > newest.epsilon,
        noise_multiplier=newest.noise_multiplier,
        sampling_rate=newest.sampling_rate,
        clip_norm=newest.clip_norm if newest.next_clip_norm is None else newest.next_clip_norm,
    )


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def _of_known_cohorts(store: Store, paid: list[NoisyRound]) -> float | None:
    """For whoever knows who was drawn, a device's rounds cost it all of their noise, and the others nothing."""
    if all(row.sampling_rate == 1 for row in paid):
        return None
    cohorts = {row.round: row.cohort for row in store.rounds()}
    taken: dict[str, Counter[float]] = {}
    for row in paid:
        for agent in cohorts.get(row.round, ()):
            taken.setdefault(agent, Counter())[row.noise_multiplier] += 1
    parts = {tuple(sorted(counts.items())) for counts in taken.values()}
    costs = [[Spend(noise, 1.0, steps) for noise, steps in part] for part in parts]
    delta = paid[-1].delta
    worst = max(costs, key=lambda spends: epsilon_rdp(spends, delta), default=[])
    return epsilon_pld(worst, delta)
