"""From a deployment that somebody thinks of to what its privacy takes: noise, epsilon round by round, and how loud the noise is."""

import math
from collections.abc import Callable

from msgspec import Struct

from federation.errors import ConfigError
from federation.wire.codec import Schema
from federation.wire.shared_scale import SharedScale
from privacy import distributed
from privacy.accounting import Spend, epsilon_pld, noise_multiplier_for
from privacy.budget import steps_of
from privacy.central import ClientMechanism
from privacy.commands.question import Question
from privacy.errors import PrivacyError
from privacy.rounded_sum import NoisySum

LOUD, DOUBTFUL = 1.0, 0.3
"""Noise of a whole run over the most that the clipped updates can move the model: above the first the noise wins even if
all updates agree in every round, above the second expect a clear loss."""


class Mechanism(Struct, frozen=True, kw_only=True):
    """What the noise is and what it costs.

    Attributes:
        noise_multiplier: Standard deviation of the noise on a sum, in units of the clip norm.
        clip_norm: Of a sample's gradient, or of an update.
        sampling_rate: Probability with which one sample enters a step, or one device a round.
        steps: Noisy steps of a round: optimizer steps of a device, or one sum.
        epsilon_round: Of one round.
        epsilon: Of all rounds.
        delta: At which both are stated.
        by_round: Epsilon after so many rounds.
        noise_share: Expected L2 norm of the noise on a mean (of a batch's gradients, or of the updates) over the clip
            norm, which bounds that of the mean itself.
        noise_share_run: The same of all rounds together: noise grows with the root of their number. 0 for samples, where
            it says nothing: the clip norm is met by few.
        remarks: In plain words.
    """

    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    steps: int
    epsilon_round: float
    epsilon: float
    delta: float
    by_round: dict[int, float]
    noise_share: float
    noise_share_run: float
    remarks: list[str]

    @property
    def verdict(self) -> str:
        """Whether it is practical: ``practical``, ``doubtful`` or ``impractical``."""
        if self.noise_share_run > LOUD:
            return "impractical"
        return "doubtful" if self.noise_share_run > DOUBTFUL else "practical"


class Change(Struct, frozen=True, kw_only=True):
    """What another choice would need.

    Attributes:
        what: In words.
        noise_multiplier: For the same epsilon.
        noise_share: As of :class:`Mechanism`.
    """

    what: str
    noise_multiplier: float
    noise_share: float


def mechanism_of(question: Question, schema: Schema) -> Mechanism:
    """What the question's layer takes.

    Args:
        question: Checked.
        schema: Of the model's tensors.

    Raises:
        ConfigError: If no noise is enough.
    """
    parameters = sum(math.prod(shape) for shape in schema.values())
    try:
        match question.layer:
            case "sample":
                return _sample(question, parameters)
            case "client":
                return _client(question, parameters)
            case "distributed":
                return _distributed(question, schema)
    except PrivacyError as error:
        raise ConfigError(
            f"no noise gives epsilon {question.epsilon:g} over {question.rounds} rounds ({error}): "
            "allow a larger --epsilon, or plan fewer --rounds"
        ) from error


