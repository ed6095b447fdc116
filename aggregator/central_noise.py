"""Client-level privacy of a run: what each round pays, and when the budget ends it.

The mathematics is ``privacy.central``; this is its memory, the table ``noisy_rounds``. A round is paid for before any device is told
of it, in a committed row. A round that never gets as far as its noise is paid for nonetheless; nothing is given back.
"""

import math
from collections.abc import Callable, Collection
from functools import partial

import msgspec
import structlog

from aggregator.cohort import draw_secretly
from aggregator.config import AggregatorConfig
from aggregator.promises import terms_of
from aggregator.round_noise import NoisyRound, RoundNoise, bare_rounds, noisy_rounds
from aggregator.rounds import Budget
from aggregator.store import Store
from federation.errors import BudgetExhaustedError, ConfigError
from federation.wire.codec import Schema
from federation.wire.terms import PrivacyTerms
from privacy.accounting import Spend, epsilon_pld, noise_multiplier_for, within
from privacy.central import Adaptation, ClientMechanism, affordable
from privacy.errors import OverBudgetError

log = structlog.get_logger()


class CentralNoise:
    """Client-level privacy as the settings want it; without a noise multiplier, all methods do nothing.

    Args:
        config: All settings.
        store: Of the run.
    """

    def __init__(self, config: AggregatorConfig, store: Store) -> None:
        self._config, self._client, self._store = config, config.privacy.client, store
        self._warned = False

    @property
    def draw(self) -> Callable[[Collection[str]], tuple[str, ...]] | None:
        """Of the cohorts; None where all take part, or a fixed number."""
        if not self._client.noise_multiplier or self._client.sampling_rate == 1:
            return None
        return partial(draw_secretly, rate=self._client.sampling_rate)

    @property
    def _step(self) -> Spend:
        return Spend(self._client.noise_multiplier, self._client.sampling_rate, 1)

    def _so_far(self) -> list[Spend]:
        """Of all rounds but one that was paid for and then never opened: it is about to be replaced."""
        newest, run = self._store.newest_round(), self._store.run
        return [paid.spend for paid in noisy_rounds(self._store) if paid.run != run or paid.round <= newest]

    def budget(self) -> Budget | None:
        """The last round that the budget pays for; None where there is no noise."""
        client, newest = self._client, self._store.newest_round()
        if not client.noise_multiplier:
            return None
        more = affordable(
            self._so_far(),
            self._step,
            client.epsilon,
            client.delta,
            at_most=self._config.rounds.count - newest,
        )
        return Budget(
            newest + more,
            f"the privacy budget is spent: round {newest + more + 1} would exceed privacy.client.epsilon = "
            f"{client.epsilon:g} at delta {client.delta:g}",
        )

    def check(self) -> None:
        """Refuse, before anything starts, a promise that cannot be kept.

        Rounds of this run were without noise, the open one was announced otherwise, or not one round can be paid.

        Raises:
            ConfigError: It names the setting and the remedy.
        """
        client = self._client
        rounds = self._store.rounds()
        if rounds and rounds[-1].phase != "closed":
            self._check_open(rounds[-1].round)
        if not client.noise_multiplier:
            return
        bare = bare_rounds(self._store)
        if bare:
            raise ConfigError(
                f"privacy.client.noise_multiplier is {client.noise_multiplier:g}, but rounds of "
                f"{self._store.folder} (first {bare[0]}) had no noise, and their model goes on: begin another run with another "
                "state_dir"
            )
        if not self._so_far() and not within([self._step], client.delta, client.epsilon):
            raise ConfigError(
                f"privacy.client.epsilon is {client.epsilon:g}, but one round with privacy.client.noise_multiplier = "
                f"{client.noise_multiplier:g} costs {epsilon_pld([self._step], client.delta):.3g} at delta {client.delta:g}: "
                + self._remedy()
            )

    def _remedy(self) -> str:
        client, count = self._client, self._config.rounds.count
        try:
            enough = noise_multiplier_for(client.epsilon, client.delta, (), client.sampling_rate, count)
        except OverBudgetError:
            return f"no noise is enough for {count} rounds; raise epsilon"
        return f"for all {count} rounds it takes a noise_multiplier of {enough:g}"

    def _check_open(self, number: int) -> None:
        client, paid = self._client, self._paid(number)
        announced = (paid.noise_multiplier, paid.sampling_rate) if paid else (0.0, 1.0)
        now = (client.noise_multiplier, client.sampling_rate if client.noise_multiplier else 1.0)
        if announced != now:
            raise ConfigError(
                f"round {number} is open and was announced with privacy.client.noise_multiplier = {announced[0]:g} and "
                f"sampling_rate = {announced[1]:g}; they are {now[0]:g} and {now[1]:g}: set them back until it is closed"
            )

    def open(self, number: int, schema: Schema, *, wanted: int, online: int) -> None:
        """Pay for a round, once, before it is announced; its later attempts are paid for.

        Args:
            number: Of the round.
            schema: Of the model, to warn of noise in which nothing can be learned.
            wanted: Devices that are to deliver.
            online: Devices of which a secret draw took each with its probability.

        Raises:
            BudgetExhaustedError: If the budget does not pay for it.
        """
        client = self._client
        known = self._paid(number)
        if not client.noise_multiplier or (known is not None and self._store.newest_round() >= number):
            return
        if not within([*self._so_far(), self._step], client.delta, client.epsilon):
            raise BudgetExhaustedError(
                f"round {number} would exceed privacy.client.epsilon = {client.epsilon:g} at delta {client.delta:g}"
            )
        expected = max(1.0, client.sampling_rate * online) if self.draw else float(max(1, wanted))
        clip_norm = self._clip_norm()
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO noisy_rounds (run, round, noise_multiplier, sampling_rate, clip_norm, expected, "
                "epsilon, delta) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self._store.run,
                    number,
                    client.noise_multiplier,
                    client.sampling_rate,
                    clip_norm,
                    expected,
                    client.epsilon,
                    client.delta,
                ),
            )
        log.info("round_paid", round=number, clip_norm=clip_norm, expected_devices=expected)
        self._warn(schema, ClientMechanism(clip_norm, client.noise_multiplier, expected))

    def _warn(self, schema: Schema, mechanism: ClientMechanism) -> None:
        noise = mechanism.noise_norm(sum(math.prod(shape) for shape in schema.values()))
        if noise > mechanism.clip_norm and not self._warned:
            self._warned = True  # once in a process: it is the same in all rounds
            log.warning(
                "noise_exceeds_updates",
                noise_l2=float(f"{noise:.3g}"),
                longest_mean_l2=mechanism.clip_norm,
                expected_devices=mechanism.expected,
                remedy="more devices per round, a smaller model, or a larger epsilon: the noise on the mean is longer than the "
                "mean can be, so that little or nothing is learned (docs/privacy.md)",
            )

    def of_round(self, number: int) -> RoundNoise | None:
        """The noise that was paid for; None if none was."""
        paid, client = self._paid(number), self._client
        if paid is None:
            return None
        adaptation = Adaptation(client.quantile, client.clip_learning_rate) if client.quantile else None
        return RoundNoise(self._store, paid, adaptation)

    @property
    def equal(self) -> bool:
        """Whether all updates weigh the same: under any terms of privacy."""
        return terms_of(self._config, self._store.run, 1, 1).uniform

    def terms(self, number: int, attempt: int) -> PrivacyTerms:
        """What the plan of a round promises, with the clip norm of that round."""
        terms, paid = terms_of(self._config, self._store.run, number, attempt), self._paid(number)
        if terms.client is None or paid is None:
            return terms
        client = msgspec.structs.replace(terms.client, clip_norm=paid.clip_norm)
        return msgspec.structs.replace(terms, client=client)

    def _paid(self, number: int) -> NoisyRound | None:
        run = self._store.run
        rows = [paid for paid in noisy_rounds(self._store) if (paid.run, paid.round) == (run, number)]
        return rows[0] if rows else None

    def _clip_norm(self) -> float:
        if self._client.quantile:
            for paid in reversed(noisy_rounds(self._store)):
                if paid.next_clip_norm is not None:
                    return paid.next_clip_norm
        return self._client.clip_norm
