"""The one thread that computes: it trains, encodes and signs, and hands back what came of it as an event."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event as Flag
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from edge_agent.base_model import Arrays, Recipe, make_base
from edge_agent.outbox import Outbox
from edge_agent.session import BaseUnusable, UpdateReady, WorkFailed
from edge_agent.training import Cancelled, Trained, round_seed
from federation.errors import ConfigError, FedgeError, VerificationError
from federation.task.names import is_plugin
from federation.wire.messages import RoundPlan, TaskSpec, UpdateOffer

log = structlog.get_logger()


class Trainer(Protocol):
    """What the agent needs of a trainer; :class:`edge_agent.training.TorchTrainer` is one."""

    def train(
        self,
        base: Mapping[str, NDArray[np.float32]],
        plan: RoundPlan,
        agent: str,
        cancelled: Callable[[], bool],
    ) -> Trained:
        """Train on ``base``; raises :class:`Cancelled` soon after ``cancelled()`` turns true."""
        ...

    def initial(self, task: TaskSpec, seed: int) -> Mapping[str, NDArray[np.float32]]:
        """Build the model that a run with this task and seed begins with."""
        ...


class Worker:
    """Works on one round at a time, away from the loop, so that pings go out while it computes.

    Args:
        trainer: Trains.
        outbox: Takes the update.
        federation: Its federation.
        agent: This device's name.
        plugins: Plug-in models that a plan may name.
        post: Takes :class:`UpdateReady`, :class:`BaseUnusable` or :class:`WorkFailed`; or an exception that is a defect, to be raised in
            the loop rather than lost in a thread.
    """

    def __init__(
        self,
        trainer: Trainer,
        outbox: Outbox,
        *,
        federation: str,
        agent: str,
        plugins: frozenset[str],
        post: Callable[[object], None],
    ) -> None:
        self._trainer, self._outbox = trainer, outbox
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

    def cancel(self) -> None:
        """Stop what is under way; nothing is handed back for it."""
        self._cancel.set()

    def stop(self) -> None:
        """Cancel, and wait for the thread to end."""
        self.cancel()
        self._thread.shutdown(cancel_futures=True)

    def _work(self, plan: RoundPlan, recipe: Recipe, largest_chunk: int, cancel: Flag) -> None:
        try:
            self._refuse_foreign_code(plan)
            try:
                base = make_base(recipe, plan, self._federation, self._trainer.initial)
            except VerificationError as error:
                self._post(BaseUnusable(plan.run, plan.round, str(error)))
                return
            self._post(UpdateReady(self._make_update(plan, base, largest_chunk, cancel)))
        except Cancelled:
            log.info("training_cancelled", round=plan.round)
        except FedgeError as error:
            self._post(WorkFailed(plan.run, plan.round, str(error)))
        except BaseException as error:  # noqa: BLE001 - see ``post``
            self._post(error)

    def _refuse_foreign_code(self, plan: RoundPlan) -> None:
        if is_plugin(plan.task.model) and plan.task.model not in self._plugins:
            raise ConfigError(
                f"the plan asks for the plug-in model {plan.task.model!r}, which this device does not allow: "
                f"start it with --allow-model {plan.task.model}"
            )

    def _make_update(self, plan: RoundPlan, base: Arrays, largest_chunk: int, cancel: Flag) -> UpdateOffer:
        trained = self._trainer.train(base, plan, self._agent, cancel.is_set)
        return self._outbox.put(
            plan,
            base,
            trained.delta,
            samples=trained.samples,
            metrics=trained.metrics,
            rng=np.random.default_rng(round_seed(plan, self._agent)),
            chunk_bytes=min(plan.upload_chunk_bytes, largest_chunk),
        )
