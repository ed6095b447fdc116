"""A cap on a device's bandwidth: how it is written, the token bucket that keeps it, and what has to shrink under it.

No I/O and no clock: every ``now`` is in seconds on a monotonic clock, every rate in bytes a second.
"""

import re
from math import ceil

from federation.errors import ConfigError

_UNITS = {"kbit": 1e3 / 8, "mbit": 1e6 / 8}
"""Bytes a second in each unit: as operators sell links, decimal and in bits."""

_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(kbit|mbit)(?:/s)?", re.IGNORECASE)

LEAST_RATE = 16e3 / 8
"""Bytes a second. Below it a chunk of the usual size takes longer than the longest retry time of a transfer (60 s)."""

BURST_S = 1.0
"""What an idle link may save up, as time at full rate: as much as it takes for a round's small messages to go at once."""

CHUNK_S = 4.0
"""How long one chunk of an upload may take under a cap: pings and control messages wait no longer than that, an eighth
of the usual keepalive."""

USUAL_CHUNK_BYTES = 96 * 1024
"""Of a download under the default settings; the aggregator cuts it alike for all devices."""

KEEPALIVE_S = 30
"""Between pings, without a cap or under a generous one."""


def parse_rate(text: str) -> float:
    """Read a rate such as ``256kbit`` or ``1.5mbit``: bits a second, decimal.

    Returns:
        Bytes a second.

    Raises:
        ConfigError: For anything else, and for less than 16kbit.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"the rate {text!r} is not understood: write a number with kbit or mbit, meaning thousands or millions of "
            "bits a second, such as 256kbit or 1.5mbit (200 kB a second are 1.6mbit)"
        )
    rate = float(found[1]) * _UNITS[found[2].lower()]
    if rate < LEAST_RATE:
        raise ConfigError(
            f"the rate {text!r} is below the least that transfers work with: set it to 16kbit or more"
        )
    return rate


def upload_chunk_bytes(rate: float) -> int:
    """How large the chunks of an upload should be under a cap, bytes: what it lets through in four seconds."""
    return int(rate * CHUNK_S)


def keepalive_s(rate: float | None) -> int:
    """Seconds between pings under a cap.

    The answer to a ping waits behind the chunk that is on its way down, so it must be given the time of two.
    """
    return KEEPALIVE_S if rate is None else max(KEEPALIVE_S, ceil(2 * USUAL_CHUNK_BYTES / rate))


class TokenBucket:
    """Says when the next message may go so that the rate is kept.

    The balance grows by ``rate`` a second up to ``rate * BURST_S`` and falls by every byte. A message may go while it
    is not negative, and goes whole. So in any span of t seconds no more than ::

        rate * t + rate * BURST_S + the largest message

    bytes are let through (the token bucket of RFC 3290, section 5.1.3, in its loose form).

    Args:
        rate: Bytes a second.

    Attributes:
        rate: The same.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._most = rate * BURST_S
        self._balance = self._most
        self._as_of: float | None = None

    def spend(self, size: int, now: float) -> None:
        """Pay for ``size`` bytes, also for such as nobody asked leave for."""
        if self._as_of is not None:
            self._balance = min(self._most, self._balance + self.rate * max(0.0, now - self._as_of))
        self._as_of = now
        self._balance -= size

    def ready_at(self, now: float) -> float:
        """When the next message may go: ``now``, or later while what went before is being paid for."""
        self.spend(0, now)
        return now + max(0.0, -self._balance) / self.rate