def changes_of(question: Question, parameters: int) -> list[Change]:
    """What changing one thing would do to the noise of sample-level privacy, epsilon being the same."""
    train = question.train
    others = [("half as many rounds", max(1, question.rounds // 2), train.batch_size, question.samples)]
    larger = next(
        (size for size in (4 * train.batch_size, 2 * train.batch_size) if size <= question.samples), None
    )
    if larger is not None:
        others.append((f"batches of {larger}", question.rounds, larger, question.samples))
    others.append(("twice the samples per device", question.rounds, train.batch_size, 2 * question.samples))
    found = []
    for what, rounds, batch, samples in others:
        rate, steps = steps_of(samples, batch, train.epochs, train.max_steps)
        noise = noise_multiplier_for(question.epsilon, question.delta, [], rate, steps * rounds)
        share = noise * math.sqrt(parameters) / (rate * samples)
        found.append(Change(what=what, noise_multiplier=noise, noise_share=share))
    return found


def _sample(question: Question, parameters: int) -> Mechanism:
    train = question.train
    rate, steps = steps_of(question.samples, train.batch_size, train.epochs, train.max_steps)
    noise = noise_multiplier_for(question.epsilon, question.delta, [], rate, steps * question.rounds)

    def after(rounds: int) -> float:
        return epsilon_pld([Spend(noise, rate, steps * rounds)], question.delta)

    remarks = [
        f"Each sample enters a step with probability {rate:g}, and each device takes {steps} steps a round.",
        (
            "Epsilon is per device and sample: it bounds what anyone, the aggregator included, learns about one picture from all "
            "that the device ever sends. Devices with more samples than the one planned for need less noise, and derive it."
        ),
    ]
    return Mechanism(
        noise_multiplier=noise,
        clip_norm=question.clip,
        sampling_rate=rate,
        steps=steps,
        epsilon_round=after(1),
        epsilon=after(question.rounds),
        delta=question.delta,
        by_round=_some_rounds(question.rounds, after),
        noise_share=noise * math.sqrt(parameters) / (rate * question.samples),
        noise_share_run=0.0,
        remarks=remarks,
    )


def _client(question: Question, parameters: int) -> Mechanism:
    rate = question.sampling_rate
    noise = noise_multiplier_for(question.epsilon, question.delta, [], rate, question.rounds)

    def after(rounds: int) -> float:
        return epsilon_pld([Spend(noise, rate, rounds)], question.delta)

    one = ClientMechanism(clip_norm=1.0, noise_multiplier=noise, expected=float(question.cohort))
    share = one.noise_norm(parameters)
    return _of_devices(question, noise, share, after)


def _distributed(question: Question, schema: Schema) -> Mechanism:
    left = distributed.least_agents(question.cohort, question.dropouts)

    def sum_with(noise: float) -> NoisySum:
        scale = SharedScale.of(
            schema,
            clip_norm=question.clip,
            modulus_bits=question.modulus_bits,
            agents=question.cohort,
            noise_multiplier=noise,
            dropouts=question.dropouts,
        )
        return NoisySum.of(
            noise_multiplier=noise, clip_norm=question.clip, step=scale.step, largest=scale.largest
        )

    noise = distributed.noise_multiplier_for(question.epsilon, question.delta, question.rounds, sum_with)
    each = sum_with(noise)

    def after(rounds: int) -> float:
        return distributed.epsilon_of([each] * rounds, question.delta)

    parameters = sum(math.prod(shape) for shape in schema.values())
    # If nobody drops out the sum has more noise than was promised.
    loudest = noise * math.sqrt(question.cohort / left)
    share = loudest * math.sqrt(parameters) / question.cohort
    found = _of_devices(question, noise, share, after)
    remark = (
        f"Each device adds noise for a sum of {left} of {question.cohort}: with all of them there the sum has "
        f"{loudest / noise:.2f} times what was promised. Nobody needs to be trusted to add it."
    )
    found.remarks.append(remark)
    return found


def _of_devices(question: Question, noise: float, share: float, after: Callable[[int], float]) -> Mechanism:
    over_run = share / math.sqrt(question.rounds)
    needed = math.ceil(question.cohort * over_run / DOUBTFUL)
    remarks = [
        (
            f"The noise on the mean of {question.cohort} updates has an L2 norm of about {share:.1f} clip norms; the mean itself "
            f"has at most one. Over {question.rounds} rounds the noise adds up to {over_run:.2f} times the most that all updates "
            "together can move the model."
        )
    ]
    if over_run > DOUBTFUL:
        remarks.append(
            f"About {needed:,} devices in each round would make it practical for this model at this epsilon; so would a "
            "smaller model, or training only its last layer. With few devices take sample-level privacy instead."
        )
    return Mechanism(
        noise_multiplier=noise,
        clip_norm=question.clip,
        sampling_rate=question.sampling_rate,
        steps=1,
        epsilon_round=after(1),
        epsilon=after(question.rounds),
        delta=question.delta,
        by_round=_some_rounds(question.rounds, after),
        noise_share=share,
        noise_share_run=over_run,
        remarks=remarks,
    )


def _some_rounds(rounds: int, after: Callable[[int], float]) -> dict[int, float]:
    """Epsilon after the first round, some between, and the last."""
    shown = sorted({1, *(max(1, rounds * part // 4) for part in (1, 2, 3)), rounds})
    return {number: after(number) for number in shown}
