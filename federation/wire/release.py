"""What the aggregator says about releases, and what devices answer.

A *release* is one exported model with its number, signed once and for all. A *manifest* is what a channel says now: which
release, for which share of the devices, until when. Manifests have versions that only rise, so an old one cannot be played
again, while an operator can go back to an earlier release with a new manifest (The Update Framework, section 5: version
and expiry of the timestamp role).
"""

from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta

from federation.errors import ReleaseFault
from federation.wire.fields import (
    Bytes,
    Count,
    Finite,
    NonNegative,
    Probability,
    SessionId,
    Sha256,
    Share,
    Text,
    Wire,
)
from federation.wire.messages import ObjectRef

MAX_GOLDEN_BYTES = 16 * 2**20

ReleaseNumber = Annotated[int, Meta(ge=1, le=1_000_000)]
ManifestVersion = Annotated[int, Meta(ge=1, le=2**40)]
Version = Annotated[str, Meta(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}(\.[0-9]{1,4})?\Z")]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Channel(StrEnum):
    """Where a release is announced. A value is a topic level."""

    STABLE = "stable"
    CANARY = "canary"


class ModelFormat(StrEnum):
    """Number format of a model's weights and arithmetic."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Requirements(Wire, frozen=True):
    """What a device must have to run a release.

    Attributes:
        opset: Operator set of the default ONNX domain.
        ir_version: ONNX intermediate representation.
        min_runtime: Oldest onnxruntime that knows both.
        card_format: Format of the metadata in the model (``federation.task.model_card``).
    """

    opset: Annotated[int, Meta(ge=1, le=1000)]
    ir_version: Annotated[int, Meta(ge=1, le=1000)]
    min_runtime: Version
    card_format: Annotated[str, Meta(min_length=1, max_length=8)]


class ReleaseMetrics(Wire, frozen=True):
    """What was measured before the release was signed.

    Attributes:
        accuracy: Top-1 of the released file itself, in [0, 1].
        samples: Images that it was measured on.
        drop_points: Percentage points that it is below the float32 model of the checkpoint on the same images.
        loss: Of the checkpoint on the aggregator's hold-out set, nats; None where there is none.
    """

    accuracy: Share
    samples: Annotated[int, Meta(ge=1, le=2**40)]
    drop_points: Finite
    loss: Finite | None = None


class ReleasePrivacy(Wire, frozen=True):
    """What training up to the released round has cost, at most, over all devices.

    Attributes:
        epsilon: The largest that any device or the central ledger has spent.
        delta: At which it is stated.
        level: Whose participation the guarantee hides (docs/privacy.md).
    """

    epsilon: NonNegative
    delta: Probability
    level: Literal["sample", "client"]


class ReleaseDelta(Wire, frozen=True):
    """A shorter way to the model for devices that hold the one before.

    Attributes:
        base: SHA-256 of the model file that it is applied to.
        object: The delta (``federation.task.model_delta``).
    """

    base: Sha256
    object: ObjectRef


class Release(Wire, frozen=True):
    """One exported model.

    Attributes:
        number: Counts the releases of a federation.
        run: Whose model, and
        round: after which round.
        created_at: Unix seconds.
        format: Of the weights.
        model: The ONNX file.
        golden: Inputs and what the model must answer (``federation.task.golden``).
        requirements: Checked before anything is fetched.
        delta: The model once more, for devices that hold another one.
        metrics: None if nothing was measured.
        privacy: None if training was not private.
        notes: For people.
    """

    number: ReleaseNumber
    run: Annotated[str, Meta(max_length=16)]
    round: Count
    created_at: NonNegative
    format: ModelFormat
    model: ObjectRef
    golden: ObjectRef
    requirements: Requirements
    delta: ReleaseDelta | None = None
    metrics: ReleaseMetrics | None = None
    privacy: ReleasePrivacy | None = None
    notes: Text = ""

    def __post_init__(self) -> None:
        if self.golden.length > MAX_GOLDEN_BYTES:
            raise ValueError(f"a golden set of {self.golden.length} bytes, at most {MAX_GOLDEN_BYTES}")


class Manifest(Wire, frozen=True):
    """What a channel says now. Signed with a release key, retained.

    Attributes:
        version: Rises with every manifest of the federation, whatever its channel.
        channel: On which it is announced.
        issued_at: Unix seconds.
        expires_at: Unix seconds; a device takes up nothing from an expired manifest, and keeps what it runs.
        release: The release; None on a channel that has none.
        share: Of the devices that take it: those with :func:`draw` below it. 1 on the stable channel.
        next_key: The release key that follows the one that signed this.
    """

    version: ManifestVersion
    channel: Channel
    issued_at: NonNegative
    expires_at: NonNegative
    release: Release | None
    share: Share
    next_key: PublicKey

    def __post_init__(self) -> None:
        if self.channel is Channel.STABLE and self.share != 1:
            raise ValueError("a stable release is for all devices")


class RolloutState(StrEnum):
    """How far a device is with a release."""

    FETCHING = "fetching"
    TESTING = "testing"
    PROBATION = "probation"
    CONFIRMED = "confirmed"
    REFUSED = "refused"
    ROLLED_BACK = "rolled_back"


class ReleaseReport(Wire, frozen=True):
    """What a device says about a release (signed, retained: the aggregator may be away).

    Attributes:
        session: Of the process that says it.
        number: Of the release.
        sha256: Of its model.
        manifest: Version of the manifest that brought it.
        state: How far it is.
        fault: Why it was refused or rolled back.
        detail: For people.
        running: Number of the release that the device runs now; None if it runs none.
        frames: Frames that the release has seen since it was activated.
        p50_ms: Median milliseconds from frame to label.
        p99_ms: 99th percentile.
        time: Unix seconds by the device's clock.
    """

    session: SessionId
    number: ReleaseNumber
    sha256: Sha256
    manifest: ManifestVersion
    state: RolloutState
    time: NonNegative
    fault: ReleaseFault | None = None
    detail: Text = ""
    running: ReleaseNumber | None = None
    frames: Bytes = 0
    p50_ms: NonNegative | None = None
    p99_ms: NonNegative | None = None


def draw(federation: str, agent: str, number: int) -> float:
    """Where a device stands in the order in which a release is rolled out.

    Uniform in [0, 1), and different for each release, so that not always the same devices go first:
    the first 8 bytes of SHA-256("fedge/1 canary" | federation | agent | number), big-endian, over 2^64.
    """
    import hashlib  # and with it OpenSSL: 3 MB that a device which runs a model file of its own does without

    text = f"fedge/1 canary\0{federation}\0{agent}\0{number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
