"""From updates to the next global model: one accumulator, and the server step on its mean."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aggregator.summation import OrderFreeSum

Arrays = Mapping[str, NDArray[np.float32]] | Mapping[str, NDArray[np.float64]]


class Accumulator:
    """A running weighted sum of updates: memory for one model (16 bytes a parameter), however many agents.

    The result has the same bits in whatever order the updates are added (:class:`OrderFreeSum`), so they are added as they
    arrive, and once more from the disk after a crash.

    Args:
        schema: Tensor name -> shape.
    """

    def __init__(self, schema: Mapping[str, tuple[int, ...]]) -> None:
        self._sums = {name: OrderFreeSum(tuple(shape)) for name, shape in schema.items()}
        self._weight = 0.0
        self.count = 0

    def add(self, delta: Arrays, weight: float) -> None:
        """Add ``weight * delta``.

        Args:
            delta: float32 or float64 arrays of the schema's names and shapes, finite.
            weight: A whole number greater than 0 (their sum must not depend on the order either); FedAvg takes the
                number of samples.
        """
        for name, total in self._sums.items():
            total.add(delta[name], weight)
        self._weight += weight
        self.count += 1

    def sums(self) -> dict[str, NDArray[np.float64]]:
        """``sum(w_i * delta_i)``, float64; zeros if nothing was added. They are given free: the accumulator is spent."""
        return {name: self._sums.pop(name).value() for name in list(self._sums)}

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """The weighted mean ``sum(w_i * delta_i) / sum(w_i)``, float64. The accumulator is spent.

        Raises:
            ValueError: If nothing was added.
        """
        if not self.count:
            raise ValueError("the mean of no updates")
        means = self.sums()
        for total in means.values():
            np.divide(total, self._weight, out=total)
        return means


class EqualWeights(Accumulator):
    """A running sum in which every update weighs the same, whatever number of samples its agent claims."""

    def add(self, delta: Arrays, weight: float) -> None:  # noqa: ARG002 - that it does not count is the point
        """Add ``delta``."""
        super().add(delta, 1.0)


class Strategy(Protocol):
    """A server optimizer: it turns the mean update into the change of the global model."""

    def change(self, mean: Mapping[str, NDArray[np.float64]]) -> Mapping[str, NDArray[np.float64]]:
        """By what each tensor changes; ``mean`` may be overwritten."""
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

    def change(self, mean: Mapping[str, NDArray[np.float64]]) -> Mapping[str, NDArray[np.float64]]:
        """Return ``eta * mean``, in place."""
        for tensor in mean.values():
            np.multiply(tensor, self._rate, out=tensor)
        return mean
