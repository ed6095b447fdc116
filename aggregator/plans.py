"""The plan of a round: what it says follows from the settings, the versions on the disk, and what was said before."""

import time
from pathlib import Path

import msgspec
import structlog

from aggregator.central_noise import CentralNoise
from aggregator.config import AggregatorConfig, RoundsConfig
from aggregator.records import StoredRound
from aggregator.rounds import Masked, OpenRound
from aggregator.secure_round import SecureRounds
from aggregator.store import Store
from aggregator.versions import Versions
from federation.errors import ConfigError
from federation.wire.masking import MASKED, masked_encoding
from federation.wire.messages import ObjectRef, RoundPlan, TaskSpec

log = structlog.get_logger()


def log_opened(plan: RoundPlan, quorum: int) -> None:
    """Tell the operator of a round, or of its next attempt.

    Args:
        plan: Of the attempt.
        quorum: Updates without which it is not closed.
    """
    if plan.attempt == 1:
        log.info("round_opened", round=plan.round, cohort=len(plan.cohort), deadline_s=round(plan.deadline_s))
        return
    masked = plan.privacy.secagg is not None
    log.warning(
        "round_extended",
        round=plan.round,
        attempt=plan.attempt,
        cohort=len(plan.cohort),
        quorum=quorum,
        lost="nothing: all mask anew what they have trained"
        if masked
        else "nothing: updates that have arrived stay",
        remedy="see which agents are missing with `aggregator status`",
    )


class Plans:
    """Makes the plans of one run.

    Args:
        config: Settings.
        task: What is learned.
        store: Knows the run.
        versions: Of the global model.
        secure: Knows what an interrupted round has promised.
        noise: Has paid for the round's noise, if there is any.

    Attributes:
        encoding: Of the updates of the rounds that are opened from now on.
    """

    def __init__(
        self,
        config: AggregatorConfig,
        task: TaskSpec,
        store: Store,
        versions: Versions,
        secure: SecureRounds,
        noise: CentralNoise,
    ) -> None:
        self._config, self._task, self._store = config, task, store
        self._versions, self._secure, self._noise = versions, secure, noise
        secagg = config.privacy.secagg
        self.encoding = masked_encoding(secagg.modulus_bits) if secagg.enabled else config.up_encoding

    @property
    def masked(self) -> Masked | None:
        """What secure aggregation asks of the rounds, where it is on."""
        secagg = self._config.privacy.secagg
        return Masked(secagg.min_agents, secagg.dropouts) if secagg.enabled else None

    @property
    def rounds(self) -> RoundsConfig:
        """The settings of the rounds: none opens with fewer devices than a sum needs."""
        secagg, rounds = self._config.privacy.secagg, self._config.rounds
        least = secagg.min_agents if secagg.enabled else 1
        return msgspec.structs.replace(rounds, min_agents=max(rounds.min_agents, least))

    def resume(self, row: StoredRound) -> str:
        """The encoding of the updates of a round that was interrupted.

        Raises:
            ConfigError: If it was opened with secure aggregation, and the settings have none now, or the other way round.
        """
        was, now = row.encoding.startswith(f"{MASKED}:"), self.masked is not None
        if was != now:
            said, set_back = ("with", "true") if was else ("without", "false")
            raise ConfigError(
                f"round {row.round} is open and was begun {said} secure aggregation: set privacy.secagg.enabled = {set_back} "
                "until it is closed, or begin a new run"
            )
        return row.encoding

    def make(
        self, command: OpenRound, encoding: str, chunk_bytes: int, wanted: int
    ) -> tuple[RoundPlan, tuple[tuple[Path, ObjectRef], ...]]:
        """The plan of a round, or of its next attempt.

        Args:
            command: Which one.
            encoding: Of its updates.
            chunk_bytes: Of objects in both directions.
            wanted: Updates with which it is complete.

        Returns:
            The plan, and all that must be on the broker, with the files that hold it.
        """
        offered = self._versions.offer(command.round - 1, chunk_bytes)
        plan = RoundPlan(
            run=self._store.run,
            round=command.round,
            attempt=command.attempt,
            task=self._task,
            train=self._config.train,
            base=offered.base,
            full=offered.full,
            deltas=offered.deltas,
            up_encoding=encoding,
            # The errors of agents are independent: their average has a share of each.
            max_noise=self._config.max_noise * max(1, wanted),
            cohort=command.cohort,
            deadline_s=max(command.deadline_s, 1.0),
            issued_at=time.time(),
            upload_chunk_bytes=chunk_bytes,
            privacy=self._noise.terms(command.round, command.attempt),
        )
        if plan.privacy.secagg is not None:
            said = self._secure.recall(command.round, command.attempt)
            if said is not None:  # devices have masked under these terms, whatever the settings say now
                plan = msgspec.structs.replace(plan, privacy=said.privacy, up_encoding=said.up_encoding)
        return plan, offered.objects
