"""How the running model fares: the newest latencies and every failure since it was installed."""

import threading
from array import array

import numpy as np
from msgspec import Struct

WINDOW_FRAMES = 1000
"""Latencies kept, the newest ones: the 99th percentile then rests on ten frames, and a camera may run for years."""


class Health(Struct, frozen=True, kw_only=True):
    """What is known about the running model.

    Attributes:
        frames: Frames that it has labelled since it was installed.
        errors: Frames on which it failed in another way than with NaN or infinity.
        non_finite: Frames on which it answered with NaN or infinity.
        p50_ms: Median milliseconds from decoded frame to label over its newest :data:`WINDOW_FRAMES`; None without one.
        p99_ms: 99th percentile.
        dropped: Frames of the camera that newer ones replaced, since the process began.
    """

    frames: int = 0
    errors: int = 0
    non_finite: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    dropped: int = 0


class Latencies:
    """The newest latencies of one model, in bounded memory. Safe from any thread.

    Args:
        window: How many to keep.
    """

    def __init__(self, window: int = WINDOW_FRAMES) -> None:
        self._window = window
        self._values = array("d")
        self._next = 0
        self._lock = threading.Lock()

    def add(self, latency_ms: float) -> None:
        """Take the newest; the oldest makes room."""
        with self._lock:
            if len(self._values) < self._window:
                self._values.append(latency_ms)
            else:
                self._values[self._next] = latency_ms
                self._next = (self._next + 1) % self._window

    def percentiles(self) -> tuple[float, float] | tuple[None, None]:
        """Median and 99th percentile, interpolated, milliseconds; None twice before the first."""
        with self._lock:
            values = np.array(self._values)
        if not values.size:
            return None, None
        values.sort()
        # Not np.percentile: it imports numpy.ma, 1.2 MB that nothing else here needs.
        places = np.array([0.50, 0.99]) * (values.size - 1)
        p50, p99 = np.interp(places, np.arange(values.size), values)
        return float(p50), float(p99)
