"""How much noise lossy encodings may add: measured against the weights, not against the update.

A coarse grid is harmless as long as its noise is small beside the weights that it is added to. In the first rounds,
or with large learning rates, updates are as large as the weights: noise of several times their power then destroys the
model, the next updates grow, and the noise with them (docs/adr/0007-bounded-noise.md has the runs). Later updates are
small beside the weights, the bound is out of reach, and the grid is as coarse as the plan says.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float32]]


def noise_bounds(model: Arrays, delta: Arrays, share: float) -> dict[str, float]:
    """The variance that an encoding may add to each value of a tensor, as a mean over the tensor.

    ``bound = share * max(mean(w^2), mean(d^2))``, with w the weights and d their change: a tensor that was zero so far is
    measured against what it becomes.

    Args:
        model: The weights that the delta is added to.
        delta: What is to be encoded, of the same names and shapes.
        share: Of the average of ``n`` updates, ``n`` times as much may be allowed to each: errors of agents are
            independent. 0 sets no bound.

    Returns:
        By tensor; empty for no bound.
    """
    if not share:
        return {}
    return {
        name: share * max(_power(model[name]), _power(change))
        for name, change in delta.items()
        if change.size
    }


def _power(array: NDArray[np.float32]) -> float:
    flat = array.reshape(-1)
    with np.errstate(over="ignore"):  # infinity is no bound
        return float(np.dot(flat, flat)) / flat.size if flat.size else 0.0
