"""What one round of private training may cost, and how it is trained so that it costs no more."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrivateRound:
    """How a device trains in one round under DP-SGD: what was paid for, to be carried out to the letter.

    Attributes:
        noise_multiplier: Standard deviation of the noise on a batch's summed gradient, in units of ``clip_norm``.
        clip_norm: L2 norm to which the gradient of each sample is clipped.
        sample_rate: Probability with which each sample enters a batch, independently of all others (Poisson).
        steps: Optimizer steps, empty batches included.
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    steps: int
