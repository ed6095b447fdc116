"""From what was trained to the masked integers that go out: clip, rotate, round, add noise, mask."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_agent.guard import TermsUnfitError
from federation.errors import ConfigError
from federation.wire.codec import Schema, schema_of
from federation.wire.masking import masked_encoding, scale_of
from federation.wire.messages import RoundPlan
from privacy.distributed import epsilon_of, share_variance, within
from privacy.rounded_sum import NoisySum
from privacy.secagg.masks import MaskPlan
from privacy.skellam import MAX_VARIANCE, Skellam, keystream

ROUNDING_OF_EARLIER_ROUNDS = 1.05
"""By how much this device's epsilon may exceed the promise: it takes all earlier rounds for as dear as this one, but grids differ
with the size of the cohort."""


def check_promise(plan: RoundPlan, schema: Schema) -> None:
    """Refuse a plan whose noise does not give the epsilon that it states: the aggregator is not trusted with it.

    Args:
        plan: Of any kind.
        schema: Of the model.

    Raises:
        TermsUnfitError: If the noise is too little for as many rounds as have begun.
        ConfigError: If the modulus is too small for the cohort.
    """
    terms = plan.privacy.secagg
    if terms is None or not terms.noise_multiplier:
        return
    scale = scale_of(plan, schema)
    each = NoisySum.of(
        noise_multiplier=terms.noise_multiplier,
        clip_norm=terms.clip_norm,
        step=scale.step,
        largest=scale.largest,
    )
    if not within({each: plan.round}, terms.delta, ROUNDING_OF_EARLIER_ROUNDS * terms.epsilon):
        spent = epsilon_of({each: plan.round}, terms.delta)
        raise TermsUnfitError(
            f"the plan promises epsilon {terms.epsilon:g} at delta {terms.delta:g}, but {plan.round} rounds with its noise "
            f"multiplier {terms.noise_multiplier:g} make {spent:.3g}: this device takes no part"
        )


def mask_update(plan: RoundPlan, delta: Mapping[str, NDArray[np.float32]], masks: MaskPlan) -> bytes:
    """What a masked update is on the wire: nothing but integers mod 2^modulus_bits, little-endian.

    Rounding and noise are drawn anew each time, from the operating system's entropy.

    Args:
        plan: With terms of secure aggregation.
        delta: New minus base model, float32.
        masks: Of the plan's attempt; they are used up.

    Raises:
        TermsUnfitError: If the plan promises more than its noise gives; a later attempt may.
        ConfigError: If the plan contradicts itself, the update is not finite, or the noise is more than can be drawn.
        RefusedError: If the masks are gone: the attempt is over.
    """
    terms = plan.privacy.secagg
    if terms is None or plan.up_encoding != masked_encoding(terms.modulus_bits):
        raise ConfigError(
            f"the plan's encoding is {plan.up_encoding!r}, which its terms of secure aggregation do not give: upgrade fedge"
        )
    check_promise(plan, schema_of(delta))
    scale = scale_of(plan, schema_of(delta))
    entropy = keystream()
    integers = scale.integers(delta, terms.rotation_seed, entropy)
    if terms.noise_multiplier:
        variance = share_variance(
            noise_multiplier=terms.noise_multiplier,
            clip_norm=terms.clip_norm,
            step=scale.step,
            agents=len(plan.cohort),
            dropouts=terms.dropouts,
        )
        if variance > MAX_VARIANCE:
            raise ConfigError(
                f"privacy.secagg.noise_multiplier = {terms.noise_multiplier:g} takes noise of variance {variance:.3g} on "
                f"each device, at most {MAX_VARIANCE:.3g} can be drawn: lower it, or privacy.secagg.modulus_bits"
            )
        integers += Skellam(variance).sample(scale.size, entropy)
    vector = scale.reduced(integers)
    masks.apply(vector)
    return vector.tobytes()
