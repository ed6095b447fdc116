"""What `privacy plan` is asked, and what cannot be asked."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from federation.errors import ConfigError
from federation.task.models import CNN
from federation.wire.fields import NonNegative, Positive
from federation.wire.messages import TrainSpec

Layer = Literal["sample", "client", "distributed"]

DELTA = 1e-5
MAX_EPSILON = 50.0
"""Beyond it the guarantee says nothing that a person could use: e^50 is a one with 22 digits."""

SECAGG_CLIP_NORM = 10.0
"""Default of ``privacy.secagg.clip_norm`` without noise: it bounds the scale of the integers, and protects nobody."""

_DP_CLIP_NORM = 1.0
_LEAST_COHORT = 3
"""Below it secure aggregation is pointless: each of two devices knows the other's update from the sum."""


class Question(Struct, frozen=True, kw_only=True):
    """A deployment that somebody thinks of.

    Attributes:
        layer: Whose presence is hidden: that of a sample (DP-SGD on each device), of a device by the aggregator's noise
            (client), or of a device by noise of all devices under secure aggregation (distributed).
        epsilon: Target for the whole run.
        delta: At which it is stated.
        rounds: Of the run.
        train: Local training of a round.
        samples: Training samples of a device; of the smallest where they differ.
        cohort: Devices in a round.
        devices: In the federation: as many as the cohort, or more of which a secret draw takes the cohort (client only).
        clip_norm: L2 norm of a sample's gradient (sample), or of an update.
        model: Name of the model.
        data: Data set at hand, or empty.
        secagg: Whether updates are masked.
        modulus_bits: Of secure aggregation.
        dropouts: Share of the cohort that may vanish.
    """

    layer: Layer = "sample"
    epsilon: Positive
    delta: float = DELTA
    rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    train: TrainSpec = TrainSpec()
    samples: Annotated[int, Meta(ge=0)] = 0
    cohort: Annotated[int, Meta(ge=1, le=4096)] = 5
    devices: Annotated[int, Meta(ge=0, le=10**7)] = 0
    clip_norm: NonNegative = 0.0
    model: str = CNN
    data: str = ""
    secagg: bool = False
    modulus_bits: Literal[8, 16, 32] = 16
    dropouts: Annotated[float, Meta(ge=0, le=0.5)] = 1 / 3

    @property
    def fleet(self) -> int:
        """Devices in the federation."""
        return self.devices or self.cohort

    @property
    def sampling_rate(self) -> float:
        """Probability with which a device is drawn into a round."""
        return self.cohort / self.fleet

    @property
    def clip(self) -> float:
        """The clip norm, or its default."""
        return self.clip_norm or _DP_CLIP_NORM

    @property
    def masked(self) -> bool:
        """Whether there is secure aggregation: asked for, or needed by distributed noise."""
        return self.secagg or self.layer == "distributed"


def check(question: Question) -> None:
    """Refuse what no noise can give, with the remedy.

    Raises:
        ConfigError: It names the option, its value and what to do.
    """
    if question.epsilon > MAX_EPSILON:
        raise ConfigError(
            f"--epsilon {question.epsilon:g} protects nobody: e^epsilon bounds how much surer an attacker may become. "
            "Choose 8 or less; 1 to 3 is strong"
        )
    if question.layer == "sample":
        _check_samples(question)
    else:
        _check_devices(question)
    if question.masked and question.cohort < _LEAST_COHORT:
        raise ConfigError(
            f"secure aggregation of --cohort {question.cohort}: the sum of so few shows them. Use a cohort of "
            f"{_LEAST_COHORT} or more, or --no-secagg"
        )


def _check_samples(question: Question) -> None:
    if not question.samples:
        raise ConfigError("--samples is missing: how many training samples does the smallest device have?")
    if question.train.batch_size > question.samples:
        raise ConfigError(
            f"--batch-size {question.train.batch_size} is more than the {question.samples} samples of a device: private "
            f"training draws a batch from many. Use --batch-size {max(1, question.samples // 10)} or less, or devices with "
            "more samples"
        )
    _check_delta(question, question.samples, "samples of a device", "sample")
    if question.devices and question.devices != question.cohort:
        raise ConfigError(
            "--devices matters only with --layer client: a device pays for each round that it takes part in. "
            "Leave it away"
        )


def _check_devices(question: Question) -> None:
    _check_delta(question, question.fleet, "devices", question.layer)
    if question.fleet < question.cohort:
        raise ConfigError(
            f"--cohort {question.cohort} is more than --devices {question.devices}: it cannot be drawn from them"
        )
    if question.layer == "distributed" and question.fleet != question.cohort:
        raise ConfigError(
            "--devices beyond the cohort claim privacy from a secret draw, which --layer distributed has not: leave it "
            "away, or use --layer client"
        )
    if question.layer == "client" and question.secagg:
        raise ConfigError(
            "--layer client needs single updates, which --secagg hides from the aggregator: use --layer distributed, "
            "where the devices add the noise together"
        )


def _check_delta(question: Question, count: int, what: str, layer: str) -> None:
    if not 0 < question.delta < 1:
        raise ConfigError(
            f"--delta {question.delta:g} must lie between 0 and 1; {0.1 / count:.1g} suits {count} {what}"
        )
    if question.delta * count >= 1:
        raise ConfigError(
            f"--delta {question.delta:g} is not below 1 / {count} {what}: publishing one of them at random would satisfy it. "
            f"Use --delta {0.1 / count:.1g} (privacy.{'secagg' if layer == 'distributed' else layer}.delta)"
        )
