"""What the device can do, and how it is."""

import platform
import shutil
import time
from pathlib import Path

import psutil

from federation import __version__
from federation.wire.encodings import ENCODINGS
from federation.wire.masking import MASKED
from federation.wire.messages import Capabilities, RoundTraffic, Telemetry, Traffic

_MIB = 1 << 20


def capabilities(*, device: str, threads: int, samples: int) -> Capabilities:
    """Describe this device for its birth message.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``.
        threads: CPU threads that training may use.
        samples: Local training samples.
    """
    return Capabilities(
        version=__version__,
        device=device,
        threads=threads,
        memory_mb=psutil.virtual_memory().total // _MIB,
        samples=samples,
        encodings=(*ENCODINGS, MASKED),
        platform=platform.platform(terse=True)[:200],
    )


class Health:
    """Measures the device.

    Args:
        session: Of this process.
        state_dir: Whose disk is watched.
    """

    def __init__(self, session: str, state_dir: Path) -> None:
        self._session, self._state_dir = session, state_dir
        self._process = psutil.Process()
        self._began = time.monotonic()
        psutil.cpu_percent()  # the first call only sets the starting point

    def report(
        self, phase: str, *, progress: float | None, total: Traffic, traffic: RoundTraffic | None
    ) -> Telemetry:
        """Measure now.

        Args:
            phase: What the agent is doing.
            progress: How much of a transfer is done, 0-1.
            total: The counters of its link.
            traffic: Of the last round.
        """
        return Telemetry(
            session=self._session,
            phase=phase,
            uptime_s=round(time.monotonic() - self._began, 1),
            cpu_percent=psutil.cpu_percent(),
            process_mb=round(self._process.memory_info().rss / _MIB, 1),
            available_mb=round(psutil.virtual_memory().available / _MIB, 1),
            disk_free_mb=round(shutil.disk_usage(self._state_dir).free / _MIB, 1),
            temperature_c=hottest_c(),
            progress=None if progress is None else round(progress, 3),
            total=total,
            traffic=traffic,
        )


def hottest_c() -> float | None:
    """The hottest sensor, degrees Celsius; None where the platform has none."""
    sensors = getattr(psutil, "sensors_temperatures", None)  # Linux and FreeBSD only
    if sensors is None:
        return None
    readings = [reading.current for group in sensors().values() for reading in group]
    return max(readings, default=None)
