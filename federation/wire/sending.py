"""What waits to be sent, between any thread that publishes and the one that talks to the broker.

Nothing survives a disconnect: a new session starts empty and the owner publishes again what still matters, so an
old plan or state can never overtake a newer one.
"""

import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from federation.errors import TransportError
from federation.wire.address import LARGEST_PACKET
from federation.wire.inbox import Limits

WAITING_BYTES = 64 * 1024 * 1024
"""What may wait while the broker does not read; the keepalive ends such a connection anyway."""

JOB_OVERHEAD_BYTES = 256

LARGEST_TOPIC = 65_535


@dataclass(frozen=True, slots=True)
class Publish:
    """One message to send."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int
    retain: bool
    bulk: bool = False


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Filters with the highest QoS wanted, few enough for one packet."""

    filters: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Filters, few enough for one packet."""

    filters: tuple[str, ...]


Job = Publish | Subscribe | Unsubscribe


class Wake:
    """Interrupts the loop's wait from another thread."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def __call__(self) -> None:
        """Interrupt. A full or closed pipe is fine: the loop is awake already, or gone."""
        try:
            self._writer.send(b"\0")
        except OSError:
            return

    def drain(self) -> None:
        """Forget the interrupts so far."""
        try:
            while self.reader.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Free both ends."""
        self.reader.close()
        self._writer.close()


class SendQueue:
    """Control messages, which never wait for room, and bulk messages, which do. Safe from any thread.

    Args:
        max_bulk: Bulk messages that may be waiting, un-sent or un-acknowledged.
        wake: Called after something was queued.
    """

    def __init__(self, max_bulk: int, wake: Callable[[], None]) -> None:
        self._max_bulk = max_bulk
        self._wake = wake
        self._changed = threading.Condition()
        self._control: deque[Job] = deque()
        self._bulk: deque[Publish] = deque()
        self._waiting_bytes = (
            0  # of what did not wait for room: all control, and of bulk what is in _waiting_topics
        )
        self._waiting_topics: set[str] = set()
        self._pending = 0
        self._lost = 0
        self._session = 0
        self._open = False
        self._ending = False
        self._unsaid = False
        self._limits = Limits()

    @property
    def is_open(self) -> bool:
        """Whether there is a broker to send to."""
        return self._open

    @property
    def limits(self) -> Limits:
        """Of the present connection, or of the last one; those of the protocol before the first."""
        return self._limits

    @property
    def waiting(self) -> int:
        """Bulk messages that were put without waiting for room and have not been handed on."""
        return len(self._waiting_topics)

    @property
    def control_waits(self) -> bool:
        """Whether there is control that has not been handed on."""
        return bool(self._control)

    @property
    def unsaid(self) -> bool:
        """Whether there were last words, and no broker to say them to."""
        return self._unsaid

    def open(self, limits: Limits) -> None:
        """A session began."""
        with self._changed:
            self._limits = limits
            self._session += 1
            self._open = True

    def close(self) -> None:
        """The session ended: forget everything and release whoever waits."""
        with self._changed:
            self._open = False
            self._control.clear()
            self._bulk.clear()
            self._waiting_bytes = 0
            self._waiting_topics.clear()
            self._lost += self._pending
            self._pending = 0
            self._changed.notify_all()

    def end(self, last: Sequence[Publish] = ()) -> None:
        """The owner is about to stop: drop the bulk that waits and take no more, so that last words get through.

        Args:
            last: They are queued if there is a broker to say them to.

        Raises:
            TransportError: If a payload is over what the broker takes.
        """
        with self._changed:
            self._ending = True
            self._pending -= len(self._bulk)
            self._lost += len(self._bulk)
            self._bulk.clear()
            self._waiting_topics.clear()
            if self._open:
                for job in last:
                    self._check_size(job)
                self._control.extend(last)
            else:
                self._unsaid = bool(last)
            self._waiting_bytes = sum(map(_size, self._control))
            self._changed.notify_all()

    def drop_waiting(self) -> None:
        """Forget the bulk messages that were put without waiting for room and have not been handed on."""
        with self._changed:
            kept = [job for job in self._bulk if job.topic not in self._waiting_topics]
            self._pending -= len(self._bulk) - len(kept)
            self._bulk = deque(kept)
            self._waiting_topics.clear()
            self._waiting_bytes = sum(map(_size, self._control))
            self._changed.notify_all()

    def put(self, job: Job) -> bool:
        """Queue a job without waiting.

        A bulk message lets control pass, and is dropped as a repeat while one to the same topic waits: who asks again
        for a chunk since it is long in coming must not lengthen the queue that delays it.

        Returns:
            False if not connected, or if 64 MiB already wait.

        Raises:
            TransportError: If a payload is over what the broker takes.
        """
        size = _size(job)
        with self._changed:
            if not self._open:
                return False
            if isinstance(job, Publish):
                self._check_size(job)
            if self._waiting_bytes + size > WAITING_BYTES:
                return False
            first = not self._control and not self._bulk
            if not isinstance(job, Publish) or not job.bulk:
                self._control.append(job)
            elif job.topic in self._waiting_topics or self._ending:
                return True
            else:
                self._waiting_topics.add(job.topic)
                self._append_bulk(job)
            self._waiting_bytes += size
        if first:  # else whoever takes the one before takes this one too
            self._wake()
        return True

    def put_bulk(self, job: Publish, timeout_s: float) -> None:
        """Queue a bulk message as soon as fewer than ``max_bulk`` are on their way.

        Raises:
            TransportError: If not connected, disconnected while waiting, timed out, or over the size limit.
        """
        deadline = monotonic() + timeout_s
        with self._changed:
            if not self._open:
                raise TransportError(
                    f"not connected: {job.topic} was not sent; retry after the link reconnects"
                )
            self._check_size(job)
            self._wait(lambda: self._pending < self._max_bulk, deadline, timeout_s)
            if self._ending:
                raise TransportError(f"the link is stopping: {job.topic} was not sent")
            self._append_bulk(job)
        self._wake()

    def flush(self, timeout_s: float) -> None:
        """Wait until all bulk is sent (QoS 0) or acknowledged (QoS 1).

        Raises:
            TransportError: At the timeout, or if bulk was lost to a disconnect or refused since the last flush.
        """
        deadline = monotonic() + timeout_s
        with self._changed:
            if self._pending:
                self._wait(lambda: self._pending == 0, deadline, timeout_s, lost_is_told_below=True)
            lost, self._lost = self._lost, 0
        if lost:
            raise TransportError(
                f"{lost} bulk messages were lost with the connection or refused: send them again"
            )

    def take(self, *, acks_free: bool, idle: bool) -> Job | None:
        """The next job to hand to the broker, control first; None if nothing may go now.

        Args:
            acks_free: Whether another QoS 1 publish may be un-acknowledged.
            idle: Whether all that was handed over before has been written. Bulk waits for that: here control and
                last words can still overtake it, and pings are written behind one bulk message at most.
        """
        with self._changed:
            if self._control:
                head = self._control[0]
                if isinstance(head, Publish) and head.qos and not acks_free:
                    return None  # a later message must not overtake it
                self._control.popleft()
                self._waiting_bytes -= _size(head)
                return head
            if idle and self._bulk and (acks_free or not self._bulk[0].qos):
                bulk = self._bulk.popleft()
                if bulk.topic in self._waiting_topics:
                    self._waiting_topics.remove(bulk.topic)
                    self._waiting_bytes -= _size(bulk)
                return bulk
            return None

    def settled(self, *, refused: bool) -> None:
        """A bulk message is through, or was refused."""
        with self._changed:
            self._pending -= 1
            self._lost += refused
            self._changed.notify_all()

    def _append_bulk(self, job: Publish) -> None:
        self._pending += 1
        self._bulk.append(job)

    def _wait(
        self,
        ready: Callable[[], bool],
        deadline: float,
        timeout_s: float,
        *,
        lost_is_told_below: bool = False,
    ) -> None:
        session = self._session
        while not ready():
            remaining = deadline - monotonic()
            if remaining <= 0:
                raise TransportError(
                    f"the broker took no bulk message within {timeout_s:g} s ({self._pending} are on their way): "
                    "retry, or lengthen the timeout on a slow network"
                )
            self._changed.wait(remaining)
            if (not self._open or self._session != session) and not lost_is_told_below:
                raise TransportError("disconnected while sending: retry after the link reconnects")

    def _check_size(self, job: Publish) -> None:
        size = packet_size(job, protocol=self._limits.protocol)
        if size > self._limits.max_packet_bytes:
            raise TransportError(
                f"a packet of {size} bytes for {job.topic} is over the broker's limit of "
                f"{self._limits.max_packet_bytes}: lower chunk_bytes or raise the broker's maximum packet size"
            )


def publish_job(topic: str, payload: bytes, *, qos: int, retain: bool, bulk: bool = False) -> Publish:
    """Check what the protocol forbids before another thread would stumble over it.

    Raises:
        ValueError: For a topic with a wildcard, or a QoS other than 0 and 1.
    """
    if not topic or len(topic.encode()) > LARGEST_TOPIC or any(sign in topic for sign in "+#\0"):
        raise ValueError(f"{topic[:200]!r} is no topic to publish to")
    if qos not in (0, 1):
        raise ValueError(f"QoS {qos} is not used here: 0 or 1")
    return Publish(topic, bytes(payload), qos, retain, bulk)


def packet_size(job: Publish, *, protocol: int) -> int:
    """Bytes of the PUBLISH packet, header included (MQTT 3.1.1 and 5, section 3.3)."""
    properties = 1 if protocol == 5 else 0  # noqa: PLR2004 -- an empty list of properties is one byte
    body = 2 + len(job.topic.encode()) + (2 if job.qos else 0) + properties + len(job.payload)
    length_bytes = max(1, -(-body.bit_length() // 7))
    return 1 + length_bytes + min(body, LARGEST_PACKET + 1)


def _size(job: Job) -> int:
    return JOB_OVERHEAD_BYTES + (len(job.payload) if isinstance(job, Publish) else 0)
