"""What the store gives back: rounds, updates and agents as it knows them."""

from dataclasses import dataclass
from pathlib import Path

from federation.wire.messages import Capabilities, Telemetry, TrainMetrics


@dataclass(frozen=True, slots=True)
class StoredUpdate:
    """An accepted update.

    Attributes:
        agent: Who sent it.
        sha256: Of its bytes.
        bytes: Its length.
        samples: Its weight.
        metrics: Of the local training.
        path: Its file; gone once the round's checkpoint is durable.
    """

    agent: str
    sha256: str
    bytes: int
    samples: int
    metrics: TrainMetrics
    path: Path


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version of the global model.

    Attributes:
        digest: ``federation.wire.versions.model_digest``.
        encoding: Of the delta that leads to it; ``full`` where there is none.
    """

    digest: str
    encoding: str


@dataclass(frozen=True, slots=True)
class StoredRound:
    """A round as the store knows it.

    Attributes:
        round: Number.
        attempt: Last announced.
        phase: ``open``, ``folding`` or ``closed``.
        cohort: Invited agents.
        base: SHA-256 of the model that it started from.
        encoding: Of its updates.
        opened_at: Unix seconds.
        deadline_at: Unix seconds.
        closed_at: Unix seconds; None while it is not closed.
        fold_s: Seconds that averaging took.
        loss: Hold-out loss, nats.
        accuracy: Hold-out top-1, in [0, 1].
        evaluate_s: Seconds that the evaluation took.
    """

    round: int
    attempt: int
    phase: str
    cohort: tuple[str, ...]
    base: str
    encoding: str
    opened_at: float
    deadline_at: float
    closed_at: float | None
    fold_s: float | None
    loss: float | None
    accuracy: float | None
    evaluate_s: float | None


@dataclass(frozen=True, slots=True)
class StoredAgent:
    """An agent as it last announced itself.

    Attributes:
        agent: Name.
        online: Whether its last word was a birth.
        session: Of that birth or death.
        capabilities: From the last birth; None before the first.
        changed_at: Unix seconds of the last change.
        telemetry: Its last health report, if any.
    """

    agent: str
    online: bool
    session: str
    capabilities: Capabilities | None
    changed_at: float
    telemetry: Telemetry | None
