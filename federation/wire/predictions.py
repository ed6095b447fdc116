"""What a device says about what it sees and which model it runs: small JSON for people and Home Assistant."""

from typing import Annotated

from msgspec import Meta

from federation.wire.fields import Bytes, NonNegative, SessionId, Share, Text, Wire
from federation.wire.release import ReleaseNumber

Label = Annotated[str, Meta(max_length=200)]


class PredictionMessage(Wire, frozen=True):
    """The newest prediction (JSON, QoS 0).

    Attributes:
        label: The most likely class.
        confidence: Its softmax probability; not calibrated.
        top: The most likely classes with their probabilities, falling.
        source: Name of the frame: a path, or the camera and a number.
        latency_ms: Milliseconds from the decoded frame to the label.
        release: Number of the release that said so; None for a model file of the operator's own.
        time: Unix seconds by the device's clock.
        frames: Frames labelled since the process began.
        dropped: Frames that newer ones replaced before they could be labelled.
    """

    label: Label
    confidence: Share
    top: tuple[tuple[Label, Share], ...]
    source: Text
    latency_ms: NonNegative
    time: NonNegative
    release: ReleaseNumber | None = None
    frames: Bytes = 0
    dropped: Bytes = 0


class ModelState(Wire, frozen=True):
    """Which model a device runs (JSON, retained; the death is the last will of its inference process).

    The names of the first four are those that Home Assistant's MQTT ``update`` entity reads.

    Attributes:
        installed_version: Number of the running release as text; empty if there is none.
        latest_version: Number of the release that the device was told to run.
        in_progress: Whether the latest is being fetched or tested.
        title: What is updated.
        online: Whether the inference process lives.
        session: One life of that process.
        state: What happened last, for people: a ``RolloutState`` and its fault.
    """

    installed_version: Annotated[str, Meta(max_length=16)]
    latest_version: Annotated[str, Meta(max_length=16)]
    in_progress: bool
    title: Text
    online: bool
    session: SessionId
    state: Text = ""
