"""A bad link between two network namespaces: real IP packets are delayed, dropped and slowed down in user space.

For kernels without netem. Each namespace has one TUN device; what the kernel of one side sends there is read here and
written to the other side's device later, or never. Both ends' TCP is the kernel's own and really retransmits. Needs root
on Linux. ``python -m benchmarks.bad_link RATE RTT LOSS QUEUE`` serves one link until its standard input ends; the class
:class:`BadLink` starts and steers it.
"""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Self

from benchmarks.runner import REPOSITORY

SERVER_ADDRESS, DEVICE_ADDRESS = "10.77.0.1", "10.77.0.2"
"""In namespaces of their own: they reach nothing but each other."""

MTU = 1500

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_DEVICE = "fedge0"
_TUN = Path("/dev/net/tun")


@dataclass(frozen=True, slots=True)
class Quality:
    """What a link is like, the same in both directions.

    Attributes:
        bits_s: Rate.
        round_trip_s: Delay there and back of an idle link.
        loss: Share of the packets that vanish.
        queue_s: How long a packet may stand in line for the link before it is dropped.
    """

    bits_s: float = 1e6
    round_trip_s: float = 0.05
    loss: float = 0.01
    queue_s: float = 1.0


def missing() -> str:
    """Why there can be no such link here; empty when there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux'"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if not _TUN.exists():
        return f"there is no {_TUN}"
    absent = [program for program in ("ip", "nsenter", "unshare") if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} of iproute2 and util-linux not found"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"no network namespace: {tried.stderr.strip()}"


class BadLink:
    """The process that serves a link; a context manager.

    Args:
        quality: What the link is like.

    Attributes:
        server: Put before a command to run it at the server's end.
        device: The same at the device's end.
    """

    def __init__(self, quality: Quality) -> None:
        numbers = (quality.bits_s, quality.round_trip_s, quality.loss, quality.queue_s)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bad_link", *map(str, numbers)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._answer()
        self.server = ("nsenter", f"--net={ready['server']}")
        self.device = ("nsenter", f"--net={ready['device']}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def stall(self, seconds: float) -> None:
        """From now on nothing gets through for so long."""
        self._ask("stall", seconds)

    def counts(self) -> dict[str, int]:
        """Packets and bytes that were let through and dropped so far, in each direction."""
        return self._ask("counts", 0.0)

    def _ask(self, what: str, value: float) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {value}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the link ended with exit code {self._process.wait()}")
        answer: dict[str, int] = json.loads(line)
        return answer


class Pipe:
    """One direction: a queue in front of a slow wire.

    Args:
        quality: Of the wire.
        seed: Of its losses.
    """

    def __init__(self, quality: Quality, seed: int) -> None:
        self._quality, self._dice = quality, random.Random(seed)
        self._free_at = 0.0
        self._flying: list[tuple[float, int, bytes]] = []
        self.passed_packets = self.passed_bytes = self.lost_packets = self.overflowed_packets = 0

    def send(self, packet: bytes, now: float, *, stalled: bool) -> None:
        """Take a packet; it arrives when its bits have passed, or is lost."""
        if max(0.0, self._free_at - now) > self._quality.queue_s:
            self.overflowed_packets += 1
            return
        self._free_at = max(now, self._free_at) + 8 * len(packet) / self._quality.bits_s
        if stalled or self._dice.random() < self._quality.loss:
            self.lost_packets += 1
            return
        self.passed_packets += 1
        self.passed_bytes += len(packet)
        arrival = self._free_at + self._quality.round_trip_s / 2
        heapq.heappush(self._flying, (arrival, self.passed_packets, packet))

    def arrived(self, now: float) -> list[bytes]:
        """What is at the other end by now."""
        packets = []
        while self._flying and self._flying[0][0] <= now:
            packets.append(heapq.heappop(self._flying)[2])
        return packets

    @property
    def next_arrival(self) -> float | None:
        """When there will be something; None while nothing flies."""
        return self._flying[0][0] if self._flying else None


def _new_end(address: str) -> tuple[int, int]:
    """Enter a new network namespace with one TUN device.

    Returns:
        File descriptors of the namespace and of the device.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    tun = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        ["link", "set", "lo", "up"],
        ["addr", "add", f"{address}/24", "dev", _DEVICE],
        ["link", "set", _DEVICE, "mtu", str(MTU), "up"],
    ):
        subprocess.run(["ip", *command], check=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), tun


def serve(quality: Quality) -> None:
    """Carry packets until standard input ends."""
    server, server_tun = _new_end(SERVER_ADDRESS)
    device, device_tun = _new_end(DEVICE_ADDRESS)
    here = os.getpid()
    print(
        json.dumps({"server": f"/proc/{here}/fd/{server}", "device": f"/proc/{here}/fd/{device}"}), flush=True
    )
    down, up = Pipe(quality, 1), Pipe(quality, 2)
    ways = {server_tun: (down, device_tun), device_tun: (up, server_tun)}
    stalled_until = 0.0
    while True:
        now = monotonic()
        soon = min((way.next_arrival or now + 1.0 for way in (down, up)), default=now + 1.0)
        ready, _, _ = select.select([server_tun, device_tun, sys.stdin], [], [], max(0.0, soon - now))
        now = monotonic()
        for tun in (server_tun, device_tun):
            if tun in ready:
                ways[tun][0].send(os.read(tun, 2 * MTU), now, stalled=now < stalled_until)
            for packet in ways[tun][0].arrived(now):
                os.write(ways[tun][1], packet)
        if sys.stdin in ready:
            line = sys.stdin.readline().split()
            if not line:
                return
            if line[0] == "stall":
                stalled_until = now + float(line[1])
            counts = {
                f"{name}_{key}": getattr(way, key)
                for name, way in (("down", down), ("up", up))
                for key in ("passed_packets", "passed_bytes", "lost_packets", "overflowed_packets")
            }
            print(json.dumps(counts), flush=True)


def main(arguments: Sequence[str]) -> None:
    """Serve the link that the command line describes."""
    serve(Quality(*map(float, arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
