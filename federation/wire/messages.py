"""Every struct that crosses the wire. Bounded, tagged, unknown fields forbidden.

Control messages are msgpack; what a person may want to watch with ``mosquitto_sub`` (the states) is JSON.
Every decode of foreign bytes goes through :func:`decode_msgpack` or :func:`decode_json`, which raise
:class:`~federation.errors.PeerError` and nothing else.
"""

from enum import StrEnum
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from federation.errors import PeerError, Rejection
from federation.wire.fields import (
    MAX_COHORT,
    Attempt,
    Bytes,
    Count,
    Finite,
    Name,
    NonNegative,
    Positive,
    RoundNumber,
    RunId,
    SessionId,
    Sha256,
    Share,
    Spec,
    Text,
    Wire,
)
from federation.wire.terms import PrivacyTerms, Spent

MAX_CHUNKS = 4096
"""Chunks in one object. At the default 96 KiB that is 384 MiB; larger models need a larger ``chunk_bytes``."""

CHUNK_DIGEST_BYTES = 16
"""A chunk is identified by the first 16 bytes of its SHA-256: second preimages cost 2^128."""

MAX_CHUNK_BYTES = 16 * 1024 * 1024
MAX_CREDIT = 64

MAX_DELTAS = 64
"""Versions that a plan may lead over."""

STATE_INTERVAL_S = 300.0
"""How often the aggregator refreshes its retained state, seconds: no clock in it is older, by the aggregator's own."""


class ObjectRef(Wire, frozen=True):
    """A content-addressed object and the chunks that it is cut into.

    Attributes:
        sha256: Hex SHA-256 of the whole object.
        length: Bytes of the whole object.
        chunk_bytes: Bytes of every chunk but the last.
        digests: The first 16 bytes of each chunk's SHA-256, concatenated in order.
    """

    sha256: Sha256
    length: Annotated[int, Meta(ge=1, le=MAX_CHUNKS * MAX_CHUNK_BYTES)]
    chunk_bytes: Annotated[int, Meta(ge=64, le=MAX_CHUNK_BYTES)]
    digests: Annotated[bytes, Meta(min_length=CHUNK_DIGEST_BYTES, max_length=MAX_CHUNKS * CHUNK_DIGEST_BYTES)]

    def __post_init__(self) -> None:
        if len(self.digests) != self.chunks * CHUNK_DIGEST_BYTES:
            raise ValueError(
                f"{len(self.digests)} bytes of digests for {self.chunks} chunks of {CHUNK_DIGEST_BYTES} bytes each"
            )

    @property
    def chunks(self) -> int:
        """Number of chunks: ceil(length / chunk_bytes)."""
        return -(-self.length // self.chunk_bytes)


class TaskSpec(Wire, frozen=True):
    """What is learned: enough for an agent to build the model and to bring its images into shape.

    Attributes:
        model: ``cnn``, ``scattering``, a torchvision classification model's name, or ``package.module:factory``.
        labels: Class names; the index in this tuple is the class.
        channels: 1 (grey) or 3 (RGB); a plug-in data set may use others.
        height: Pixels.
        width: Pixels.
        mean: Per channel, subtracted from pixels scaled to [0, 1].
        std: Per channel, divided by after the mean is subtracted.
        dp_ready: Whether the model is rebuilt so that gradients of single samples exist
            (``federation.task.dp_ready``).
    """

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    labels: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(min_length=2, max_length=4096)
    ]
    channels: Annotated[int, Meta(ge=1, le=64)]
    height: Annotated[int, Meta(ge=4, le=4096)]
    width: Annotated[int, Meta(ge=4, le=4096)]
    mean: Annotated[tuple[Finite, ...], Meta(min_length=1, max_length=64)]
    std: Annotated[tuple[Positive, ...], Meta(min_length=1, max_length=64)]
    dp_ready: bool = False

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} stds for {self.channels} channels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("two labels have the same name")


