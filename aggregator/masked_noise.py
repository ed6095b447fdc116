"""Distributed noise in masked sums: what each round costs, paid before it is announced, and when the budget ends the run.

The devices add the noise, and the mathematics is ``privacy.distributed``; this is its memory, the table ``masked_noise``. A round
is paid for in a committed row before any device is told of it, and nothing is given back, though its sum may never be opened.
At most one sum of a round is opened, whatever the number of its attempts: devices let go of the shares of one only. So a round
costs what its costliest attempt would: a larger cohort may need a coarser grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import msgspec
import structlog

from aggregator.config import AggregatorConfig
from aggregator.promises import terms_of
from aggregator.rounds import Budget
from aggregator.store import Store
from federation.errors import BudgetExhaustedError, ConfigError
from federation.task.checkpoint import read_checkpoint
from federation.wire.codec import Schema, schema_of
from federation.wire.masking import scale_of_terms
from federation.wire.messages import RoundPlan
from federation.wire.terms import SecAggTerms
from privacy.distributed import affordable, epsilon_of, epsilon_rdp, noise_multiplier_for, within
from privacy.rounded_sum import NoisySum

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PaidRound:
    """A round that was paid for.

    Attributes:
        run: That it belongs to.
        round: Number.
        noise_multiplier: Of the noise in the sum, in units of the clip norm.
        clip_norm: C.
        noise: The same in steps of the shared scale.
        norm: C in steps.
        largest: Magnitude of a coordinate, at most, in steps.
        epsilon: Budget of the run as it was announced.
        delta: At which it is stated.
    """

    run: str
    round: int
    noise_multiplier: float
    clip_norm: float
    noise: float
    norm: float
    largest: float
    epsilon: float
    delta: float

    @property
    def sum(self) -> NoisySum:
        """What it costs."""
        return NoisySum(self.noise, self.norm, self.largest)


class DistributedPrivacy(msgspec.Struct, frozen=True):
    """What the rounds of a run have spent of its budget for distributed noise.

    Attributes:
        epsilon: Spent so far, against whoever sees the sums.
        budget: Epsilon at which the run ends.
        delta: At which both are stated.
        paid_rounds: Rounds that were paid for, whether their sum was opened or not.
        bare_rounds: Rounds without noise. Above 0, epsilon says nothing about them.
        next_epsilon: What would be spent after one more round like the newest.
        exhausted: Whether that is above the budget, so that the run is over.
        noise_multiplier: Of the newest round.
        clip_norm: Of the newest round.
    """

    epsilon: float
    budget: float
    delta: float
    paid_rounds: int
    bare_rounds: int
    next_epsilon: float
    exhausted: bool
    noise_multiplier: float
    clip_norm: float

    def to_text(self) -> str:
        """Lines for a terminal."""
        rounds = f"{self.paid_rounds} round{'s' if self.paid_rounds > 1 else ''}"
        more = (
            f"the budget is spent: one more round would make {self.next_epsilon:.3g}"
            if self.exhausted
            else f"one more round makes {self.next_epsilon:.3g}"
        )
        lines = [
            f"distributed noise: epsilon {self.epsilon:.3g} of {self.budget:g} at delta {self.delta:g} after {rounds}",
            f"  {more}; noise multiplier {self.noise_multiplier:g}, clip norm {self.clip_norm:.4g}",
        ]
        if self.bare_rounds:
            lines.append(f"  not counted: {self.bare_rounds} rounds that had no noise")
        return "\n".join(lines)


class MaskedNoise:
    """Distributed noise as the settings want it; without a noise multiplier, all methods do nothing.

    Args:
        config: All settings.
        store: Of the run, with its initial model.
    """

    def __init__(self, config: AggregatorConfig, store: Store) -> None:
        self._config, self._store = config, store

    @cached_property
    def _schema(self) -> Schema:
        """The same in all rounds."""
        closed = [row.round for row in self._store.rounds() if row.phase == "closed"]
        return schema_of(read_checkpoint(self._store.checkpoint_path(closed[-1] if closed else 0))[1])

    @property
    def _terms(self) -> SecAggTerms | None:
        terms = terms_of(self._config, self._store.run, 1, 1).secagg
        return terms if terms is not None and terms.noise_multiplier else None

    def budget(self) -> Budget | None:
        """The last round that the budget pays for; None where there is no noise."""
        terms, newest = self._terms, self._store.newest_round()
        if terms is None:
            return None
        more = affordable(
            [paid.sum for paid in self._opened()],
            self._one_round(terms),
            terms.epsilon,
            terms.delta,
            at_most=self._config.rounds.count - newest,
        )
        return Budget(
            newest + more,
            f"the privacy budget is spent: round {newest + more + 1} would exceed privacy.secagg.epsilon = "
            f"{terms.epsilon:g} at delta {terms.delta:g}",
        )

    def check(self) -> None:
        """Refuse, before anything starts, a promise that cannot be kept.

        Rounds of this run were without noise, or not one round can be paid.

        Raises:
            ConfigError: It names the setting and the remedy.
        """
        terms = self._terms
        if terms is None:
            return
        paid = {row.round for row in paid_rounds(self._store)}
        bare = [row.round for row in self._store.rounds() if row.round not in paid]
        if bare:
            raise ConfigError(
                f"privacy.secagg.noise_multiplier is {terms.noise_multiplier:g}, but {len(bare)} rounds of "
                f"{self._store.folder} (first {bare[0]}) had no noise, and their model goes on: begin another run with another "
                "state_dir"
            )
        one = epsilon_of([self._one_round(terms)], terms.delta)
        if not self._opened() and one > terms.epsilon:
            enough = noise_multiplier_for(
                terms.epsilon,
                terms.delta,
                self._config.rounds.count,
                lambda noise: self._one_round(msgspec.structs.replace(terms, noise_multiplier=noise)),
            )
            raise ConfigError(
                f"privacy.secagg.epsilon is {terms.epsilon:g}, but one round with privacy.secagg.noise_multiplier = "
                f"{terms.noise_multiplier:g} costs {one:.3g} at delta {terms.delta:g}: for all "
                f"{self._config.rounds.count} rounds it takes a noise_multiplier of {enough:g}"
            )

    def pay(self, plan: RoundPlan) -> None:
        """Pay for a round before it is announced: for its costliest attempt, once.

        Args:
            plan: Of an attempt; its terms count, which may be older than the settings.

        Raises:
            BudgetExhaustedError: If the budget does not pay for it.
        """
        terms = plan.privacy.secagg
        if terms is None or not terms.noise_multiplier:
            return
        cost = noisy_sum(terms, self._schema, len(plan.cohort))
        here, opened = (self._store.run, plan.round), self._opened()
        others = [row for row in opened if (row.run, row.round) != here]
        known = [row for row in opened if (row.run, row.round) == here]
        if known and _price(known[0].sum, terms) >= _price(cost, terms):
            return
        if not within([*(row.sum for row in others), cost], terms.delta, terms.epsilon):
            raise BudgetExhaustedError(
                f"round {plan.round} would exceed privacy.secagg.epsilon = {terms.epsilon:g} at delta {terms.delta:g}"
            )
        row = (
            self._store.run,
            plan.round,
            terms.noise_multiplier,
            terms.clip_norm,
            cost.noise,
            cost.norm,
            cost.largest,
            terms.epsilon,
            terms.delta,
        )
        with self._store.transaction() as db:
            db.execute("INSERT OR REPLACE INTO masked_noise VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        log.info("masked_round_paid", round=plan.round, attempt=plan.attempt, cohort=len(plan.cohort))

    def _opened(self) -> list[PaidRound]:
        """All that were paid for but one that was then never opened: it is about to be replaced."""
        newest, run = self._store.newest_round(), self._store.run
        return [row for row in paid_rounds(self._store) if row.run != run or row.round <= newest]

    def _one_round(self, terms: SecAggTerms) -> NoisySum:
        """The costliest that the next round may be: of the smallest cohort, or of the largest."""
        sums = [noisy_sum(terms, self._schema, size) for size in self._cohort_sizes()]
        return max(sums, key=lambda each: _price(each, terms))

    def _cohort_sizes(self) -> Iterator[int]:
        rounds = self._config.rounds
        least = max(rounds.min_agents, self._config.privacy.secagg.min_agents)
        yield least
        yield max(least, rounds.cohort_size, len(self._store.agents()))


def noisy_sum(terms: SecAggTerms, schema: Schema, cohort: int) -> NoisySum:
    """What a round costs.

    Args:
        terms: With noise.
        schema: Of the model.
        cohort: Its size.

    Raises:
        ConfigError: If the modulus is too small for the cohort.
    """
    scale = scale_of_terms(terms, schema, cohort)
    return NoisySum.of(
        noise_multiplier=terms.noise_multiplier,
        clip_norm=terms.clip_norm,
        step=scale.step,
        largest=scale.largest,
    )


def _price(each: NoisySum, terms: SecAggTerms) -> float:
    return epsilon_rdp([each], terms.delta)


def paid_rounds(store: Store) -> list[PaidRound]:
    """All that were paid for in this folder, oldest first: those of former runs too, whose model goes on in this one."""
    columns = ", ".join(PaidRound.__dataclass_fields__)
    rows = store.read(f"SELECT {columns} FROM masked_noise ORDER BY rowid")  # noqa: S608 - our own names
    return [PaidRound(*row) for row in rows]


def distributed_privacy(store: Store) -> DistributedPrivacy | None:
    """Read it from the store; None where no round was paid for."""
    paid = paid_rounds(store)
    if not paid:
        return None
    newest, sums = paid[-1], [row.sum for row in paid]
    after = epsilon_of([*sums, newest.sum], newest.delta)
    numbers = {row.round for row in paid}
    return DistributedPrivacy(
        epsilon=epsilon_of(sums, newest.delta),
        budget=newest.epsilon,
        delta=newest.delta,
        paid_rounds=len(paid),
        bare_rounds=sum(row.round not in numbers for row in store.rounds()),
        next_epsilon=after,
        exhausted=after > newest.epsilon,
        noise_multiplier=newest.noise_multiplier,
        clip_norm=newest.clip_norm,
    )
