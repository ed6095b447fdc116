"""The aggregator's settings. The docstrings are the documentation of the keys (``federation.config``)."""

from typing import Annotated, Literal

from msgspec import Meta

from aggregator.privacy_config import PrivacyConfig
from federation.config import Table
from federation.wire.credit import CREDIT_BYTES
from federation.wire.fields import Count, Name, NonNegative, Positive
from federation.wire.messages import MAX_CHUNK_BYTES, MAX_DELTAS, TrainSpec
from federation.wire.release import ModelFormat

SECRETS = {"FEDGE_BROKER_PASSWORD": "broker.password"}
"""Environment variables that hold secrets, and the keys that they set."""

Share = Annotated[float, Meta(ge=0, le=1)]


class TaskConfig(Table, frozen=True):
    """What is learned.

    Attributes:
        model: "cnn", "scattering" (for privacy.sample), a torchvision classification model such as "mobilenet_v3_small", or "package.module:factory".
        data: What the agents hold, to derive labels and image size from: "mnist", "cifar10", "digits", or a data set at hand such as "imagefolder:PATH". Empty: derived from holdout.
        holdout: Data set on which each round's model is evaluated here, e.g. "mnist:PATH". Empty: no evaluation.
        labels: Class names, when they cannot be derived from data.
        channels: 1 for grey, 3 for colour; 0 derives it from data.
        height: Image height that the model sees, pixels; 0 derives it from data.
        width: Image width that the model sees, pixels; 0 derives it from data.
    """

    model: str = "cnn"
    data: str = ""
    holdout: str = ""
    labels: tuple[str, ...] = ()
    channels: Annotated[int, Meta(ge=0, le=64)] = 0
    height: Annotated[int, Meta(ge=0, le=4096)] = 0
    width: Annotated[int, Meta(ge=0, le=4096)] = 0


class RoundsConfig(Table, frozen=True):
    """When a round opens, who takes part, and when it closes.

    Attributes:
        count: Rounds in this run; it may be raised later and the run goes on.
        min_agents: Agents that must be online before a round opens, and the least that a round is closed with.
        cohort_size: Agents wanted per round; 0 takes all that are online.
        over_selection: Extra agents to invite, as a share of cohort_size: the round closes when cohort_size have delivered.
        quorum: Share of the wanted agents that must have delivered for the round to close at its deadline.
        deadline_s: Seconds after which a round closes with a quorum, or is extended for lack of it.
        gather_s: Seconds to wait for more agents once min_agents are online.
        grace_s: Seconds that an agent may be offline in a round before nobody waits for it.
        max_samples: An update that claims more samples than this is refused: its weight would drown the others.
        max_update_norm: An update whose L2 norm is above this is refused; 0 accepts any below 2^60, beyond which numbers may overflow.
        server_learning_rate: Step along the mean update; 1 is plain FedAvg.
        target_accuracy: Stop when the hold-out accuracy reaches this share; 0 never.
        patience: Stop after this many rounds without a better hold-out accuracy; 0 never.
    """

    count: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    min_agents: Annotated[int, Meta(ge=1, le=4096)] = 2
    cohort_size: Annotated[int, Meta(ge=0, le=4096)] = 0
    over_selection: Annotated[float, Meta(ge=0, le=4)] = 0.0
    quorum: Share = 0.5
    deadline_s: Positive = 600.0
    gather_s: NonNegative = 3.0
    grace_s: NonNegative = 20.0
    max_samples: Annotated[int, Meta(ge=1, le=2**40)] = 10_000_000
    max_update_norm: NonNegative = 0.0
    server_learning_rate: Positive = 1.0
    target_accuracy: Share = 0.0
    patience: Count = 0