class TrainSpec(Wire, frozen=True):
    """How an agent trains in one round.

    Attributes:
        epochs: Passes over the local data.
        batch_size: Samples per step.
        learning_rate: Of the local optimizer.
        momentum: SGD only.
        weight_decay: L2 penalty.
        optimizer: ``sgd`` or ``adam``.
        max_steps: Steps after which local training stops early; 0 means no limit.
        seed: From which each agent derives its own, together with the round and its name.
    """

    epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 32
    learning_rate: Positive = 0.01
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    max_steps: Count = 0
    seed: Count = 0


class FullModel(Wire, frozen=True):
    """A version of the global model that an agent can start from with nothing at hand.

    Attributes:
        version: Its digest (``federation.wire.versions``).
        object: A safetensors file.
        seed: If set, the model that the task builds under this seed most likely is this version, so that nothing need
            be sent. Not on every machine: check the digest, and fetch ``object`` if it differs.
    """

    version: Sha256
    object: ObjectRef
    seed: Count | None = None


class ModelDelta(Wire, frozen=True):
    """The step from one version of the global model to the next: ``next = base + decode(object)`` in float32.

    Attributes:
        base: Digest of the version that it starts from.
        object: A frame (``federation.wire.codec``).
        encoding: Of the frame.
    """

    base: Sha256
    object: ObjectRef
    encoding: Spec


class RoundPlan(Wire, frozen=True, tag="round"):
    """The open round. Signed by the aggregator, retained.

    Attributes:
        run: The run that this round belongs to; a new state folder is a new run.
        round: Counted from 1.
        attempt: Raised when a round is extended for lack of a quorum; updates of earlier attempts stay valid.
        task: What is learned.
        train: How.
        base: Digest of the version of the global model that this round starts from.
        full: A version to start from with nothing at hand: ``base``, or one that ``deltas`` lead on from.
        deltas: The steps between consecutive versions, oldest first; the last one leads to ``base``.
        up_encoding: Of the updates.
        max_noise: Most noise that an encoding may add to an update, as a share of the weights' power
            (``federation.wire.noise``); 0 sets no bound. The receiver need not know what an agent made of it.
        cohort: The agents that take part, sorted.
        deadline_s: Seconds after ``issued_at`` at which the round closes.
        issued_at: Unix seconds by the aggregator's clock; informative, agents do not act on it.
        upload_chunk_bytes: The largest chunk that the aggregator's link takes.
        privacy: What the round promises; a device may decline less than it wants.
    """

    run: RunId
    round: RoundNumber
    attempt: Attempt
    task: TaskSpec
    train: TrainSpec
    base: Sha256
    full: FullModel
    deltas: Annotated[tuple[ModelDelta, ...], Meta(max_length=MAX_DELTAS)]
    up_encoding: Spec
    max_noise: NonNegative
    cohort: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MAX_COHORT)]
    deadline_s: Positive
    issued_at: NonNegative
    upload_chunk_bytes: Annotated[int, Meta(ge=64, le=MAX_CHUNK_BYTES)]
    privacy: PrivacyTerms = PrivacyTerms()

    def __post_init__(self) -> None:
        versions = [*(delta.base for delta in self.deltas), self.base]
        if len(set(versions)) != len(versions):
            raise ValueError("the deltas lead in a circle")
        if self.full.version not in versions:
            raise ValueError(
                f"nothing leads from the full model {self.full.version[:12]} to {self.base[:12]}"
            )


class IdlePlan(Wire, frozen=True, tag="idle"):
    """No round is open. Signed by the aggregator, retained.

    Attributes:
        run: As in :class:`RoundPlan`.
        round: The last closed round; 0 before the first.
        finished: True when no further round will come in this run.
        reason: For people.
        issued_at: Unix seconds by the aggregator's clock.
    """

    run: RunId
    round: Annotated[int, Meta(ge=0, le=1_000_000)]
    finished: bool
    reason: Text
    issued_at: NonNegative


Plan = RoundPlan | IdlePlan


class TrainMetrics(Wire, frozen=True):
    """What an agent tells about its local training.

    Attributes:
        loss: Mean training loss over the last epoch, nats; None where the plan has privacy terms, since it is not private.
        accuracy: Mean training top-1 over the last epoch, in [0, 1]; None as for the loss.
        steps: Optimizer steps taken.
        train_s: Wall seconds spent in training.
    """

    loss: Finite | None
    accuracy: Share | None
    steps: Count
    train_s: NonNegative


