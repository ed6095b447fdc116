"""The one thread that computes: it trains, encodes and signs, and hands back what came of it as an event."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event as Flag
from typing import Protocol

import numpy as np
import structlog
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_agent import masking
from edge_agent.base_model import Arrays, Recipe, make_base
from edge_agent.guard import Guard, TermsUnfitError
from edge_agent.kept_training import KeptTraining, Training
from edge_agent.masking import check_promise
from edge_agent.outbox import Outbox
from edge_agent.session import BaseUnusable, TrainingKept, UpdateReady, WorkFailed, masked
from edge_agent.training import Cancelled, Trained, round_seed
from federation.errors import BudgetExhaustedError, ConfigError, FedgeError, VerificationError
from federation.task.names import is_plugin
from federation.wire.codec import schema_of
from federation.wire.messages import DeclineCode, RoundPlan, TaskSpec
from privacy.budget import PrivateRound
from privacy.secagg.errors import RefusedError
from privacy.secagg.masks import MaskPlan

log = structlog.get_logger()


class Trainer(Protocol):
    """What the agent needs of a trainer; :class:`edge_agent.training.TorchTrainer` is one."""

    def train(
        self,
        base: Mapping[str, NDArray[np.float32]],
        plan: RoundPlan,
        agent: str,
        cancelled: Callable[[], bool],
        *,
        private: PrivateRound | None = None,
    ) -> Trained:
        """Train on ``base``, with ``private`` exactly as it says; raises :class:`Cancelled` soon after ``cancelled()`` turns true."""
        ...

    def samples(self, task: TaskSpec) -> int:
        """How many local samples there are to learn ``task`` from."""
        ...

    def initial(self, task: TaskSpec, seed: int) -> Mapping[str, NDArray[np.float32]]:
        """Build the model that a run with this task and seed begins with."""
        ...


class Worker:
    """Works on one round at a time, away from the loop, so that pings go out while it computes.

    Args:
        trainer: Trains.
        outbox: Takes the update.
        guard: Pays for private training.
        kept: Takes what is to be masked.
        federation: Its federation.
        agent: This device's name.
        plugins: Plug-in models that a plan may name.
        post: Takes :class:`UpdateReady`, :class:`TrainingKept`, :class:`BaseUnusable` or :class:`WorkFailed`; or an exception that is a defect, to be raised in
            the loop rather than lost in a thread.
    """

    def __init__(
        self,
        trainer: Trainer,
        outbox: Outbox,
        guard: Guard,
        kept: KeptTraining,
        *,
        federation: str,
        agent: str,
        plugins: frozenset[str],
        post: Callable[[object], None],
    ) -> None:
        self._trainer, self._outbox, self._guard, self._kept = trainer, outbox, guard, kept
        self._federation, self._agent = federation, agent
        self._plugins, self._post = plugins, post
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._cancel = Flag()

    def start(self, plan: RoundPlan, recipe: Recipe, largest_chunk: int) -> None:
        """Begin to work on a round, after what was cancelled before it.

        Args:
            plan: The round.
            recipe: Of its base model.
            largest_chunk: That the device's own link takes, bytes.
        """
        self._cancel = cancel = Flag()
        log.info("training_started", round=plan.round, model=plan.task.model, epochs=plan.train.epochs)
        self._thread.submit(self._work, plan, recipe, largest_chunk, cancel)

    def mask(self, plan: RoundPlan, masks: MaskPlan, largest_chunk: int) -> None:
        """Mask what was trained, after what is under way.

        Args:
            plan: The attempt.
            masks: Of that attempt.
            largest_chunk: That the device's own link takes, bytes.
        """
        self._cancel = cancel = Flag()
        self._thread.submit(self._mask, plan, masks, largest_chunk, cancel)

    def cancel(self) -> None:
        """Stop what is under way; nothing is handed back for it."""
        self._cancel.set()

    def stop(self) -> None:
        """Cancel, and wait for the thread to end."""
        self.cancel()
        self._thread.shutdown(cancel_futures=True)
        self._guard.close()

    def _work(self, plan: RoundPlan, recipe: Recipe, largest_chunk: int, cancel: Flag) -> None:
        try:
            self._refuse_foreign_code(plan)
            try:
                base = make_base(recipe, plan, self._federation, self._trainer.initial)
            except VerificationError as error:
                self._post(BaseUnusable(plan.run, plan.round, str(error)))
                return
            check_promise(plan, schema_of(base))
            self._post(self._make_update(plan, base, largest_chunk, cancel))
        except Cancelled:
            log.info("training_cancelled", round=plan.round)
        except FedgeError as error:
            self._post(WorkFailed(plan.run, plan.round, str(error), _code(error)))
        except BaseException as error:  # noqa: BLE001 - see ``post``
            self._post(error)

    def _refuse_foreign_code(self, plan: RoundPlan) -> None:
        if is_plugin(plan.task.model) and plan.task.model not in self._plugins:
            raise ConfigError(
                f"the plan asks for the plug-in model {plan.task.model!r}, which this device does not allow: "
                f"start it with --allow-model {plan.task.model}"
            )

    def _mask(self, plan: RoundPlan, masks: MaskPlan, largest_chunk: int, cancel: Flag) -> None:
        try:
            training, delta = self._kept.take()
            data = masking.mask_update(plan, delta, masks)
            if cancel.is_set():
                return
            offer = self._outbox.put_masked(
                plan,
                data,
                metrics=training.metrics,
                spent=training.spent,
                chunk_bytes=min(plan.upload_chunk_bytes, largest_chunk),
            )
            self._post(UpdateReady(offer))
        except RefusedError as error:
            log.info("masking_cancelled", round=plan.round, attempt=plan.attempt, reason=str(error))
        except FedgeError as error:
            self._post(WorkFailed(plan.run, plan.round, str(error), _code(error)))
        except BaseException as error:  # noqa: BLE001 - see ``post``
            self._post(error)

    def _make_update(
        self, plan: RoundPlan, base: Arrays, largest_chunk: int, cancel: Flag
    ) -> UpdateReady | TrainingKept:
        samples = self._trainer.samples(plan.task) if plan.privacy.sample is not None else 0
        if cancel.is_set():
            raise Cancelled  # before it costs anything
        paid = self._guard.reserve(plan, samples)
        private = None if paid is None else paid.private
        trained = self._trainer.train(base, plan, self._agent, cancel.is_set, private=private)
        tell = not plan.privacy.uniform  # else how many samples there are, and how well they fit, stays here
        metrics = trained.metrics if tell else replace(trained.metrics, loss=None, accuracy=None)
        spent = None if paid is None else paid.spent
        if masked(plan):
            self._kept.put(
                Training(run=plan.run, round=plan.round, metrics=metrics, spent=spent), trained.delta
            )
            return TrainingKept(plan.run, plan.round)
        offer = self._outbox.put(
            plan,
            base,
            trained.delta,
            samples=trained.samples if tell else 1,
            metrics=metrics,
            # Whoever knows the plan would know how a private update was rounded.
            rng=np.random.default_rng(round_seed(plan, self._agent) if tell else None),
            chunk_bytes=min(plan.upload_chunk_bytes, largest_chunk),
            private=paid is not None,
            spent=spent,
        )
        return UpdateReady(offer)


def _code(error: FedgeError) -> DeclineCode:
    match error:
        case BudgetExhaustedError():
            return DeclineCode.BUDGET
        case TermsUnfitError():
            return DeclineCode.TERMS
        case _:
            return DeclineCode.FAULT
