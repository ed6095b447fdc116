"""From what was trained to the masked integers that go out: clip, rotate, round, add noise, mask."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from federation.errors import ConfigError
from federation.wire.codec import schema_of
from federation.wire.masking import masked_encoding, scale_of
from federation.wire.messages import RoundPlan
from privacy.distributed import share_variance
from privacy.secagg.masks import MaskPlan
from privacy.skellam import MAX_VARIANCE, Skellam, keystream


def mask_update(plan: RoundPlan, delta: Mapping[str, NDArray[np.float32]], masks: MaskPlan) -> bytes:
    """What a masked update is on the wire: nothing but integers mod 2^modulus_bits, little-endian.

    Rounding and noise are drawn anew each time, from the operating system's entropy.

    Args:
        plan: With terms of secure aggregation.
        delta: New minus base model, float32.
        masks: Of the plan's attempt; they are used up.

    Raises:
        ConfigError: If the plan contradicts itself, the update is not finite, or the noise is more than can be drawn.
        RefusedError: If the masks are gone: the attempt is over.
    """
    terms = plan.privacy.secagg
    if terms is None or plan.up_encoding != masked_encoding(terms.modulus_bits):
        raise ConfigError(
            f"the plan's encoding is {plan.up_encoding!r}, which its terms of secure aggregation do not give: upgrade fedge"
        )
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
