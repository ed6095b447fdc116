"""What a link tells its owner, and a bounded queue to hand it from the network thread to the owner's thread."""

import threading
from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from federation.wire.address import LARGEST_PACKET

UNLIMITED_RECEIVE_MAXIMUM = 65_535
"""Un-acknowledged QoS 1 publishes that MQTT 5 allows when the broker names no number; 3.1.1 names none ever."""

DEFAULT_INBOX_BYTES = 64 * 1024 * 1024

EVENT_OVERHEAD_BYTES = 256
"""Counted for every message besides topic and payload, so that a flood of empty ones is bounded too."""


PACKET_OVERHEAD_BYTES = 1024
"""Bounds what a packet holds besides its payload: our topics are shorter than 200 bytes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the broker at the other end accepts.

    Attributes:
        max_packet_bytes: Longest MQTT packet, header included.
        receive_maximum: QoS 1 publishes that may be un-acknowledged at once.
        protocol: 5, or 3 for MQTT 3.1.1.
    """

    max_packet_bytes: int = LARGEST_PACKET
    receive_maximum: int = UNLIMITED_RECEIVE_MAXIMUM
    protocol: Literal[3, 5] = 3

    @property
    def largest_chunk(self) -> int:
        """Longest payload of a chunk: the rest of a packet has room for its topic and headers."""
        return self.max_packet_bytes - PACKET_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Connected:
    """The session is up and empty: subscribe, and publish again all that should be retained."""

    limits: Limits


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection was lost, or attempts now fail for a new cause. The link goes on trying by itself.

    Attributes:
        reason: For people.
        refused: The broker answered and said no: somebody must act.
    """

    reason: str
    refused: bool


@dataclass(frozen=True, slots=True)
class Message:
    """A publish that arrived. Foreign bytes: nothing about them has been checked."""

    topic: str
    payload: bytes = field(repr=False)
    retain: bool


@dataclass(frozen=True, slots=True)
class Overflow:
    """Messages were dropped since the owner did not keep up: ask for what is missing."""

    dropped: int


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """Something went wrong inside the link or was refused by the broker; the link itself goes on."""

    error: str


LinkEvent = Connected | Disconnected | Message | Overflow | LinkFailed


class Inbox:
    """A queue from the network thread, and any other, to one owner.

    Args:
        maxbytes: Bound on the messages held. One that would exceed it is dropped and counted, and a single
            :class:`Overflow` stands in the queue for all that were dropped until the owner reads it. Everything
            else (events, posted objects) always fits: there are few of them.
    """

    def __init__(self, maxbytes: int = DEFAULT_INBOX_BYTES) -> None:
        self._maxbytes = maxbytes
        self._held = 0
        self._dropped = 0
        self._woken = False
        self._items: deque[object] = deque()
        self._ready = threading.Condition()

    def put(self, event: LinkEvent) -> None:
        """Queue an event: pass this method as ``on_event`` of a link. Never blocks."""
        with self._ready:
            if isinstance(event, Message):
                size = _size(event)
                if self._held + size > self._maxbytes:
                    self._dropped += 1
                    if self._dropped > 1:
                        return
                    event = Overflow(0)
                else:
                    self._held += size
            self._items.append(event)
            self._ready.notify()

    def post(self, item: object) -> None:
        """Queue an object of the owner's own making, from any thread. Never blocks."""
        with self._ready:
            self._items.append(item)
            self._ready.notify()

    def wake(self) -> None:
        """Make one :meth:`get` return None now, or the next one if none is waiting."""
        with self._ready:
            self._woken = True
            self._ready.notify()

    def get(self, timeout_s: float | None = None) -> object | None:
        """The next event or posted object, in the order of arrival.

        Args:
            timeout_s: Seconds to wait; None waits for ever, 0 not at all.

        Returns:
            The item, or None at the timeout or after :meth:`wake`.
        """
        deadline = None if timeout_s is None else monotonic() + timeout_s
        with self._ready:
            while not self._items and not self._woken:
                remaining = None if deadline is None else deadline - monotonic()
                if remaining is not None and remaining <= 0:
                    return None
                self._ready.wait(remaining)
            if not self._items:
                self._woken = False
                return None
            item = self._items.popleft()
            if isinstance(item, Message):
                self._held -= _size(item)
            elif isinstance(item, Overflow):
                item, self._dropped = Overflow(self._dropped), 0
            return item


def _size(message: Message) -> int:
    return len(message.payload) + len(message.topic) + EVENT_OVERHEAD_BYTES


__all__ = ["Connected", "Disconnected", "Inbox", "Limits", "LinkEvent", "LinkFailed", "Message", "Overflow"]
