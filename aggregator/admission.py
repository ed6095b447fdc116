"""The door: every offer and every update is checked here, and each refusal has a code (:class:`Rejection`).

Pure: no sockets, no disks. Cheap checks come first, so that a device on a metered link learns that its update is
unwanted before it sends a byte of it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from aggregator.masking import Masking
from federation.errors import PeerError, Rejection
from federation.wire.codec import Schema, decode, max_encoded_bytes
from federation.wire.messages import AgentMessage, Decline, RoundPlan, UpdateOffer
from federation.wire.signing import Purpose, unseal
from federation.wire.terms import SampleTerms

LARGEST_NORM = 2.0**60
"""Of an update, whatever the settings say: times the largest ``rounds.server_learning_rate`` (1e12, below 2^40) the model's
change stays within what can be encoded (``federation.wire.codec.MAX_MAGNITUDE``), so no agent can stop the server by it."""


@dataclass(frozen=True, slots=True)
class OpenRound:
    """What the door must know of the round.

    Attributes:
        run: Of the aggregator's state.
        round: The newest round.
        open: False once it takes no further update.
        base: SHA-256 of its base model.
        cohort: Who may deliver.
        encoding: Of the updates.
        upload_chunk_bytes: Largest chunk.
        schema: Tensor name -> shape of the model.
        accepted: Agent -> SHA-256 of its accepted update.
        masking: Set where updates are masked: only those of its attempt count, and their length is exact.
        sample: Terms of the plan for samples.
    """

    run: str
    round: int
    open: bool
    base: str
    cohort: frozenset[str]
    encoding: str
    upload_chunk_bytes: int
    schema: Schema
    accepted: Mapping[str, str] = field(default_factory=dict)
    masking: Masking | None = None
    sample: SampleTerms | None = None

    @classmethod
    def of(
        cls, plan: RoundPlan, schema: Schema, accepted: Mapping[str, str], masking: Masking | None
    ) -> "OpenRound":
        """What a plan says to the door.

        Args:
            plan: Of the round.
            schema: Tensor name -> shape of the model.
            accepted: Agent -> SHA-256 of its accepted update.
            masking: Where updates are masked.
        """
        return cls(
            run=plan.run,
            round=plan.round,
            open=True,
            base=plan.base,
            cohort=frozenset(plan.cohort),
            encoding=plan.up_encoding,
            upload_chunk_bytes=plan.upload_chunk_bytes,
            schema=schema,
            accepted=accepted,
            masking=masking,
            sample=plan.privacy.sample,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what a single agent may claim.

    Attributes:
        max_samples: Largest weight.
        max_norm: Largest L2 norm of a decoded update; 0 for ``LARGEST_NORM``, which is the most in any case.
    """

    max_samples: int
    max_norm: float = 0.0


def open_message(
    data: bytes, *, agent: str, federation: str, key_of: Callable[[str], Ed25519PublicKey | None]
) -> AgentMessage:
    """Verify who signed a message that came on ``agent``'s topic.

    Args:
        data: The envelope.
        agent: Owner of the topic.
        federation: This federation.
        key_of: Public key of an enrolled agent, or None.

    Returns:
        The offer or decline.

    Raises:
        PeerError: ``unknown_agent``, ``malformed``, ``wrong_federation``, ``wrong_sender``, ``bad_signature``.
    """
    key = key_of(agent)
    if key is None:
        raise PeerError(Rejection.UNKNOWN_AGENT, f"{agent!r} is not enrolled here")
    return unseal(
        data,
        UpdateOffer | Decline,  # type: ignore[arg-type]  # msgspec takes a union of tagged structs
        purpose=Purpose.AGENT,
        federation=federation,
        sender=agent,
        key=key,
    )


def check_round(message: AgentMessage, agent: str, state: OpenRound) -> None:
    """Check that a message is about the open round and comes from a member of its cohort.

    Raises:
        PeerError: ``wrong_run``, ``stale_round``, ``future_round``, ``late`` or ``not_in_cohort``.
    """
    if message.run != state.run:
        raise PeerError(Rejection.WRONG_RUN, f"run {message.run}, this is run {state.run}")
    if message.round < state.round:
        raise PeerError(
            Rejection.STALE_ROUND, f"round {message.round} is closed, this is round {state.round}"
        )
    if message.round > state.round:
        raise PeerError(
            Rejection.FUTURE_ROUND, f"round {message.round} has not begun, this is round {state.round}"
        )
    if not state.open:
        raise PeerError(Rejection.LATE, f"round {message.round} takes no further update")
    if agent not in state.cohort:
        raise PeerError(Rejection.NOT_IN_COHORT, f"{agent!r} was not invited to round {message.round}")


