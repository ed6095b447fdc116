"""Client-level differential privacy in the aggregator: clip each update, add noise to the sum, count what it costs.

One round, with clip norm C, noise multiplier z and n expected devices (McMahan, Ramage, Talwar and Zhang 2018, "Learning
Differentially Private Recurrent Language Models", with a fixed denominator)::

    mean = (sum_i clip(u_i, C) + N(0, (z_sum C)^2 I)) / n          clip(u, C) = u min(1, C / ||u||_2)

All updates weigh the same, and n does not depend on who delivers: both would change the sensitivity.

**What is protected.** Neighbouring federations differ by all updates of one device, which in the other one are zero: what a
device has is protected, not that it takes part. A device that delivers nothing has a zero update. One device's part of
the sum is at most C, however the others behave.

**Cohorts.** Where a secret draw takes each device with probability q, independently, a round is one step of the Poisson-subsampled
Gaussian mechanism. That holds against those who see models only: whoever knows the cohort (plans name it) is owed the
accounting without amplification, q = 1. Where everybody takes part, or a fixed number is drawn, q = 1 is all that is
claimed: a draw of fixed size is not Poisson (replacing one device by another moves the sum by up to 2 C), and devices that come
and go at will are not drawn at random at all. A draw of nobody is a round like any other: noise alone. To leave it out
would tell that nobody was drawn.

**Adaptive clip norm** (Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially Private Learning with Adaptive
Clipping", Algorithm 1). Each device adds one bit, ``b_i = [||u_i|| <= C]``, and C follows the quantile gamma::

    b = 1/2 + (sum_i (b_i - 1/2) + N(0, sigma_b^2)) / n          C <- C exp(-eta (b - gamma))

The bit's sensitivity is 1/2, so that sum and count together cost what z alone would cost if::

    z_sum = (z^-2 - (2 sigma_b)^-2)^(-1/2)
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.accounting import Spend, within
from privacy.gaussian import draw_on_grid, grid_step, truncate

Arrays = Mapping[str, NDArray[np.float32]] | Mapping[str, NDArray[np.float64]]

CLIP_MARGIN = 2.0**-20
"""By which a clipped update stays below the clip norm: more than float64 loses in the square sum of 2^32 values."""

LEAST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-9, 1e9
"""Where an adaptive clip norm stops: no useful update has such a norm."""

_GRID_BITS = 30
"""Grid steps in the clip norm: 2^30. Sums of 4,096 updates and noise of z < 2^18 stay exact in float64."""

_COUNT_SHARE = 20.0
"""The count's noise is sigma_b = n / 20, which costs the sum little (Andrew et al. 2021)."""

_BIT_SENSITIVITY = 0.5


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How the clip norm follows the updates' norms.

    Attributes:
        quantile: gamma: share of the updates that shall be below the clip norm, in (0, 1).
        learning_rate: eta, greater than 0.
    """

    quantile: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class ClientMechanism:
    """What is released of one round's updates. Pure, but for the entropy of the noise.

    Attributes:
        clip_norm: C, greater than 0.
        noise_multiplier: z, of the whole round, greater than 0.
        expected: n, greater than 0: it is fixed before anybody delivers.
        adaptation: None keeps the clip norm.
    """

    clip_norm: float
    noise_multiplier: float
    expected: float
    adaptation: Adaptation | None = None

    @property
    def count_noise(self) -> float:
        """sigma_b: of the noise on the count of norms below C, in devices.

        ``max(n / 20, z)``: in cohorts below 20 z devices, n / 20 would leave too little noise for the sum, or none at all.
        """
        return max(self.expected / _COUNT_SHARE, self.noise_multiplier)

    @property
    def sum_noise(self) -> float:
        """z_sum: of the noise on the sum, in units of C; z where the clip norm is fixed."""
        if self.adaptation is None:
            return self.noise_multiplier
        count = self.count_noise / _BIT_SENSITIVITY
        return 1 / math.sqrt(self.noise_multiplier**-2 - count**-2)

    def clip(self, update: Arrays) -> tuple[dict[str, NDArray[np.float64]], bool]:
        """Scale an update to an L2 norm of at most C over all tensors together.

        Args:
            update: float32 or float64, finite, any shapes.

        Returns:
            The clipped update, float64, truncated towards 0 to a grid of C / 2^30 or less, so that sums of it are exact
            (``privacy.gaussian``); and whether its norm was below C before.
        """
        wide = {name: array.astype(np.float64) for name, array in update.items()}
        norm = math.sqrt(
            sum(float(np.dot(flat, flat)) for flat in (array.ravel() for array in wide.values()))
        )
        limit = self.clip_norm * (1 - CLIP_MARGIN)
        for array in wide.values():
            if norm > limit:
                np.multiply(array, limit / norm, out=array)
            truncate(array, self._step)
        return wide, norm <= limit

    def noisy_mean(self, total: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """``(total + N(0, (z_sum C)^2)) / n``.

        Args:
            total: Sum of what :meth:`clip` returned, each device at most once, float64; zeros where nobody delivered.
        """
        std = self.sum_noise * self.clip_norm
        means = {}
        for name, values in total.items():
            mean = means[name] = draw_on_grid(values.shape, std, self._step)
            mean += values  # in place: what has no dimensions stays an array
            mean /= self.expected
        return means

    def next_clip_norm(self, below: int, delivered: int) -> float:
        """The clip norm of the next round: C itself where it is fixed.

        Args:
            below: Updates whose norm was below C.
            delivered: All updates in the sum.
        """
        if self.adaptation is None:
            return self.clip_norm
        sigma = self.count_noise
        noise = float(draw_on_grid((), sigma, min(_BIT_SENSITIVITY, grid_step(sigma))))
        share = 0.5 + (below - delivered / 2 + noise) / self.expected
        adapted = self.clip_norm * math.exp(
            -self.adaptation.learning_rate * (share - self.adaptation.quantile)
        )
        return min(max(adapted, LEAST_CLIP_NORM), LARGEST_CLIP_NORM)

    def noise_norm(self, parameters: int) -> float:
        """Expected L2 norm of the noise on the mean, ``z_sum C sqrt(d) / n``; a mean without noise has at most C.

        Args:
            parameters: d, values in the model.
        """
        return self.sum_noise * self.clip_norm * math.sqrt(parameters) / self.expected

    @property
    def _step(self) -> float:
        return grid_step(self.clip_norm, _GRID_BITS)


def affordable(so_far: Iterable[Spend], step: Spend, epsilon: float, delta: float, *, at_most: int) -> int:
    """How many more rounds the budget of a run pays for.

    Args:
        so_far: All rounds that were paid for; they may have had other noise and other rates.
        step: One more round.
        epsilon: Budget of the run.
        delta: At which it is stated.
        at_most: Rounds that are wanted.

    Returns:
        The largest number up to ``at_most`` with which the whole stays within epsilon.
    """
    spent = tuple(so_far)

    def fits(rounds: int) -> bool:
        more = Spend(step.noise_multiplier, step.sample_rate, step.steps * rounds)
        return within((*spent, more), delta, epsilon)

    if at_most <= 0 or fits(at_most):
        return max(0, at_most)
    low, high = 0, 1
    while high < at_most and fits(high):
        low, high = high, 2 * high
    high = min(high, at_most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
