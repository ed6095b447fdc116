"""The agent's settings. The docstrings are the documentation of the keys (``federation.config``)."""

from typing import Annotated, Literal

from msgspec import Meta

from federation.config import Table
from federation.wire.fields import NonNegative, Positive, Probability
from federation.wire.release import Channel

DEFAULT_MAX_EPSILON = 8.0
DEFAULT_MAX_DELTA = 1e-5


class PrivacyLimits(Table, frozen=True):
    """What this device demands of a plan, and what it never spends.

    Attributes:
        require: Terms that a plan must state, e.g. ["sample-dp eps<=8", "secagg"] (docs/privacy.md); a round with less is declined.
        max_epsilon: Most epsilon that training may spend on this device's images in this federation, over all runs; no plan can exceed it.
        max_delta: Largest delta at which a plan may state epsilon.
        roster: File with the public keys of the federation's devices, from `aggregator roster`; without it secure aggregation trusts the keys that it sees first.
    """

    require: tuple[str, ...] = ()
    max_epsilon: NonNegative = DEFAULT_MAX_EPSILON
    max_delta: Probability = DEFAULT_MAX_DELTA
    roster: str = ""


class InferenceConfig(Table, frozen=True):
    """What this device looks at, and with which model.

    Attributes:
        source: "0" (a camera's number), "picamera", "rtsp://...", a video, a picture, a folder, or "-" for paths on stdin; empty: `run` infers nothing.
        model: "current" for the release that the aggregator rolls out, or an ONNX file of your own.
        channel: "stable" takes releases when their turn comes; "canary" is among the first.
        fps: Frames a second to take from a camera or a stream, at most; 0 is as fast as it and the model allow. Files keep to a pace only if it is given as a flag.
        threads: CPU threads for the model.
        top: Classes in a prediction.
        publish: "mqtt" sends predictions to the broker; empty does not.
        publish_interval_s: Seconds between predictions on MQTT while the label stays the same; a new label is sent at once.
        home_assistant: Announce this device to Home Assistant, if predictions are sent.
        save: File to which predictions are appended as JSON lines; empty: none.
        max_latency_ms: Milliseconds from frame to label (99th percentile) above which a release is refused or given up; 0 is one frame's time at `fps`, or 1000 without.
        max_memory_mb: MiB of the process that tests a release above which it is refused.
        probation_s: Seconds that a new release must run without fault before it is kept.
        probation_frames: Frames that it must have labelled by then.
        keep_releases: Releases kept on disk, at least 2: the current one and the one to go back to.
    """

    source: str = ""
    model: str = "current"
    channel: Channel = Channel.STABLE
    fps: NonNegative = 10.0
    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    top: Annotated[int, Meta(ge=1, le=4096)] = 3
    publish: Literal["", "mqtt"] = ""
    publish_interval_s: NonNegative = 10.0
    home_assistant: bool = True
    save: str = ""
    max_latency_ms: NonNegative = 0.0
    max_memory_mb: Annotated[int, Meta(ge=32)] = 512
    probation_s: Positive = 60.0
    probation_frames: Annotated[int, Meta(ge=1)] = 20
    keep_releases: Annotated[int, Meta(ge=2, le=100)] = 3


class AgentConfig(Table, frozen=True):
    """The agent.

    Attributes:
        data: "imagefolder:PATH", "mnist:PATH", "cifar10:PATH", "digits", or "package.module:factory".
        state_dir: Folder for what must survive; empty: the bundle's name beside it.
        device: "auto", "cpu", "cuda" or "mps".
        threads: CPU threads for training; 0 is all.
        max_memory_mb: MiB that decoded images may take; larger sets stay on disk.
        allow_single_class: Accept data of one class only; it trains a poor model.
        allow_model: Plug-in models, "package.module:factory", that a plan may name.
        telemetry_s: Seconds between health reports; 0 is none.
        max_rate: Most bandwidth to use in each direction, in bits a second: "256kbit", "1.5mbit"; empty is no cap.
        give_up_after_s: Seconds after which a broker that was never reached is an error; 0 is never.
    """

    data: str = ""
    state_dir: str = ""
    device: str = "auto"
    threads: Annotated[int, Meta(ge=0)] = 0
    max_memory_mb: Annotated[int, Meta(ge=16)] = 512
    allow_single_class: bool = False
    allow_model: tuple[str, ...] = ()
    telemetry_s: NonNegative = 60.0
    max_rate: str = ""
    give_up_after_s: NonNegative = 0.0
    privacy: PrivacyLimits = PrivacyLimits()
    inference: InferenceConfig = InferenceConfig()