class UpdateOffer(Wire, frozen=True, tag="offer"):
    """An agent's signed statement of its update. The chunks that follow are bound to it by ``object``.

    Attributes:
        run: As in the plan.
        round: As in the plan.
        base: Digest of the version that the delta is against.
        object: The encoded delta (``federation.wire.codec``).
        encoding: As in the plan.
        samples: Local training samples: the weight of the update. 1 where the plan has privacy terms.
        metrics: Of the local training.
        attempt: Of the plan that it answers; under secure aggregation it counts only in that one.
        spent: What the device's ledger says, under sample-level terms.
    """

    run: RunId
    round: RoundNumber
    base: Sha256
    object: ObjectRef
    encoding: Spec
    samples: Annotated[int, Meta(ge=1, le=2**40)]
    metrics: TrainMetrics
    attempt: Attempt = 1
    spent: Spent | None = None


class DeclineCode(StrEnum):
    """Why an agent sits a round out."""

    FAULT = "fault"
    TERMS = "terms"
    BUDGET = "budget"


class Decline(Wire, frozen=True, tag="decline"):
    """An agent's signed refusal to take part in a round, so that nobody waits for it.

    Attributes:
        run: As in the plan.
        round: As in the plan.
        reason: For people: what is wrong on the device.
        code: ``fault`` on the device, ``terms`` that it does not accept, or a privacy ``budget`` that is spent.
    """

    run: RunId
    round: RoundNumber
    reason: Text
    code: DeclineCode = DeclineCode.FAULT


AgentMessage = UpdateOffer | Decline


class Credit(Wire, frozen=True, tag="credit"):
    """The aggregator asks an agent for chunks of an object that the agent has offered.

    Attributes:
        sha256: The object.
        chunks: Indices wanted now; sending any other chunk is an error.
    """

    sha256: Sha256
    chunks: Annotated[
        tuple[Annotated[int, Meta(ge=0, lt=MAX_CHUNKS)], ...], Meta(min_length=1, max_length=MAX_CREDIT)
    ]


class Receipt(Wire, frozen=True, tag="receipt"):
    """The aggregator's signed answer to an offer: the update is on its disk, or it is refused.

    Attributes:
        run: As in the offer.
        round: As in the offer.
        sha256: The object that was offered.
        accepted: True when the update is stored and will be counted once.
        code: Why it was refused; None when accepted.
        detail: For people.
    """

    run: RunId
    round: RoundNumber
    sha256: Sha256
    accepted: bool
    code: Rejection | None = None
    detail: Text = ""


class Capabilities(Wire, frozen=True):
    """What a device can do, told in its birth.

    Attributes:
        version: Of fedge.
        device: ``cpu``, ``cuda`` or ``mps``; ``none`` when the agent cannot train.
        threads: CPU threads that training may use.
        memory_mb: Main memory, MiB.
        samples: Local training samples.
        encodings: Names of the encodings that it can write and read, without their parameters.
        platform: For people, e.g. ``Linux-6.6-aarch64``.
    """

    version: Annotated[str, Meta(max_length=64)]
    device: Annotated[str, Meta(max_length=32)]
    threads: Annotated[int, Meta(ge=1, le=4096)]
    memory_mb: Count
    samples: Count
    encodings: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=64)]
    platform: Annotated[str, Meta(max_length=200)]


