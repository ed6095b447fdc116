"""What secure aggregation costs for a model and a cohort: bytes from the protocol, seconds from this machine."""

import math
import os
import time
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec import Struct

from federation.wire.codec import Schema
from federation.wire.shared_scale import SharedScale
from privacy.commands.question import Question
from privacy.secagg.agreement import Terms
from privacy.secagg.graph import graph_size
from privacy.secagg.masks import Mask, apply_mask
from privacy.secagg.sealing import SEALED_BYTES
from privacy.secagg.shamir import SECRET_BYTES, SHARE_BYTES, combine, split

_MESSAGE_BYTES = 250
"""Envelope of a small message: signature, purpose, federation, sender, run, round, attempt (docs/protocol.md)."""

_KEYS_BYTES = 3 * 32 + _MESSAGE_BYTES
"""Two X25519 keys and the commitment, signed; passed on as they are."""

_NAME_BYTES = 16
"""Of a device, in a list; usual ones are shorter."""

_SIGNATURE_BYTES = 64
_KEYSTREAM_SAMPLE = 1 << 20
_REPEATS = 3


class MaskingCost(Struct, frozen=True, kw_only=True):
    """Of one round.

    Attributes:
        neighbours: Of each device, with whom it shares masks.
        threshold: Shares that recover a secret.
        values: Integers in a masked vector.
        vector_bytes: Of a masked vector.
        float32_bytes: Of the same update without any encoding.
        up_bytes: That a device sends, the vector included.
        down_bytes: That a device receives, the model not included.
        device_s: CPU seconds of a device on this machine.
        aggregator_s: CPU seconds of the aggregator on this machine, if nobody drops out.
        aggregator_dropouts_s: If the tolerated share drops out after the shares were dealt.
        tolerated: Devices that may vanish.
    """

    neighbours: int
    threshold: int
    values: int
    vector_bytes: int
    float32_bytes: int
    up_bytes: int
    down_bytes: int
    device_s: float
    aggregator_s: float
    aggregator_dropouts_s: float
    tolerated: int


def masking_cost(question: Question, schema: Schema, noise_multiplier: float) -> MaskingCost:
    """Count bytes, and time the parts of the protocol.

    Args:
        question: With a cohort and a modulus.
        schema: Of the model's tensors.
        noise_multiplier: Of distributed noise; 0 for none.

    Raises:
        ConfigError: If the modulus is too small for the cohort.
    """
    devices, bits = question.cohort, question.modulus_bits
    scale = SharedScale.of(
        schema,
        clip_norm=question.clip,
        modulus_bits=bits,
        agents=devices,
        noise_multiplier=noise_multiplier,
        dropouts=question.dropouts,
    )
    size = graph_size(devices, question.dropouts, Terms(2, question.dropouts).colluders)
    k, vector = size.neighbours, scale.size * bits // 8
    up = vector + _KEYS_BYTES + k * (SEALED_BYTES + _NAME_BYTES) + 2 * _MESSAGE_BYTES
    up += _SIGNATURE_BYTES + size.holders * (SHARE_BYTES + _NAME_BYTES) + _MESSAGE_BYTES
    down = devices * 2 * _NAME_BYTES + k * (_KEYS_BYTES + SEALED_BYTES + 2 * _NAME_BYTES + _SIGNATURE_BYTES)
    down += 4 * _MESSAGE_BYTES
    per_value = _mask_s(scale) / _KEYSTREAM_SAMPLE
    dealing, recovering = _shamir_s(size.threshold, size.holders)
    exchange, encoding = _exchange_s(), _encode_s(scale, schema)
    gone = math.floor(devices * question.dropouts)
    left = devices - gone
    # Each survivor's own mask is taken off, and the masks that each lost device shares with its neighbours.
    whole = devices * (per_value * scale.size + recovering)
    lossy = left * (per_value * scale.size + recovering) + gone * (
        recovering + k * (per_value * scale.size + exchange)
    )
    return MaskingCost(
        neighbours=k,
        threshold=size.threshold,
        values=scale.size,
        vector_bytes=vector,
        float32_bytes=4 * sum(math.prod(shape) for shape in schema.values()),
        up_bytes=up,
        down_bytes=down,
        device_s=encoding + size.holders * per_value * scale.size + 2 * dealing + 2 * k * exchange,
        aggregator_s=whole,
        aggregator_dropouts_s=lossy,
        tolerated=gone,
    )


def _fastest(run: Callable[[], object]) -> float:
    """CPU seconds of the fastest of a few runs: whatever else is going on here only makes one slower."""
    times = []
    for _ in range(_REPEATS):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    return min(times)


def _mask_s(scale: SharedScale) -> float:
    vector = np.zeros(_KEYSTREAM_SAMPLE, scale.dtype)
    return _fastest(lambda: apply_mask(vector, Mask(os.urandom(32))))


def _shamir_s(threshold: int, holders: int) -> tuple[float, float]:
    secret = os.urandom(SECRET_BYTES)
    shares = split(secret, threshold, range(1, holders + 1))
    some = dict(list(shares.items())[:threshold])
    dealing = _fastest(lambda: split(secret, threshold, range(1, holders + 1)))
    return dealing, _fastest(lambda: combine(some))


def _exchange_s() -> float:
    mine, theirs = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key()
    return _fastest(lambda: mine.exchange(theirs))


def _encode_s(scale: SharedScale, schema: Schema) -> float:
    update = {name: np.full(shape, 1e-3, np.float32) for name, shape in schema.items()}
    return _fastest(lambda: scale.reduced(scale.integers(update, bytes(16))))
