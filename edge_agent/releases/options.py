"""Settings of the thread that follows releases."""

from dataclasses import dataclass
from typing import Final

from edge_agent.config import InferenceConfig
from edge_agent.releases.rollout_work import Settings
from federation.wire.rate import parse_rate

UNPACED_LATENCY_MS: Final = 1000.0
"""Longest time from frame to label without ``fps`` to derive it from: somebody who looks at labels waits no longer."""


@dataclass(frozen=True, slots=True)
class FollowerOptions:
    """What the operator of the device set.

    Attributes:
        settings: Of the state table.
        threads: CPU threads for the model.
        top: Classes of a prediction.
        max_memory_mb: MiB of the process that tests a release above which it is refused.
        keep_releases: Slots kept on disk.
        publish: Whether predictions go to the broker.
        publish_interval_s: Longest time between two of them while frames come, seconds.
        home_assistant: Whether to announce this device to Home Assistant, if predictions are sent.
        max_rate: Cap on the bandwidth of each direction, bytes a second; None for none.
    """

    settings: Settings
    threads: int = 1
    top: int = 3
    max_memory_mb: int = 512
    keep_releases: int = 3
    publish: bool = False
    publish_interval_s: float = 10.0
    home_assistant: bool = True
    max_rate: float | None = None


def follower_options(config: InferenceConfig, max_rate: str = "") -> FollowerOptions:
    """From the device's settings.

    Args:
        config: The table ``[inference]``.
        max_rate: As ``federation.wire.rate.parse_rate`` reads it; empty for no cap.

    Raises:
        ConfigError: If ``max_rate`` is not a rate.
    """
    latency_ms = config.max_latency_ms or (1000 / config.fps if config.fps else UNPACED_LATENCY_MS)
    return FollowerOptions(
        Settings(config.channel, latency_ms, config.probation_s, config.probation_frames),
        threads=config.threads,
        top=config.top,
        max_memory_mb=config.max_memory_mb,
        keep_releases=config.keep_releases,
        publish=config.publish == "mqtt",
        publish_interval_s=config.publish_interval_s,
        home_assistant=config.home_assistant,
        max_rate=parse_rate(max_rate) if max_rate else None,
    )
