"""The averaging of a run's rounds in a thread of its own: updates are added as they are accepted, while others arrive."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from aggregator.central_noise import CentralNoise
from aggregator.folding import Down, Fold, FoldResult
from aggregator.masked_sum import MaskedFold
from aggregator.masking import Masking
from aggregator.store import Store
from aggregator.strategies import Strategy
from federation.task.checkpoint import CheckpointInfo, read_checkpoint
from federation.wire.codec import Schema, schema_of
from federation.wire.masking import scale_of
from federation.wire.messages import RoundPlan, TaskSpec
from privacy.secagg.unmask import UnmaskPlan


@dataclass(frozen=True, slots=True)
class Averaged:
    """A round's updates are averaged and the new version is on disk.

    Attributes:
        round: Which.
        result: What was made.
    """

    round: int
    result: FoldResult


class Averaging:
    """Single-threaded: all methods are called by the service's loop, and return at once.

    Args:
        store: Holds updates and checkpoints.
        task: What is learned.
        noise: Of client-level privacy, where it is on.
        strategy: The server step.
        down: How the global model's change is encoded.
        post: Takes :class:`Averaged`, or the exception that ended the work; from any thread.
    """

    def __init__(
        self,
        store: Store,
        task: TaskSpec,
        noise: CentralNoise,
        strategy: Strategy,
        down: Down,
        post: Callable[[object], None],
    ) -> None:
        self._store, self._task, self._noise = store, task, noise
        self._strategy, self._down, self._post = strategy, down, post
        # One thread: updates are added one after the other, and never while they are averaged.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="averaging")
        self._fold: Fold | None = None
        self._masked: MaskedFold | None = None
        self._schema: Schema | None = None

    def schema(self, number: int) -> Schema:
        """Of the model, read from the one that round ``number`` starts from; it is the same in all rounds."""
        if self._schema is None:
            self._schema = schema_of(read_checkpoint(self._store.checkpoint_path(number - 1))[1])
        return self._schema

    def add(self, number: int, agent: str, encoding: str) -> None:
        """Add an update of the round that is accepted and on disk; once, however often it is called."""
        fold, update = self._masked or self._of_round(number, encoding), self._store.updates(number)[agent]
        self._submit(lambda: fold.add(update))

    def mask(self, plan: RoundPlan) -> Masking:
        """From now on updates are masked ones of this attempt; those of others are of no use any more.

        Args:
            plan: With terms of secure aggregation.

        Returns:
            How its updates are integers.
        """
        terms = plan.privacy.secagg
        assert terms is not None
        if self._masked is not None:
            self._masked.abandoned = True
        masking = Masking(plan.attempt, scale_of(plan, self.schema(plan.round)), terms.rotation_seed)
        self._masked = MaskedFold(self._store, self._info(plan.round), masking)
        return masking

    def unmask(self, number: int, plan: UnmaskPlan) -> None:
        """Take the masks off the sum, and make the next version of the global model."""
        fold, self._masked = self._masked, None
        assert fold is not None
        updates = self._store.updates(number)
        self._submit(lambda: Averaged(number, fold.close(updates, plan, self._strategy, self._down)))

    def skip(self, number: int) -> None:
        """Make the model as it was the next version: the sum cannot be had."""
        fold, self._masked = self._masked, None
        assert fold is not None
        self._submit(lambda: Averaged(number, fold.skip(self._down)))

    def close(self, number: int, agents: tuple[str, ...], encoding: str) -> None:
        """Average the updates of ``agents``, and make the next version of the global model."""
        fold = self._of_round(number, encoding)
        self._fold = None
        updates = {agent: update for agent, update in self._store.updates(number).items() if agent in agents}
        self._submit(lambda: Averaged(number, fold.close(updates, self._strategy, self._down)))

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._thread.shutdown(cancel_futures=True)

    def _of_round(self, number: int, encoding: str) -> Fold:
        if self._fold is None or self._fold.round != number:
            noise, equal = self._noise.of_round(number), self._noise.equal
            self._fold = Fold(
                self._store, self._info(number), self.schema(number), encoding, noise, equal=equal
            )
        return self._fold

    def _info(self, number: int) -> CheckpointInfo:
        return CheckpointInfo(federation=self._store.federation, round=number, task=self._task)

    def _submit(self, work: Callable[[], Averaged | None]) -> None:
        def hand_back(done: Future[Averaged | None]) -> None:
            if done.cancelled():
                return
            outcome = done.exception() or done.result()
            if outcome is not None:
                self._post(outcome)

        self._thread.submit(work).add_done_callback(hand_back)
