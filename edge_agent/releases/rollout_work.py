"""What the state table of releases keeps of the one that it works on, and how it judges the one on probation."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from edge_agent.inference.health import Health
from edge_agent.releases.rollout_events import Fetch, Offer
from federation.errors import ReleaseFault
from federation.wire.release import Channel

RETRY_S: Final = 30.0
"""First wait after a failure of this device's own (no space, no process); it doubles."""

RETRY_MAX_S: Final = 3600.0

_DOUBLINGS: Final = 16
"""Beyond which the longest wait is reached whatever the first one was."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator of the device set.

    Attributes:
        channel: ``canary`` to be among the first.
        max_latency_ms: 99th percentile from frame to label above which probation is failed.
        probation_s: Least seconds of probation.
        probation_frames: Least frames of probation.
        retry_s: First wait after a failure of this device's own, seconds.
    """

    channel: Channel
    max_latency_ms: float
    probation_s: float
    probation_frames: int
    retry_s: float = RETRY_S


class Stage(StrEnum):
    """How far the work on another release is."""

    FETCHING = "fetching"
    TESTING = "testing"
    WAITING = "waiting"
    READY = "ready"
    ACTIVATING = "activating"


@dataclass(slots=True)
class Work:
    """The way of one release into operation.

    Attributes:
        offer: Which.
        delta: Whether its model is made from another one.
        stage: How far it is.
        failures: Of this device's own so far.
        wrong_hashes: Downloads that were not what was signed.
        slow_tests: Self-tests that it failed for slowness alone.
        retry_at: When to go on, monotonic seconds, while waiting.
    """

    offer: Offer
    delta: bool
    stage: Stage = Stage.FETCHING
    failures: int = 0
    wrong_hashes: int = 0
    slow_tests: int = 0
    retry_at: float = 0.0

    def fetch(self) -> Fetch:
        """Fetch it, for the first time or again."""
        self.stage = Stage.FETCHING
        return Fetch(self.offer, self.offer.release.delta if self.delta else None)

    def wait(self, retry_s: float, now: float) -> float:
        """Wait before it is tried again; returns how long, seconds."""
        wait_s = min(RETRY_MAX_S, retry_s * 2.0 ** min(self.failures, _DOUBLINGS))
        self.failures += 1
        self.stage, self.retry_at = Stage.WAITING, now + wait_s
        return wait_s


@dataclass(slots=True)
class Trial:
    """The probation of the current release.

    Attributes:
        since: Monotonic seconds.
        health: As it was seen last.
    """

    since: float
    health: Health | None = None

    def over(self, settings: Settings, now: float) -> bool:
        """Whether it has lasted long enough, in seconds and in frames."""
        frames = 0 if self.health is None else self.health.frames
        return frames >= settings.probation_frames and now >= self.since + settings.probation_s

    def fault(self, settings: Settings, now: float) -> tuple[ReleaseFault, str] | None:
        """What is wrong with the release, and for people; None if nothing is as yet."""
        health = self.health
        if health is None:
            return None
        if health.non_finite:
            what = f"{health.non_finite} answers with NaN or infinity beside {health.frames} good ones"
            return ReleaseFault.NON_FINITE, what
        if health.errors:
            return ReleaseFault.ERRORS, f"{health.errors} errors beside {health.frames} good frames"
        # Half of all frames too late is plain as soon as there are some; the 99th percentile wants the whole of probation.
        enough = health.frames >= settings.probation_frames
        figures = (
            ("median", health.p50_ms, enough),
            ("99th percentile", health.p99_ms, self.over(settings, now)),
        )
        for name, value, due in figures:
            if due and value is not None and value > settings.max_latency_ms:
                limit = f"at most {settings.max_latency_ms:g} ms are allowed"
                return ReleaseFault.TOO_SLOW, f"{name} {value:.1f} ms from frame to label, {limit}"
        return None
