"""What was trained in a masked round, on disk until the round is over.

A masked update is of use in one attempt of its round only. If the round needs another, the same training is masked anew:
it costs no time, and no privacy budget, a second time.

::

    STATE/secagg/trained    safetensors: the delta, float32; who it is for stands in its metadata
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from federation.errors import VerificationError
from federation.files import write_whole
from federation.wire.fields import RoundNumber, RunId
from federation.wire.messages import TrainMetrics
from federation.wire.terms import Spent

_KEY = "fedge"
_MODE = 0o600


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of which round, and what is told of it.

    Attributes:
        run: As in the plan.
        round: As in the plan.
        metrics: Of the training.
        spent: What the ledger says.
    """

    run: RunId
    round: RoundNumber
    metrics: TrainMetrics
    spent: Spent | None = None


@dataclass(frozen=True, slots=True)
class KeptTraining:
    """At most one training.

    Args:
        path: Of the file; its folder must exist.
    """

    path: Path

    def put(self, training: Training, delta: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep it durably, in the place of an earlier one.

        Args:
            training: What it is.
            delta: New minus base model, float32.

        Raises:
            ConfigError: If the disk is full.
        """
        arrays = {name: np.ascontiguousarray(array) for name, array in delta.items()}
        write_whole(self.path, save(arrays, {_KEY: msgspec.json.encode(training).decode()}), mode=_MODE)

    def key(self) -> tuple[str, int]:
        """Run and round of what is kept; ("", 0) for nothing, or what cannot be read."""
        try:
            training = self._training()
        except VerificationError:
            self.clear()
            return "", 0
        return ("", 0) if training is None else (training.run, training.round)

    def take(self) -> tuple[Training, dict[str, NDArray[np.float32]]]:
        """Read it.

        Raises:
            VerificationError: If the disk has lost it.
        """
        training = self._training()
        if training is None:
            raise VerificationError(f"{self.path} is gone: what was trained cannot be masked")
        with safe_open(self.path, framework="numpy") as file:
            return training, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict

    def clear(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)

    def _training(self) -> Training | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                return msgspec.json.decode((file.metadata() or {}).get(_KEY, ""), type=Training)
        except (OSError, SafetensorError, msgspec.DecodeError) as error:
            raise VerificationError(f"{self.path} is damaged: {error}") from error
