"""Which chunks the aggregator asks of which agent: uploads of a whole fleet within one memory bound. No I/O."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from federation.wire.messages import MAX_CREDIT, ObjectRef
from federation.wire.pacing import Outstanding

CREDIT_BYTES = 32 * 1024 * 1024
"""Default bound on what is asked for and not stored: half of what an inbox holds, so that none is dropped there."""

FIRST_WINDOW = 4
"""Chunks of a first credit, and what must fit into the bound before a transfer begins."""

_PATIENCE = 5.0
"""A transfer without progress for this many retry times gives its place to a waiting one."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Send a :class:`~federation.wire.messages.Credit` for these chunks to the agent."""

    agent: str
    sha256: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Complete:
    """All chunks of the agent's object are stored. Comes once per transfer, which is then forgotten."""

    agent: str
    sha256: str


CreditCommand = Grant | Complete


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an upload is: ``stored`` of ``total`` chunks."""

    agent: str
    stored: int
    total: int


@dataclass(slots=True)
class _Transfer:
    """One agent's upload: its chunks are ``missing`` (not asked for), ``asked`` (outstanding) or stored.

    ``late`` are chunks that were given up after they had been asked for: still taken when they come, else a device
    slower than everybody's patience would never finish.
    """

    agent: str
    ref: ObjectRef
    missing: dict[int, None]
    asked: Outstanding
    late: set[int] = field(default_factory=set)
    progressed_at: float = 0.0

    @property
    def complete(self) -> bool:
        return not self.missing and not self.asked

    @property
    def asked_bytes(self) -> int:
        return len(self.asked) * self.ref.chunk_bytes

    def give_up(self, lost: list[int]) -> None:
        # Behind the others: what is only slow comes before its turn, and need not be sent twice.
        self.late.update(lost)
        self.missing.update(dict.fromkeys(lost))


class CreditScheduler:
    """Grants credits to many agents, first come first served, within one bound for all of them.

    The window of each follows the bandwidth-delay product of its own path, as that of a
    :class:`~federation.wire.transfer.Download` does: a slow device is asked for little at a time, and many of them are
    served at once; a fast one is asked for much. Whatever the fleet does, never more than ``credit_bytes`` are
    outstanding. A window is refilled when half of it has come; what does not come within the retry time is granted
    again, after the others. A transfer without progress for several retry times goes behind those that wait, if any,
    and keeps what it has.

    Args:
        max_transfers: Agents that hold credits at the same time.
        window: Chunks outstanding per agent at most, and at most ``MAX_CREDIT``.
        credit_bytes: Bytes outstanding over all agents; a single chunk is asked for even if it is larger.
        retry_s: Least time before a chunk is granted again, seconds.

    Raises:
        ValueError: If ``max_transfers`` or ``window`` is out of range.
    """

    def __init__(
        self,
        *,
        max_transfers: int = 64,
        window: int = MAX_CREDIT,
        credit_bytes: int = CREDIT_BYTES,
        retry_s: float = 2.0,
    ) -> None:
        if max_transfers < 1 or not 1 <= window <= MAX_CREDIT:
            raise ValueError(
                f"max_transfers={max_transfers}, window={window}: at least 1, and at most {MAX_CREDIT} a window"
            )
        self._max_transfers = max_transfers
        self._window = window
        self._credit_bytes = credit_bytes
        self._retry_s = retry_s
        self._active: dict[str, _Transfer] = {}
        self._queue: dict[str, _Transfer] = {}  # in order of arrival
        self._now = 0.0  # the latest time seen
        self._wakeup: float | None = None  # not later than when tick() has something to do

    @property
    def outstanding(self) -> int:
        """Chunks asked for and not stored, over all agents that hold credits."""
        return sum(len(transfer.asked) for transfer in self._active.values())

    @property
    def outstanding_bytes(self) -> int:
        """The same in bytes, each chunk counted as a whole one."""
        return sum(transfer.asked_bytes for transfer in self._active.values())

    @property
    def active(self) -> int:
        """Agents that hold credits."""
        return len(self._active)

    @property
    def queued(self) -> int:
        """Agents that wait for credits."""
        return len(self._queue)

    def progress(self) -> list[Progress]:
        """All transfers, those that hold credits first."""
        return [
            Progress(
                transfer.agent,
                transfer.ref.chunks - len(transfer.missing) - len(transfer.asked),
                transfer.ref.chunks,
            )
            for transfer in (*self._active.values(), *self._queue.values())
        ]

    def wanted(self, agent: str, sha256: str, index: int) -> bool:
        """Whether this chunk was asked for and is not stored; drop anything else unread."""
        transfer = self._find(agent, sha256)
        return transfer is not None and (index in transfer.asked or index in transfer.late)

    def offer(self, agent: str, ref: ObjectRef, have: AbstractSet[int], now: float) -> list[CreditCommand]:
        """Take an offer that was admitted.

        A repeat grants what is outstanding once more if nothing has come for a retry time, and nothing if the agent
        is only slower than its own patience. Another object of the same agent replaces the former one, at the end of
        the queue.

        Args:
            agent: Who offers.
            ref: What; its length is already bounded by the caller.
            have: Indices that are stored.
            now: Monotonic seconds.
        """
        self._now = now
        known = self._find(agent, ref.sha256)
        if known is not None and known.ref == ref:
            return self._offered_again(known, now)
        self._drop(agent)
        missing = dict.fromkeys(index for index in range(ref.chunks) if index not in have)
        transfer = _Transfer(agent, ref, missing, Outstanding(self._retry_s, ref.chunk_bytes))
        if transfer.complete:
            return [Complete(agent, ref.sha256), *self._admit(now)]
        self._queue[agent] = transfer
        return self._admit(now)

    def _offered_again(self, transfer: _Transfer, now: float) -> list[CreditCommand]:
        if transfer.agent in self._queue:
            return self._admit(now)
        if now - transfer.progressed_at < transfer.asked.patience:
            return []
        again = tuple(transfer.asked)
        transfer.asked.ask(again, now)
        return [Grant(transfer.agent, transfer.ref.sha256, again)]

    def reconnected(self, agent: str) -> None:
        """Note that an agent's link was lost, and with it what was on its way: it is granted anew, before others."""
        transfer = self._active.pop(agent, None)
        if transfer is not None:
            lost = transfer.asked.interrupt()
            transfer.missing = dict.fromkeys([*lost, *transfer.missing])
            self._queue = {agent: transfer, **self._queue}
            self._wakeup = self._now

    def chunk(self, agent: str, sha256: str, index: int, now: float) -> list[CreditCommand]:
        """Note that a wanted chunk was verified and stored; anything else is ignored."""
        if not self.wanted(agent, sha256, index):
            return []
        self._now = now
        transfer = self._active.get(agent) or self._queue[agent]
        transfer.late.discard(index)
        transfer.missing.pop(index, None)
        transfer.asked.arrive(index, transfer.ref.chunk_bytes, now)
        transfer.progressed_at = now
        if transfer.complete:
            self._drop(agent)
            return [Complete(agent, sha256), *self._admit(now)]
        commands: list[CreditCommand] = []
        if agent in self._active and len(transfer.asked) <= self._window_of(transfer) // 2:
            commands = self._refill(transfer, now)
        return commands + self._admit(now)

    def bad_chunk(self, agent: str, sha256: str, index: int, now: float) -> list[CreditCommand]:
        """Note that a wanted chunk was unusable: it is granted again after the retry time, not at once.

        A peer that only ever sends garbage so costs a chunk per retry time, and its place when others wait.
        """
        transfer = self._find(agent, sha256)
        if transfer is not None:
            transfer.asked.postpone(index, now)
        return []

    def gone(self, agent: str) -> list[CreditCommand]:
        """Forget a vanished agent's transfer; what is stored stays with the owner, for the offer on its return."""
        return self.cancel(agent)

    def cancel(self, agent: str) -> list[CreditCommand]:
        """Forget an agent's transfer, because its update was refused or the round closed.

        Its place is given to the next in the queue by :meth:`tick`, which :meth:`next_wakeup` then asks for.
        """
        self._drop(agent)
        if self._queue:
            self._wakeup = self._now
        return []

    def tick(self, now: float) -> list[CreditCommand]:
        """Grant again what is overdue, and move stalled transfers; call at :meth:`next_wakeup` or more often."""
        self._now = now
        if self._wakeup is not None and now < self._wakeup:
            return []
        stalled = [transfer for transfer in self._active.values() if now >= self._loses_place_at(transfer)]
        for transfer in stalled[: len(self._queue)]:
            self._drop(transfer.agent)
            transfer.give_up(transfer.asked.release())
            self._queue[transfer.agent] = transfer
        commands: list[CreditCommand] = []
        for transfer in self._active.values():
            late = transfer.asked.expire(now)
            transfer.give_up(late)
            if late:
                commands += self._refill(transfer, now)
        commands += self._admit(now)
        self._wakeup = self._earliest()
        return commands

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` may have something to do (perhaps in the past); None when nothing is outstanding.

        It may be too early, never too late: it is worked out when it is over, not with every chunk.
        """
        if not self._active and not self._queue:
            return None
        return self._wakeup

    def _earliest(self) -> float | None:
        times = [transfer.asked.next_expiry() for transfer in self._active.values()]
        if self._queue:
            times += [self._loses_place_at(transfer) for transfer in self._active.values()]
        return min((time for time in times if time is not None), default=None)

    def _wake_by(self, time: float | None) -> None:
        if time is not None and (self._wakeup is None or time < self._wakeup):
            self._wakeup = time

    def _find(self, agent: str, sha256: str) -> _Transfer | None:
        transfer = self._active.get(agent) or self._queue.get(agent)
        return transfer if transfer is not None and transfer.ref.sha256 == sha256 else None

    def _drop(self, agent: str) -> None:
        self._active.pop(agent, None)
        self._queue.pop(agent, None)

    def _loses_place_at(self, transfer: _Transfer) -> float:
        return transfer.progressed_at + _PATIENCE * transfer.asked.patience

    def _window_of(self, transfer: _Transfer) -> int:
        return transfer.asked.window(min(FIRST_WINDOW, self._window), self._window, transfer.ref.chunk_bytes)

    def _admit(self, now: float) -> list[CreditCommand]:
        commands: list[CreditCommand] = []
        while self._queue and len(self._active) < self._max_transfers:
            agent = next(iter(self._queue))
            needed = FIRST_WINDOW * self._queue[agent].ref.chunk_bytes
            if self._active and self.outstanding_bytes + needed > self._credit_bytes:
                break
            transfer = self._active[agent] = self._queue.pop(agent)
            transfer.progressed_at = now
            commands += self._refill(transfer, now)
        if self._queue:
            self._wake_by(min(self._loses_place_at(transfer) for transfer in self._active.values()))
        return commands

    def _refill(self, transfer: _Transfer, now: float) -> list[CreditCommand]:
        outstanding = self.outstanding_bytes
        room = (self._credit_bytes - outstanding) // transfer.ref.chunk_bytes
        if not outstanding:
            room = max(1, room)
        count = min(self._window_of(transfer) - len(transfer.asked), room)
        indices = tuple(transfer.missing)[: max(0, count)]
        for index in indices:
            del transfer.missing[index]
            transfer.late.discard(index)
        transfer.asked.ask(indices, now)
        self._wake_by(transfer.asked.next_expiry())
        return [Grant(transfer.agent, transfer.ref.sha256, indices)] if indices else []
