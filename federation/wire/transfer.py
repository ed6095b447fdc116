"""Big objects as chunks: the receiving and the sending state machines. No I/O, no threads, no clock.

Down, an agent pulls retained chunks (:class:`Download`). Up, an agent offers and sends what it is asked for
(:class:`Upload`) while the aggregator asks many agents within one memory bound (:class:`CreditScheduler`).
Every ``now`` is in seconds on a monotonic clock.
"""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from hashlib import sha256

from federation.errors import ConfigError, PeerError, Rejection
from federation.wire.credit import Complete, CreditCommand, CreditScheduler, Grant
from federation.wire.messages import (
    CHUNK_DIGEST_BYTES,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    Credit,
    ObjectRef,
)
from federation.wire.pacing import MAX_RETRY_S, Outstanding
from federation.wire.rate import TokenBucket

MAX_WINDOW = 44
"""AWS IoT allows 50 subscriptions in a connection; six are left for those that stand: plan, state, messages down."""

_MIN_CHUNK_BYTES = 64
_FIRST_OFFER_RETRY_S = 2.0

PULL_BYTES = 128
"""What MQTT adds to a chunk that is pulled: its topic, its headers, the acknowledgements of subscribing and leaving."""


def check_cut(length: int, chunk_bytes: int) -> None:
    """Check that an object of ``length`` bytes may be cut into chunks of ``chunk_bytes``.

    Raises:
        ConfigError: If the chunk size is out of range, the object is empty or it makes too many chunks.
    """
    if not _MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise ConfigError(
            f"chunk_bytes is {chunk_bytes}: set it between {_MIN_CHUNK_BYTES} and {MAX_CHUNK_BYTES}"
        )
    if length < 1:
        raise ConfigError("an empty object cannot be sent: check what wrote it")
    if length > MAX_CHUNKS * MAX_CHUNK_BYTES:
        raise ConfigError(
            f"the object has {length} bytes, the limit is {MAX_CHUNKS * MAX_CHUNK_BYTES}: use a smaller model"
        )
    if length > MAX_CHUNKS * chunk_bytes:
        raise ConfigError(
            f"the object has {length} bytes, that is {-(-length // chunk_bytes)} chunks of {chunk_bytes}, the limit"
            f" is {MAX_CHUNKS}: set chunk_bytes to at least {-(-length // MAX_CHUNKS)} and let the broker take"
            " packets of that size"
        )


