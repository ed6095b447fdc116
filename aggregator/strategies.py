"""From updates to the next global model: one accumulator, and the server step on its mean."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float32]]


class Accumulator:
    """A running weighted sum of updates in float64: memory for one model, however many agents.

    The sum is taken in the order of :meth:`add`; callers who want the same bits again add in the same order.

    Args:
        schema: Tensor name -> shape.
    """

    def __init__(self, schema: Mapping[str, tuple[int, ...]]) -> None:
        self._sums = {name: np.zeros(shape, np.float64) for name, shape in schema.items()}
        self._weight = 0.0
        self.count = 0

    def add(self, delta: Arrays, weight: float) -> None:
        """Add ``weight * delta``.

        Args:
            delta: float32 arrays of the schema's names and shapes, finite.
            weight: Greater than 0; FedAvg takes the number of samples.
        """
        for name, total in self._sums.items():
            # dtype, since float32 * Python float would round the product to float32 first.
            np.add(total, np.multiply(delta[name], weight, dtype=np.float64), out=total)
        self._weight += weight
        self.count += 1

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """The weighted mean ``sum(w_i * delta_i) / sum(w_i)``, float64, computed in place: the accumulator is spent."""
        if not self.count:
            raise ValueError("the mean of no updates")
        for total in self._sums.values():
            np.divide(total, self._weight, out=total)
        return self._sums


class Strategy(Protocol):
    """A server optimizer: it turns the mean update into the next global model."""

    def step(self, base: Arrays, mean: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float32]]:
        """Return the next global model (float32)."""
        ...


class FedAvg:
    """Federated averaging (McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", Algorithm 1).

    With deltas ``d_i = w_i - w`` and weights ``n_i``: ``w <- w + eta * sum(n_i d_i) / sum(n_i)``; ``eta`` = 1 is the
    paper's average of models.

    Args:
        server_learning_rate: ``eta``.
    """

    def __init__(self, server_learning_rate: float = 1.0) -> None:
        self._rate = server_learning_rate

    def step(self, base: Arrays, mean: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float32]]:
        """Return ``base + eta * mean``, rounded to float32 once."""
        return {name: (value + self._rate * mean[name]).astype(np.float32) for name, value in base.items()}