class Traffic(Wire, frozen=True):
    """Bytes that one end of a link has moved.

    All bytes of MQTT count: headers, topics, acknowledgements and pings too. Those of TLS, TCP and IP do not.

    Attributes:
        sent_bytes: To the broker.
        received_bytes: From the broker.
        sent_payload_bytes: Of the former, payloads of messages that were written (QoS 0) or acknowledged (QoS 1).
        received_payload_bytes: Of the latter, payloads of messages.
    """

    sent_bytes: Bytes = 0
    received_bytes: Bytes = 0
    sent_payload_bytes: Bytes = 0
    received_payload_bytes: Bytes = 0

    def plus(self, other: "Traffic") -> "Traffic":
        """The sum of two spans."""
        return Traffic(
            sent_bytes=self.sent_bytes + other.sent_bytes,
            received_bytes=self.received_bytes + other.received_bytes,
            sent_payload_bytes=self.sent_payload_bytes + other.sent_payload_bytes,
            received_payload_bytes=self.received_payload_bytes + other.received_payload_bytes,
        )

    def since(self, earlier: "Traffic") -> "Traffic":
        """What was moved between two readings of the same counters."""
        return Traffic(
            sent_bytes=self.sent_bytes - earlier.sent_bytes,
            received_bytes=self.received_bytes - earlier.received_bytes,
            sent_payload_bytes=self.sent_payload_bytes - earlier.sent_payload_bytes,
            received_payload_bytes=self.received_payload_bytes - earlier.received_payload_bytes,
        )


class RoundTraffic(Wire, frozen=True):
    """What a device has moved for one round: from the plan to the receipt, or to the end of its part otherwise.

    Attributes:
        run: As in the plan.
        round: As in the plan.
        moved: By the process that ended the device's part in the round.
    """

    run: RunId
    round: RoundNumber
    moved: Traffic


class Telemetry(Wire, frozen=True):
    """How a device is (JSON, not retained, rate-limited by the agent).

    Attributes:
        session: Of the agent's process.
        phase: ``idle``, ``fetching``, ``training`` or ``delivering``.
        uptime_s: Of the agent's process.
        cpu_percent: Of the whole device since the last report, 0-100.
        process_mb: Resident memory of the agent, MiB.
        available_mb: Memory that the device has left, MiB.
        disk_free_mb: On the disk that holds the agent's state, MiB.
        temperature_c: Hottest sensor; None where the device has none.
        progress: Share of a transfer that is done, 0-1, while fetching or delivering; else None.
        total: What its link has moved since the process began, between rounds too.
        traffic: What the last round that it had a part in has moved; repeated in later reports, since one may be lost.
    """

    session: SessionId
    phase: Annotated[str, Meta(max_length=32)]
    uptime_s: NonNegative
    cpu_percent: NonNegative
    process_mb: NonNegative
    available_mb: NonNegative
    disk_free_mb: NonNegative
    temperature_c: Finite | None = None
    progress: Annotated[float, Meta(ge=0, le=1)] | None = None
    total: Traffic | None = None
    traffic: RoundTraffic | None = None


class AgentState(Wire, frozen=True):
    """An agent's birth or death (JSON, retained; the death is its last will).

    Attributes:
        state: ``online`` or ``offline``.
        session: One process life; a death with another session id than the last birth's is ignored.
        capabilities: In a birth only.
    """

    state: Literal["online", "offline"]
    session: SessionId
    capabilities: Capabilities | None = None


class AggregatorState(Wire, frozen=True):
    """The aggregator's birth or death (JSON, retained; the death is its last will).

    Attributes:
        state: ``online`` or ``offline``.
        session: One process life.
        run: The run that it serves; empty in a death.
        time: Unix seconds by its clock at the birth, so that a device can tell that its own clock is wrong.
    """

    state: Literal["online", "offline"]
    session: SessionId
    run: str = ""
    time: NonNegative = 0.0


T = TypeVar("T")


def encode_msgpack(message: Wire) -> bytes:
    """Serialise a control message."""
    return msgspec.msgpack.encode(message)


def encode_json(message: Wire) -> bytes:
    """Serialise a message that people may read."""
    return msgspec.json.encode(message)


def decode_msgpack(data: bytes, kind: type[T]) -> T:
    """Parse foreign msgpack bytes into ``kind`` (a struct or a union of tagged structs).

    Raises:
        PeerError: ``malformed``, whatever is wrong with the bytes.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerError(Rejection.MALFORMED, str(error)[:300]) from error


def decode_json(data: bytes, kind: type[T]) -> T:
    """Parse foreign JSON bytes into ``kind``.

    Raises:
        PeerError: ``malformed``, whatever is wrong with the bytes.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerError(Rejection.MALFORMED, str(error)[:300]) from error
