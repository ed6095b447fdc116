"""Signs of life: to systemd from this process, and to this process from a child of its own.

The protocol is that of sd_notify(3): a datagram of lines ``NAME=value`` to the socket that ``NOTIFY_SOCKET`` names. Its
manual promises that it stays as it is, and prints a client of this size to be copied. The packages for it either wrap
libsystemd, of which there are no wheels, or are these lines without the repetition of what did not get through.

A sign of life says that a loop has turned, never merely that a thread or a timer exists: what hangs falls silent.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Final, Self

NOTIFY_SOCKET: Final = "NOTIFY_SOCKET"
WATCHDOG_USEC: Final = "WATCHDOG_USEC"
WATCHDOG_PID: Final = "WATCHDOG_PID"

READY: Final = "READY=1"
ALIVE: Final = "WATCHDOG=1"
STOPPING: Final = "STOPPING=1"
STATUS: Final = "STATUS="

SIGNS_PER_LIMIT: Final = 4
"""Twice as many as sd_watchdog_enabled(3) asks for: one may be lost, and a turn may be late."""

STATUS_S: Final = 10.0
"""Between two states told without a watchdog: ``systemctl status`` is read by people."""

_MAX_STATUS: Final = 200
_MAX_DATAGRAM: Final = 4096
_MAX_WAITING: Final = 64
"""Datagrams read at once: whoever floods the socket must not keep its owner."""

_USEC_PER_S: Final = 1e6


class Notifier:
    """Tells the one who started this process that it serves and is alive. Does nothing where nobody asked.

    Nothing here raises or waits: what cannot be sent now is sent with the next sign.

    Args:
        target: Of the datagrams: a path, or ``@`` and a name in the abstract namespace; empty for nobody.
        limit_s: Seconds of silence after which this process is taken for hung; 0 without a watchdog.
        clock: Monotonic seconds.
    """

    def __init__(
        self, target: str = "", limit_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # vsock:CID:PORT, which tells the host of a virtual machine, is the only other form, and none of a service.
        self._target = target if target.startswith(("/", "@")) else ""
        self._period_s = limit_s / SIGNS_PER_LIMIT if limit_s else STATUS_S
        self._clock = clock
        self._due: float | None = None
        self._ready = False
        self._socket: socket.socket | None = None

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Self:
        """For this process. Takes the variables away, so that no child speaks in its name."""
        target, usec, pid = (
            environment.pop(name, "") for name in (NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID)
        )
        # Both are of digits; a watchdog with another process's number is not for this one.
        watched = usec.isdecimal() and pid in ("", str(os.getpid()))
        return cls(target, int(usec) / _USEC_PER_S if watched else 0.0)

    @property
    def period_s(self) -> float | None:
        """Longest time that a turn of the loop may take so that :meth:`alive` is called often enough; None for ever."""
        return self._period_s if self._target else None

    def alive(self, describe: Callable[[], str] = str) -> None:
        """A loop has turned. The first call says that the service is ready; most others send nothing. Cheap.

        Args:
            describe: What this process does, in plain words; asked for only when there is something to send.
        """
        if not self._target:
            return
        now = self._clock()
        if self._due is not None and now < self._due:
            return
        lines = [ALIVE] if self._ready else [READY, ALIVE]
        status = describe()
        if status:
            lines.append(STATUS + " ".join(status.split())[:_MAX_STATUS])
        if self._send(lines):
            self._ready = True
            self._due = now + self._period_s

    def stopping(self) -> None:
        """This process ends on purpose."""
        if self._target:
            self._send([STOPPING, STATUS + "stopping"])

    def close(self) -> None:
        """Free the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, lines: list[str]) -> bool:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        try:
            self._socket.sendto("\n".join(lines).encode(), _address(self._target))
        except OSError:  # a full queue, or a systemd that is being replaced: the next turn tries again
            return False
        return True


class ChildWatch:
    """Hears the signs of life of one child: for it, this process stands where systemd stands for this process.

    So the part that hangs is started again, and not the whole: a camera's driver must not cost a round's training.
    The child gets :meth:`environment` and uses :class:`Notifier`. One thread uses this.

    Args:
        limit_s: Seconds of silence after which a child that was ready is taken for hung.
        start_s: The same until it is ready: it imports, and may read a model from a slow card.
        clock: Monotonic seconds.
    """

    def __init__(self, limit_s: float, start_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._start_s = start_s
        self._clock = clock
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.bind("")  # Linux chooses a free name in the abstract namespace: no file to leave behind
        self._heard_at = clock()
        self.ready = False
        self.status = ""

    def environment(self, ours: Mapping[str, str]) -> dict[str, str]:
        """What the child has for its environment: ours, with this in the place of whoever listens to us."""
        own = {
            NOTIFY_SOCKET: "@" + self._socket.getsockname()[1:].decode(),
            WATCHDOG_USEC: str(round(self._limit_s * _USEC_PER_S)),
        }
        return {name: value for name, value in ours.items() if name != WATCHDOG_PID} | own

    def started(self) -> None:
        """A child was started: what an earlier one has said does not count for it."""
        self._receive()
        self._heard_at, self.ready, self.status = self._clock(), False, ""

    def hung(self) -> bool:
        """Whether the child has been silent for too long. Never waits."""
        self._receive()
        return self._clock() > self._heard_at + (self._limit_s if self.ready else self._start_s)

    def close(self) -> None:
        """Free the socket."""
        self._socket.close()

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MAX_WAITING):
                self._take(self._socket.recv(_MAX_DATAGRAM))

    def _take(self, datagram: bytes) -> None:
        lines = datagram.decode(errors="replace").split("\n")
        self.ready = self.ready or READY in lines
        if ALIVE in lines or READY in lines:
            self._heard_at = self._clock()
        for line in lines:
            if line.startswith(STATUS):
                self.status = line.removeprefix(STATUS)[:_MAX_STATUS]


def _address(target: str) -> str:
    return "\0" + target[1:] if target.startswith("@") else target