def cut_size(length: int, largest: int, preferred: int | None = None) -> int:
    """Into chunks of how many bytes to cut an object of ``length`` bytes.

    Args:
        length: Bytes of the object.
        largest: What the way to its receiver takes.
        preferred: A smaller size that would suit the sender; followed unless it makes more than ``MAX_CHUNKS`` chunks.
    """
    return largest if preferred is None else min(largest, max(preferred, -(-length // MAX_CHUNKS)))


def ref_of_chunks(chunks: Iterable[bytes | memoryview], length: int, chunk_bytes: int) -> ObjectRef:
    """Hash an object that comes in chunks, holding one at a time.

    Args:
        chunks: All chunks in order, each of ``chunk_bytes`` but the last.
        length: Bytes of the whole object.
        chunk_bytes: Bytes of a chunk.

    Raises:
        ConfigError: As :func:`check_cut`.
    """
    check_cut(length, chunk_bytes)
    whole, digests = sha256(), bytearray()
    for chunk in chunks:
        whole.update(chunk)
        digests += _digest(chunk)
    return ObjectRef(sha256=whole.hexdigest(), length=length, chunk_bytes=chunk_bytes, digests=bytes(digests))


def make_ref(data: bytes | memoryview, chunk_bytes: int) -> ObjectRef:
    """Describe ``data`` cut into chunks of ``chunk_bytes``.

    Raises:
        ConfigError: If that makes more than ``MAX_CHUNKS`` chunks, or as :func:`check_cut`.
    """
    view = memoryview(data).cast("B")
    pieces = (view[at : at + chunk_bytes] for at in range(0, len(view), max(1, chunk_bytes)))
    return ref_of_chunks(pieces, len(view), chunk_bytes)


def chunk_span(ref: ObjectRef, index: int) -> tuple[int, int]:
    """Offset and length of a chunk, bytes.

    Raises:
        PeerError: ``malformed`` if the object has no such chunk.
    """
    if not 0 <= index < ref.chunks:
        raise PeerError(Rejection.MALFORMED, f"chunk {index} of an object of {ref.chunks} chunks")
    offset = index * ref.chunk_bytes
    return offset, min(ref.chunk_bytes, ref.length - offset)


def check_chunk(ref: ObjectRef, index: int, payload: bytes | memoryview) -> None:
    """Check a chunk against its object's description.

    Raises:
        PeerError: ``malformed`` (no such chunk), ``wrong_length`` or ``wrong_hash``.
    """
    _, length = chunk_span(ref, index)
    if len(payload) != length:
        raise PeerError(Rejection.WRONG_LENGTH, f"chunk {index} has {len(payload)} bytes instead of {length}")
    start = index * CHUNK_DIGEST_BYTES
    if _digest(payload) != ref.digests[start : start + CHUNK_DIGEST_BYTES]:
        raise PeerError(Rejection.WRONG_HASH, f"chunk {index} of {ref.sha256[:12]} is not what was announced")


def _digest(payload: bytes | memoryview) -> bytes:
    return sha256(payload).digest()[:CHUNK_DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Subscribe to these chunks' exact topics at QoS 0, also where already subscribed: it fetches them again."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Unsubscribe from these chunks' topics."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """Write a verified chunk at its place."""

    index: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """All chunks are there. Comes once, after the last :class:`Write`."""


DownloadCommand = Subscribe | Unsubscribe | Write | Finished


class Download:
    """Pulls an object whose chunks are retained messages.

    A window of exact topics is subscribed and refilled when half of it has arrived; it follows the measured
    bandwidth-delay product, up and down. What does not come within its retry time goes to the back of the line, so that chunks
    the broker has lost do not hold up the others; a chunk with a wrong hash is not written and is waited for like
    a missing one. A re-seeding by the aggregator heals both.

    Under a cap, a chunk is only asked for, the first time and again, once those before it are paid for. A chunk that
    nobody has asked for yet is never overdue, so slow pacing is not taken for loss.

    Args:
        ref: The object, from a signed plan.
        have: Indices of the chunks that are already on disk.
        window_min: Topics subscribed at first, and at least on a path that is not slow.
        window_max: Topics subscribed at most, at any moment.
        retry_s: Least time before a chunk is subscribed again, seconds.
        cap: Of this device's bandwidth down, shared by all that it pulls; None for none.

    Attributes:
        total: Chunks of the object.
        corrupt: Chunks that came with a wrong length or hash.
        bytes_received: Verified payload bytes that came through this object (what was on disk is not counted).
        window: Current size of the window, in chunks.
    """

    def __init__(
        self,
        ref: ObjectRef,
        have: AbstractSet[int],
        *,
        window_min: int = 8,
        window_max: int = MAX_WINDOW,
        retry_s: float = 2.0,
        cap: TokenBucket | None = None,
    ) -> None:
        self._ref = ref
        self._cap = cap
        self._paid_at: float | None = (
            None  # when the cap lets the next chunk be asked for; None if it does now
        )
        if cap is not None:
            retry_s = max(retry_s, 2 * ref.chunk_bytes / cap.rate)  # the link may be no faster than its cap
        self._asked = Outstanding(retry_s, ref.chunk_bytes)
        self._waiting = dict.fromkeys(index for index in range(ref.chunks) if index not in have)
        self._missing = set(self._waiting)
        self._arrived: list[int] = []  # still subscribed, to be unsubscribed with the next refill
        self._started = False
        self._window_min = window_min
        self._window_max = window_max
        self.total = ref.chunks
        self.corrupt = 0
        self.bytes_received = 0
        self.window = window_min

    @property
    def received(self) -> int:
        """Chunks that are there, those on disk at the start included."""
        return self.total - len(self._missing)

    @property
    def repeated(self) -> int:
        """Asks that were not the first for their chunk."""
        return self._asked.repeated

    @property
    def finished(self) -> bool:
        """Whether every chunk is there."""
        return not self._missing

    def start(self, now: float) -> list[DownloadCommand]:
        """Begin, on a connected link."""
        self._started = True
        return [Finished()] if self.finished else self._refill(now)

    def chunk(self, index: int, payload: bytes, now: float) -> list[DownloadCommand]:
        """Take what came on a chunk's topic; duplicates and cleared (empty) messages are ignored."""
        if index not in self._missing or not payload:
            return []
        try:
            check_chunk(self._ref, index, payload)
        except PeerError:
            self.corrupt += 1
            self._asked.postpone(index, now)
            return []
        self._missing.remove(index)
        if index in self._asked:
            self._arrived.append(index)
        self._waiting.pop(index, None)
        self._asked.arrive(index, len(payload), now)
        self.bytes_received += len(payload)
        self.window = self._asked.window(self._window_min, self._window_max, self._ref.chunk_bytes)
        commands: list[DownloadCommand] = [Write(index, payload)]
        if self.finished:
            return [*commands, *self._unsubscribe(), Finished()]
        if len(self._asked) <= self.window // 2:
            commands += self._refill(now)
        return commands

    def tick(self, now: float) -> list[DownloadCommand]:
        """Ask again for what is overdue; call at :meth:`next_wakeup` or more often."""
        late = self._asked.expire(now)
        if not late:
            return self._refill(now) if self._paid_at is not None and now >= self._paid_at else []
        self._waiting.update(dict.fromkeys(late))
        commands = self._refill(now)
        # A topic that gave nothing leaves the window only where another takes its place.
        self._arrived += [index for index in late if index not in self._asked]
        return [*self._unsubscribe(), *commands]

    def reconnected(self, now: float) -> list[DownloadCommand]:
        """Subscribe anew after the link was lost: a clean session holds no subscription."""
        if not self._started or self.finished:
            return []
        self._arrived.clear()
        self._waiting = dict.fromkeys([*self._asked.interrupt(), *self._waiting])
        return self._refill(now)

    def stop(self) -> list[DownloadCommand]:
        """End the download early: take back the subscriptions that are out."""
        self._paid_at = None
        indices = (*self._arrived, *self._asked.interrupt())
        self._arrived = []
        return [Unsubscribe(indices)] if indices else []

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` has something to do; None when nothing is outstanding."""
        times = (self._asked.next_expiry(), self._paid_at)
        return min((time for time in times if time is not None), default=None)

    def _refill(self, now: float) -> list[DownloadCommand]:
        room = self.window - len(self._asked)
        indices = self._affordable(tuple(self._waiting)[: max(0, room)], now)
        for index in indices:
            del self._waiting[index]
        self._asked.ask(indices, now)
        subscribe: list[DownloadCommand] = [Subscribe(indices)] if indices else []
        return [*self._unsubscribe(), *subscribe]

    def _affordable(self, indices: tuple[int, ...], now: float) -> tuple[int, ...]:
        """As many of these chunks, from the first, as the cap lets be asked for now; they are paid for."""
        self._paid_at = None
        if self._cap is None:
            return indices
        for taken, index in enumerate(indices):
            ready = self._cap.ready_at(now)
            if ready > now:
                self._paid_at = ready
                return indices[:taken]
            self._cap.spend(chunk_span(self._ref, index)[1] + PULL_BYTES, now)
        return indices

    def _unsubscribe(self) -> list[DownloadCommand]:
        indices, self._arrived = tuple(self._arrived), []
        return [Unsubscribe(indices)] if indices else []


class Upload:
    """Sends an object's chunks as the aggregator asks for them, and repeats the offer until it does.

    It is done when a receipt comes, which is its owner's business.

    Args:
        ref: The object that is offered.
    """

    def __init__(self, ref: ObjectRef) -> None:
        self._ref = ref
        self._interval_s = _FIRST_OFFER_RETRY_S
        self._next = 0.0
        self._offered = False
        self._credited = False

    def credit(self, credit: Credit) -> tuple[int, ...]:
        """Return the indices to send now, each once, in the order asked.

        Raises:
            PeerError: ``malformed`` if the credit is for another object or for a chunk that does not exist.
        """
        if credit.sha256 != self._ref.sha256:
            raise PeerError(
                Rejection.MALFORMED,
                f"credit for object {credit.sha256[:12]}, {self._ref.sha256[:12]} was offered",
            )
        for index in credit.chunks:
            chunk_span(self._ref, index)
        self._credited = True
        return tuple(dict.fromkeys(credit.chunks))

    def due(self, now: float) -> bool:
        """Whether the offer is to be sent now: at first, then after 2 s, doubling to 60 s; a credit starts over."""
        if self._credited:
            self._credited = False
            self._interval_s = _FIRST_OFFER_RETRY_S
            self._next = now + self._interval_s
            return False
        if self._offered and now < self._next:
            return False
        self._offered = True
        self._next = now + self._interval_s
        self._interval_s = min(2 * self._interval_s, MAX_RETRY_S)
        return True

    def next_wakeup(self) -> float:
        """When :meth:`due` may next be true, monotonic seconds."""
        return self._next if self._offered else 0.0

    def reconnected(self) -> None:
        """Make the offer due at once: the last one, or its answer, may be lost with the link."""
        self._interval_s = _FIRST_OFFER_RETRY_S
        self._offered = self._credited = False


__all__ = [
    "Complete",
    "CreditCommand",
    "CreditScheduler",
    "Download",
    "DownloadCommand",
    "Finished",
    "Grant",
    "Subscribe",
    "Unsubscribe",
    "Upload",
    "Write",
    "check_chunk",
    "check_cut",
    "chunk_span",
    "cut_size",
    "make_ref",
    "ref_of_chunks",
]
