"""The agent's settings. The docstrings are the documentation of the keys (``federation.config``)."""

from typing import Annotated

from msgspec import Meta

from federation.config import Table
from federation.wire.fields import NonNegative, Probability

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