class BrokerConfig(Table, frozen=True):
    """The MQTT broker.

    Attributes:
        url: "embedded" runs the bundled nats-server; otherwise "mqtt://HOST:1883" or "mqtts://HOST:8883".
        listen: Address and port on which the embedded broker listens; "0.0.0.0:1883" for a fleet.
        advertise: URL that enrolled devices use to reach the broker, e.g. "mqtt://192.168.1.10:1883". Empty: derived from url or listen.
        tls_cert: PEM certificate chain with which the embedded broker serves TLS.
        tls_key: PEM private key for tls_cert.
        ca_file: PEM certificates to trust; also written into device bundles.
        client_cert: PEM client certificate for an external broker that asks for one.
        client_key: PEM private key for client_cert.
        username: Account of the aggregator on an external broker; empty uses the enrolled account.
        password: Its password; set FEDGE_BROKER_PASSWORD instead of writing it here.
        chunk_bytes: Largest payload of one MQTT message; lowered to what the broker takes.
        credit_bytes: Bytes of updates that the agents together are asked for and that have not arrived. It bounds what the broker and the aggregator hold of them in memory.
        connect_timeout_s: Seconds after which `serve` gives up when the broker cannot be reached at start.
    """

    url: str = "embedded"
    listen: str = "127.0.0.1:1883"
    advertise: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    ca_file: str = ""
    client_cert: str = ""
    client_key: str = ""
    username: str = ""
    password: str = ""
    chunk_bytes: Annotated[int, Meta(ge=1024, le=MAX_CHUNK_BYTES)] = 96 * 1024
    credit_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 30)] = CREDIT_BYTES
    connect_timeout_s: Positive = 30.0


class ReleaseConfig(Table, frozen=True):
    """How models reach devices.

    Attributes:
        auto: Release the model by itself when a run is finished.
        stay: Go on serving releases after the last round, until stopped.
        format: Number format that is tried: "int8", "fp16" or "fp32"; a model that loses too much, or gains no speed, is released as fp32, and why is said.
        preprocess: "fused" puts resizing and normalising into the model, "none" leaves them to the device.
        data: Pictures for calibration and for the accuracy gate, e.g. "imagefolder:PATH"; a dozen of them travel to every device as the golden set. Empty: task.holdout.
        max_drop: Percentage points of accuracy that a format may cost against float32.
        max_regression: Percentage points below the current release at which an automatic release is not made.
        canary: Share of the devices that get a release first; 1 releases to all at once.
        widen: Factor by which the share of a canary grows when a step went well.
        step_s: Seconds that a step of a canary lasts at least.
        min_reports: Devices that must have confirmed a step before the share grows; fewer if fewer are in it.
        max_failures: Share of the devices of a step that may refuse or roll back; above it the canary is halted and reverted.
        give_up_s: Seconds after which devices that never answered are not waited for any more.
        expiry_days: Days after which a manifest is of no use; the server renews it long before.
    """

    auto: bool = False
    stay: bool = False
    format: ModelFormat = ModelFormat.INT8
    preprocess: Literal["fused", "none"] = "fused"
    data: str = ""
    max_drop: NonNegative = 0.5
    max_regression: NonNegative = 1.0
    canary: Annotated[float, Meta(gt=0, le=1)] = 0.1
    widen: Annotated[float, Meta(gt=1, le=100)] = 3.0
    step_s: Positive = 120.0
    min_reports: Annotated[int, Meta(ge=1, le=4096)] = 1
    max_failures: Share = 0.1
    give_up_s: Positive = 3600.0
    expiry_days: Annotated[float, Meta(gt=0, le=3650)] = 90.0


class AggregatorConfig(Table, frozen=True):
    """The aggregator.

    Attributes:
        federation: Name of the federation: a-z, 0-9, _ and -.
        state_dir: Folder of everything that must survive: keys, rounds, checkpoints, the embedded broker's store.
        up_encoding: Of the updates that agents send, e.g. "sq:16" or "float32" (docs/protocol.md, encodings).
        down_encoding: Of the global model's change that agents fetch, e.g. "sq:4"; "full" sends every round's model whole in float32.
        max_noise: Most noise that coarse encodings may add to the average of the updates, and again to the model's change, as a share of the mean square of the weights of each tensor; they are finer where it takes that. 0 sets no bound.
        keep_deltas: Rounds whose deltas can be fetched; an agent that missed fewer fetches deltas only, one that missed as many the whole model.
        keep_checkpoints: Newest checkpoints to keep, at least 2; 0 keeps all.
    """

    federation: Name = "fleet"
    state_dir: str = "fedge-state"
    up_encoding: str = "sq:16"
    down_encoding: str = "sq:4"
    max_noise: Annotated[float, Meta(ge=0, le=1000)] = 0.03
    keep_deltas: Annotated[int, Meta(ge=1, le=MAX_DELTAS)] = 8
    keep_checkpoints: Count = 20
    task: TaskConfig = TaskConfig()
    train: TrainSpec = TrainSpec()
    rounds: RoundsConfig = RoundsConfig()
    broker: BrokerConfig = BrokerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    release: ReleaseConfig = ReleaseConfig()
