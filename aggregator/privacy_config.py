"""The settings of privacy, and the terms of a plan that follow from them.

The docstrings are the documentation of the keys (``federation.config``).
"""

from typing import Annotated, Literal

from msgspec import Meta

from federation.config import Table
from federation.wire.fields import NonNegative, Positive, Probability

DELTA = 1e-5
"""At which epsilon is stated unless the settings say otherwise."""


class SampleConfig(Table, frozen=True):
    """Sample-level differential privacy: each device trains with DP-SGD. On when epsilon or noise_multiplier is set.

    Attributes:
        epsilon: What each device may spend in the run at most; it derives its noise from it.
        noise_multiplier: Instead of epsilon: standard deviation of the noise on a batch's summed gradient, in units of clip_norm.
        clip_norm: L2 norm to which the gradient of each sample is clipped.
        delta: At which epsilon is stated; keep it well below 1 / samples of a device.
    """

    epsilon: NonNegative = 0.0
    noise_multiplier: NonNegative = 0.0
    clip_norm: Positive = 1.0
    delta: Probability = DELTA


class ClientConfig(Table, frozen=True):
    """Client-level differential privacy: the aggregator clips each update and adds noise to the sum. On when noise_multiplier is set.

    Attributes:
        noise_multiplier: Standard deviation of the noise on the sum of the updates, in units of the clip norm.
        epsilon: Budget of the run; it ends before a round that would exceed it.
        delta: At which epsilon is stated; keep it well below 1 / devices.
        clip_norm: L2 norm to which each update is clipped; where it adapts, that of the first round.
        quantile: Share of the updates that shall be below the clip norm, which adapts to it; 0 keeps it fixed.
        clip_learning_rate: Of the adaptation.
        sampling_rate: Probability with which each device that is online is drawn into a round, by a secret draw, perhaps nobody; 1 takes all and claims no amplification. Below 1, rounds.min_agents counts who is online, and a round closes after its second deadline with what has come.
    """

    noise_multiplier: NonNegative = 0.0
    epsilon: Positive = 8.0
    delta: Probability = DELTA
    clip_norm: Positive = 1.0
    quantile: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    clip_learning_rate: Positive = 0.2
    sampling_rate: Annotated[float, Meta(gt=0, le=1)] = 1.0


class SecAggConfig(Table, frozen=True):
    """Secure aggregation: the aggregator learns only the sum of the updates.

    Attributes:
        enabled: Whether updates are masked.
        clip_norm: L2 norm to which a device clips its update; all share the scale that follows from it.
        modulus_bits: 8, 16 or 32: sums are taken mod 2^modulus_bits; 8 suits distributed noise only.
        min_agents: Least devices whose sum may be learned.
        dropouts: Share of the cohort that may vanish at any step, up to 0.5.
        phase_s: Seconds that each step of the protocol may take before those that are silent count as vanished.
        noise_multiplier: Distributed differential privacy: standard deviation of the noise in the sum, in units of clip_norm, of which each device adds its part; 0 for none.
        epsilon: Budget of the run with distributed noise; it ends before a round that would exceed it.
        delta: At which epsilon is stated.
    """

    enabled: bool = False
    clip_norm: Positive = 10.0
    modulus_bits: Literal[8, 16, 32] = 16
    min_agents: Annotated[int, Meta(ge=2, le=4096)] = 3
    dropouts: Annotated[float, Meta(ge=0, le=0.5)] = 1 / 3
    phase_s: Positive = 60.0
    noise_multiplier: NonNegative = 0.0
    epsilon: Positive = 8.0
    delta: Probability = DELTA


class PrivacyConfig(Table, frozen=True):
    """What is promised to the devices.

    Attributes:
        sample: See :class:`SampleConfig`.
        client: See :class:`ClientConfig`.
        secagg: See :class:`SecAggConfig`.
    """

    sample: SampleConfig = SampleConfig()
    client: ClientConfig = ClientConfig()
    secagg: SecAggConfig = SecAggConfig()
