"""The hold-out evaluation of each round's model, away from the event loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from aggregator.store import Store
from federation.task.checkpoint import CheckpointInfo, read_checkpoint
from federation.task.model_card import HoldOutMetrics

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EvaluationDone:
    """A round's model was evaluated.

    Attributes:
        round: Whose.
        metrics: None without a hold-out set.
        seconds: That it took.
    """

    round: int
    metrics: HoldOutMetrics | None
    seconds: float


class Evaluation:
    """Evaluates where there is a hold-out set, and does nothing otherwise. Its methods return at once.

    Args:
        store: Holds checkpoints, and takes metrics.
        submit: Does work elsewhere and hands its result to the loop.
    """

    def __init__(self, store: Store, submit: Callable[[Callable[[], object]], None]) -> None:
        self._store, self._submit = store, submit
        self._evaluator: Evaluator | None = None

    def prepare(self, data_spec: str, info: CheckpointInfo) -> None:
        """Open the hold-out set.

        Raises:
            ConfigError: If the data cannot be opened.
        """
        self._evaluator = Evaluator(data_spec, info)

    def begin(self, number: int) -> None:
        """Evaluate the model of a round; :class:`EvaluationDone` follows."""
        evaluator, path = self._evaluator, self._store.checkpoint_path(number)
        if evaluator is None:
            self._submit(lambda: EvaluationDone(number, None, 0.0))
        else:
            self._submit(lambda: EvaluationDone(number, *evaluator.evaluate(path)))

    def keep(self, done: EvaluationDone) -> float | None:
        """Write the metrics down.

        Returns:
            The accuracy, if there is one.
        """
        if done.metrics is None:
            return None
        metrics = done.metrics
        self._store.write_metrics(done.round, metrics)
        self._store.record_evaluation(done.round, metrics.loss, metrics.accuracy, done.seconds)
        log.info(
            "round_evaluated",
            round=done.round,
            accuracy=round(metrics.accuracy, 4),
            loss=round(metrics.loss, 4),
        )
        return metrics.accuracy


class Evaluator:
    """Evaluates checkpoints on the hold-out set. Imports torch when it is made, and keeps model and data.

    Args:
        data_spec: The hold-out set (``federation.task.data``).
        info: Any checkpoint's: its task is the federation's.

    Raises:
        ConfigError: If the data cannot be opened.
    """

    def __init__(self, data_spec: str, info: CheckpointInfo) -> None:
        from federation.task.data import open_data
        from federation.task.models import build

        self._data = open_data(data_spec, info.task, train=False)
        self._model = build(info.task)

    def evaluate(self, checkpoint: Path) -> tuple[HoldOutMetrics, float]:
        """Evaluate one checkpoint.

        Returns:
            The metrics, and the seconds that it took.
        """
        from federation.task.evaluate import evaluate
        from federation.task.models import load_arrays

        began = time.monotonic()
        _, arrays = read_checkpoint(checkpoint)
        load_arrays(self._model, arrays)
        result = evaluate(self._model, self._data)
        metrics = HoldOutMetrics(loss=result.loss, accuracy=result.accuracy, samples=result.samples)
        return metrics, time.monotonic() - began
