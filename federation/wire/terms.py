"""The privacy terms of a plan, and what a device says that it has spent.

The three layers are independent; a plan may state any of them (``docs/privacy.md``).
"""

from typing import Annotated, Literal

from msgspec import Meta

from federation.wire.fields import Count, NonNegative, Positive, Probability, RoundNumber, Sha256, Share, Wire


class SampleTerms(Wire, frozen=True):
    """Sample-level differential privacy: each device trains with DP-SGD.

    Neighbouring data sets differ by one sample of one device, added or removed.

    Attributes:
        clip_norm: L2 norm to which the gradient of each sample is clipped.
        delta: At which epsilon is stated.
        epsilon: Most that a device may spend in the run; it derives its noise from it. 0 for none: then the noise
            multiplier is given.
        noise_multiplier: Standard deviation of the noise on a batch's sum of clipped gradients, in units of
            ``clip_norm``; 0 lets each device derive it from ``epsilon``.
        rounds: Of the run: ``epsilon`` is to last for all of them.
    """

    clip_norm: Positive
    delta: Probability
    rounds: RoundNumber
    epsilon: NonNegative = 0.0
    noise_multiplier: NonNegative = 0.0

    def __post_init__(self) -> None:
        if (self.epsilon > 0) == (self.noise_multiplier > 0):
            raise ValueError("one of epsilon and noise_multiplier must be set, not both")


class ClientTerms(Wire, frozen=True):
    """Client-level differential privacy: the aggregator clips each update and adds noise to their sum.

    Neighbouring federations differ by all updates of one device, which in the other one are zero: what it has is protected,
    not that it takes part. The aggregator is trusted.

    Attributes:
        clip_norm: L2 norm to which an update is clipped in this round; it may adapt from round to round.
        noise_multiplier: Standard deviation of the noise on the sum, in units of the clip norm.
        epsilon: That the run will have spent at most.
        delta: At which epsilon is stated.
        sampling_rate: Probability with which a device is drawn into a round, by a secret draw; 1 claims no amplification.
    """

    clip_norm: Positive
    noise_multiplier: Positive
    epsilon: Positive
    delta: Probability
    sampling_rate: Annotated[float, Meta(gt=0, le=1)] = 1.0


class SecAggTerms(Wire, frozen=True):
    """Secure aggregation: the aggregator sees only the sum of the updates; optionally with distributed noise.

    Attributes:
        clip_norm: L2 norm to which a device clips its update, so that all share one scale.
        modulus_bits: Sums are taken mod 2^modulus_bits.
        min_agents: Least devices whose sum may be learned.
        dropouts: Share of the cohort that may vanish at any step.
        rotation_seed: 16 bytes, of the rotation that all devices of the round share.
        noise_multiplier: Standard deviation of the noise in the sum, in units of ``clip_norm``, of which each device adds
            its part; 0 for none.
        epsilon: That the run will have spent at most, by the noise; 0 without noise.
        delta: At which epsilon is stated.
    """

    clip_norm: Positive
    modulus_bits: Literal[8, 16, 32]
    min_agents: Annotated[int, Meta(ge=2, le=4096)]
    dropouts: Annotated[float, Meta(ge=0, le=0.5)]
    rotation_seed: Annotated[bytes, Meta(min_length=16, max_length=16)]
    noise_multiplier: NonNegative = 0.0
    epsilon: NonNegative = 0.0
    delta: Share = 0.0

    def __post_init__(self) -> None:
        if (self.noise_multiplier > 0) != (self.epsilon > 0):
            raise ValueError("noise_multiplier and epsilon go together")


class PrivacyTerms(Wire, frozen=True):
    """What a round promises. None means that the layer is off.

    Attributes:
        sample: See :class:`SampleTerms`.
        client: See :class:`ClientTerms`.
        secagg: See :class:`SecAggTerms`.
    """

    sample: SampleTerms | None = None
    client: ClientTerms | None = None
    secagg: SecAggTerms | None = None

    @property
    def uniform(self) -> bool:
        """Whether all updates weigh the same, and agents tell neither how many samples they have nor how well they fit."""
        return self != PrivacyTerms()


class Spent(Wire, frozen=True):
    """What a device's ledger says after the round was paid for. It reveals nothing of the samples but, by ``steps``, about how many there are.

    Attributes:
        epsilon: Spent on the device's data in this federation so far, this round included.
        round_epsilon: By this round alone.
        delta: At which both are stated.
        noise_multiplier: Of this round.
        clip_norm: Of this round.
        steps: Of this round that were paid for.
        entry: Number of the ledger's last entry.
        head: Its hash, which depends on all entries before it.
    """

    epsilon: NonNegative
    round_epsilon: NonNegative
    delta: Probability
    noise_multiplier: Positive
    clip_norm: Positive
    steps: Count
    entry: Annotated[int, Meta(ge=1, le=2**40)]
    head: Sha256
