"""Stands before the training of a round with privacy terms: nothing is trained that has not been paid for."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from edge_agent.config import PrivacyLimits
from federation.bundle import Bundle
from federation.errors import BudgetExhaustedError, ConfigError, VerificationError
from federation.files import disk_error
from federation.wire.messages import RoundPlan
from federation.wire.signing import private_key, private_key_bytes
from federation.wire.terms import SampleTerms, Spent
from privacy.accounting import epsilon_pld
from privacy.budget import Limits, PrivateRound, Terms, plan_round
from privacy.errors import LedgerError, OverBudgetError, TermsError
from privacy.ledger import Ledger, Owner
from privacy.ledger_format import ledger_key

log = structlog.get_logger()


class TermsUnfitError(ConfigError):
    """The terms of the plan do not fit: this device's data, or what they promise themselves."""


@dataclass(frozen=True, slots=True)
class Paid:
    """A round that may be trained.

    Attributes:
        private: How, to the letter.
        spent: What the ledger says now; it goes into the signed offer.
    """

    private: PrivateRound
    spent: Spent


class Guard:
    """Holds a device's ledger from the first private round on. Not thread-safe.

    Args:
        folder: ``STATE/ledger``; made when the first private round comes.
        owner: Whose ledger it is.
        limits: What no plan can exceed.
        data: What the device's data is called; it stays in the ledger.
        clock: Unix seconds.
    """

    def __init__(
        self,
        folder: Path,
        owner: Owner,
        limits: PrivacyLimits,
        *,
        data: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._owner, self._data, self._clock = folder, owner, data, clock
        self._limits = Limits(max_epsilon=limits.max_epsilon, max_delta=limits.max_delta)
        self._ledger: Ledger | None = None

    def reserve(self, plan: RoundPlan, samples: int) -> Paid | None:
        """Pay for a round. What was paid is never given back, whatever becomes of the round.

        Args:
            plan: Of the round.
            samples: In the device's training data.

        Returns:
            None if the plan has no terms for samples. Otherwise the entry is on disk, and training may begin.

        Raises:
            BudgetExhaustedError: If the run's or the device's budget does not suffice.
            TermsUnfitError: If the data is too small, or the plan's delta too large.
            VerificationError: If the ledger cannot be trusted.
            ConfigError: If the disk fails.
        """
        terms = plan.privacy.sample
        if terms is None:
            return None
        try:
            if self._ledger is None:
                self._ledger = Ledger.open(self._folder, self._owner, clock=self._clock)
            private = plan_round(terms_for_device(plan, terms), self._ledger.entries, self._limits, samples)
            self._ledger.reserve(
                private.spend,
                # Never later than the plan: a clock that runs ahead must not lock the ledger later on.
                now=min(self._clock(), plan.issued_at),
                run=plan.run,
                round_=plan.round,
                attempt=plan.attempt,
                model=plan.base,
                clip_norm=private.clip_norm,
                delta=terms.delta,
                data=self._data,
            )
        except TermsError as error:
            raise TermsUnfitError(str(error)) from error
        except OverBudgetError as error:
            raise BudgetExhaustedError(str(error)) from error
        except LedgerError as error:
            raise VerificationError(str(error)) from error
        except OSError as error:
            self.close()
            raise disk_error(error, self._folder) from error
        return Paid(private, self._tell(private, terms.delta))

    def close(self) -> None:
        """Let another process have the ledger."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _tell(self, private: PrivateRound, delta: float) -> Spent:
        assert self._ledger is not None
        entries = self._ledger.entries
        spent = Spent(
            epsilon=epsilon_pld([entry.spend for entry in entries], delta),
            round_epsilon=epsilon_pld([private.spend], delta),
            delta=delta,
            noise_multiplier=private.noise_multiplier,
            clip_norm=private.clip_norm,
            steps=private.steps,
            entry=len(entries),
            head=self._ledger.head,
        )
        log.info(
            "round_paid",
            epsilon=round(spent.epsilon, 4),
            round_epsilon=round(spent.round_epsilon, 4),
            limit=self._limits.max_epsilon,
            delta=delta,
            noise_multiplier=private.noise_multiplier,
            sample_rate=private.sample_rate,
            steps=private.steps,
            entry=spent.entry,
        )
        return spent


def owner_of(bundle: Bundle) -> Owner:
    """Whose ledger a device keeps."""
    secret = private_key_bytes(private_key(bundle.private_key))
    return Owner(bundle.federation, bundle.agent, ledger_key(secret, bundle.federation, bundle.agent))


def terms_for_device(plan: RoundPlan, terms: SampleTerms) -> Terms:
    """What a plan asks, in the words of :mod:`privacy.budget`."""
    return Terms(
        run=plan.run,
        round=plan.round,
        rounds=terms.rounds,
        clip_norm=terms.clip_norm,
        delta=terms.delta,
        epsilon=terms.epsilon,
        noise_multiplier=terms.noise_multiplier,
        batch_size=plan.train.batch_size,
        epochs=plan.train.epochs,
        max_steps=plan.train.max_steps,
    )