def check_offer(offer: UpdateOffer, agent: str, state: OpenRound, limits: Limits) -> bool:
    """Decide about an offer before a byte of the update is sent.

    Returns:
        True when this very update was accepted already, so that the same receipt is due again.

    Raises:
        PeerError: The codes of :func:`check_round`, and ``duplicate``, ``wrong_base``, ``wrong_encoding``,
            ``wrong_length``, ``bad_sample_count``, ``missing_spent`` or ``wrong_spent``.
    """
    if (
        offer.run == state.run
        and offer.round == state.round
        and state.accepted.get(agent) == offer.object.sha256
    ):
        return True
    check_round(offer, agent, state)
    if agent in state.accepted:
        raise PeerError(
            Rejection.DUPLICATE, f"another update of {agent!r} already counts in round {offer.round}"
        )
    if offer.base != state.base:
        raise PeerError(
            Rejection.WRONG_BASE, f"against model {offer.base[:12]}, this round's is {state.base[:12]}"
        )
    if offer.encoding != state.encoding:
        raise PeerError(Rejection.WRONG_ENCODING, f"{offer.encoding!r}, this round's is {state.encoding!r}")
    masking = state.masking
    bound = max_encoded_bytes(state.schema, state.encoding) if masking is None else masking.bytes
    if offer.object.length > bound:
        raise PeerError(
            Rejection.WRONG_LENGTH,
            f"{offer.object.length} bytes, an update of this model has at most {bound}",
        )
    if offer.object.chunk_bytes > state.upload_chunk_bytes:
        raise PeerError(
            Rejection.WRONG_LENGTH,
            f"chunks of {offer.object.chunk_bytes} bytes, at most {state.upload_chunk_bytes}",
        )
    if offer.samples > limits.max_samples:
        raise PeerError(
            Rejection.BAD_SAMPLE_COUNT, f"{offer.samples} samples, at most {limits.max_samples} are believed"
        )
    _check_spent(offer, state.sample)
    return False


def check_update(
    data: bytes | memoryview, schema: Schema, encoding: str, limits: Limits
) -> dict[str, NDArray[np.float32]]:
    """Decode an update and check its content.

    Args:
        data: The encoded delta, its hash already checked.
        schema: Tensor name -> shape of the model.
        encoding: That it must have.
        limits: Bounds.

    Returns:
        The delta, float32, finite; it may share memory with ``data``.

    Raises:
        PeerError: The codes of :func:`federation.wire.codec.decode`, and ``norm_too_large``.
    """
    delta = decode(data, schema, encoding)
    with np.errstate(over="ignore"):  # infinity is above every bound
        squares = [float(np.dot(flat, flat)) for flat in (array.ravel() for array in delta.values())]
    norm, bound = math.sqrt(sum(squares)), min(limits.max_norm or LARGEST_NORM, LARGEST_NORM)
    if norm > bound:
        raise PeerError(Rejection.NORM_TOO_LARGE, f"L2 norm {norm:.4g}, at most {bound:.4g}")
    return delta


def _check_spent(offer: UpdateOffer, terms: SampleTerms | None) -> None:
    """Check that a device says what it has spent, and that it fits the plan.

    It is the device's own word: this finds faults, not lies. A device that lies hurts nobody's privacy but its own.

    Raises:
        PeerError: ``missing_spent`` or ``wrong_spent``.
    """
    if terms is None:
        return
    spent = offer.spent
    if spent is None:
        raise PeerError(
            Rejection.MISSING_SPENT, "the plan has terms for samples: the offer must say what was spent"
        )
    faults = (
        (
            spent.clip_norm != terms.clip_norm,
            f"clip norm {spent.clip_norm:g}, the plan has {terms.clip_norm:g}",
        ),
        (spent.delta != terms.delta, f"delta {spent.delta:g}, the plan has {terms.delta:g}"),
        (
            spent.noise_multiplier < terms.noise_multiplier,
            f"noise multiplier {spent.noise_multiplier:g}, the plan has {terms.noise_multiplier:g}",
        ),
        (
            terms.epsilon and spent.round_epsilon > terms.epsilon,
            f"epsilon {spent.round_epsilon:g} in one round, the plan has {terms.epsilon:g} for the run",
        ),
    )
    for wrong, detail in faults:
        if wrong:
            raise PeerError(Rejection.WRONG_SPENT, detail)
