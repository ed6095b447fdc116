"""What groups of processes take while they run: resident memory and bytes, as a series that can be cut at any time.

A group is a device or a server: all processes that descend from the one that was started, whoever starts them.
"""

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from benchmarks.proxy import CountingProxy, Traffic
from benchmarks.runner import BenchmarkError

_TICK_S = 0.02
"""Between two readings of the bytes: what a group sends within one is the error at each end of a span."""

_TICKS_PER_MEMORY = 5
_TICKS_PER_PSS = 25
"""Proportional set sizes cost the kernel a walk through all page tables: twice a second, and for one group only."""

_MIB = 1 << 20
_KIB_PER_MIB = 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PARENT_FIELD = 1
"""Of what follows the command's closing bracket in /proc/PID/stat: state, parent."""


@dataclass(slots=True)
class Series:
    """One group's readings; times are Unix seconds.

    Attributes:
        rss: Sum of the resident memory of its processes, MiB; a page that two of them share counts twice.
        pss: Sum of their proportional set sizes, MiB: a page that n processes of this machine share counts 1/n.
        traffic: Bytes so far.
    """

    rss: list[tuple[float, float]] = field(default_factory=list)
    pss: list[tuple[float, float]] = field(default_factory=list)
    traffic: list[tuple[float, Traffic]] = field(default_factory=list)


class Observer:
    """Watches groups in a thread of its own; a context manager that ends what is left of them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._series: dict[str, Series] = defaultdict(Series)
        self._members: dict[str, dict[int, psutil.Process]] = defaultdict(dict)
        self._proxies: dict[str, CountingProxy] = {}
        self._with_pss: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="observer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look(_parents())
        left = [process for members in self._members.values() for process in members.values()]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left)

    def follow(self, group: str, pid: int, *, pss: bool = False) -> None:
        """Add a process and its descendants to a group."""
        with self._guard:
            self._members[group][pid] = psutil.Process(pid)
            if pss:
                self._with_pss.add(group)

    def count(self, group: str, proxy: CountingProxy) -> None:
        """Count what goes through ``proxy`` as this group's."""
        with self._guard:
            self._proxies[group] = proxy

    def peak_mb(self, group: str, since: float = 0.0, until: float = float("inf")) -> float:
        """The highest reading of its resident memory within a span.

        Raises:
            BenchmarkError: If there is none.
        """
        return _peak(self._series[group].rss, since, until, f"memory of {group}")

    def peak_pss_mb(self, group: str, since: float = 0.0, until: float = float("inf")) -> float:
        """The same of its proportional set size.

        Raises:
            BenchmarkError: If there is none.
        """
        return _peak(self._series[group].pss, since, until, f"proportional set size of {group}")

    def bytes_between(self, group: str, since: float, until: float) -> Traffic:
        """What went through its proxy within a span."""
        return self._traffic_at(group, until) - self._traffic_at(group, since)

    def _traffic_at(self, group: str, at: float) -> Traffic:
        last = Traffic()
        for when, traffic in self._series[group].traffic:
            if when > at:
                break
            last = traffic
        return last

    def _watch(self) -> None:
        tick = 0
        while not self._over.wait(_TICK_S):
            with self._guard:
                now = time.time()
                for group, proxy in self._proxies.items():
                    self._series[group].traffic.append((now, proxy.traffic()))
                if tick % _TICKS_PER_MEMORY == 0:
                    self._look(_parents())
                if tick % _TICKS_PER_PSS == 0:
                    for group in self._with_pss:
                        self._series[group].pss.append((now, _sum(self._members[group], _pss_mb)))
            tick += 1

    def _look(self, parents: dict[int, int]) -> None:
        now = time.time()
        for group, members in self._members.items():
            grown = True
            while grown:  # a child of a child is found in the next pass
                new = [pid for pid, parent in parents.items() if parent in members and pid not in members]
                for pid in new:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        members[pid] = psutil.Process(pid)
                grown = any(pid in members for pid in new)
            for pid in [pid for pid in members if pid not in parents]:
                del members[pid]
            self._series[group].rss.append((now, _sum(members, _rss_mb)))


def _peak(series: list[tuple[float, float]], since: float, until: float, what: str) -> float:
    values = [value for at, value in series if since <= at <= until]
    if not values:
        raise BenchmarkError(f"{what} was not read in time: the run was too short")
    return max(values)


def _sum(pids: Iterable[int], read: Callable[[int], float]) -> float:
    return sum(read(pid) for pid in pids)


def _parents() -> dict[int, int]:
    """Every process of this machine that has not ended, and its parent."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[: _PARENT_FIELD + 1]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    return parents


def _rss_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES / _MIB
    except OSError:
        return 0.0


def _pss_mb(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / _KIB_PER_MIB
    except OSError:  # it ended, or belongs to somebody else
        pass
    return 0.0
