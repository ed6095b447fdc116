"""What was asked for and has not come yet: when to ask again, and how much to ask for at once."""

from collections.abc import Iterable, Iterator
from math import ceil, inf

MAX_RETRY_S = 60.0
"""Upper bound of every retry time: a device that waits for a re-seeding asks once a minute, not less often."""

_FLIGHTS_PER_RETRY = 4.0
"""A chunk counts as lost after this many usual flights: early enough to matter, late enough to be true."""

_LEAST_RETRY_S = 0.25
"""Floor of the retry time once flights were measured: above any scheduling hiccup of a busy device."""

_SMOOTHING = 0.25
"""Weight of a new sample in the moving averages: the last dozen chunks decide."""

_RATE_DECAY = 1 / 16
"""How fast a lower rate is believed; a higher one is at once. A sample is too low when the chunk came first of a burst,
never too high (BBR takes the maximum of ten round trips for the same reason)."""

_JITTER_S = 0.25
"""Floor of the path's delay: a busy device, broker or server answers this late at times, and a window that allows for
less makes the rate that it measures fall, and itself with it. It fills a line for half a second at most."""

SLOWEST_BYTES_S = 12 * 1024
"""A link of 100 kbit/s. Until the first chunk has come, its retry time allows for one that is not faster: a repeat
would only double what such a link has to carry."""

LEAST_WINDOW = 2
"""Chunks outstanding on the slowest path: one in flight while the next is being asked for."""

_GAIN = 2.0
"""Window over bandwidth-delay product: room to see a higher rate than the last one (as in BBR's start-up)."""


class Outstanding:
    """Chunks asked for and not arrived, with the flight time and the rate observed on this path.

    Flight is the time from the ask to the arrival. A chunk that was asked for twice tells nothing, since nobody knows
    which ask it answers (Karn and Partridge, SIGCOMM 1987), unless it is the first to come at all; then its flight
    counts from the first ask, so that a repeat that was too early teaches a longer time.

    The retry time runs from the last arrival or the ask, whichever is later (as in RFC 6298, section 5.3): chunks come
    one after the other, so as long as any come, the others stand in line behind them and a repeat would only lengthen
    it. It doubles with every expiry that no arrival interrupted.

    The rate sample is what was delivered while a chunk was in flight, over that time (Cardwell et al., "BBR:
    Congestion-Based Congestion Control", ACM Queue 14(5), 2016).

    Args:
        retry_s: Least time after which a chunk is asked for again while no flight has been measured, seconds.
        chunk_bytes: Of a chunk: that time is at least what one takes on the slowest link.

    Attributes:
        repeated: Asks that were not the first for their chunk.
    """

    def __init__(self, retry_s: float, chunk_bytes: int) -> None:
        self._retry_s = max(retry_s, chunk_bytes / SLOWEST_BYTES_S)
        self._since: dict[int, float] = {}  # latest ask; insertion order is time order
        self._first: dict[int, tuple[float, int]] = {}  # first ask, and the bytes delivered by then
        self._again: set[int] = set()  # asked more than once
        self._delivered = 0
        self._flight_s = 0.0
        self._shortest_s = inf
        self._rate = 0.0
        self._flights = 0
        self._doublings = 0
        self._arrived = False
        self._arrived_at = -inf
        self.repeated = 0

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, index: object) -> bool:
        return index in self._since

    def __iter__(self) -> Iterator[int]:
        return iter(self._since)

    def ask(self, indices: Iterable[int], now: float) -> None:
        """Note that ``indices`` were asked for now, for the first time or again."""
        for index in indices:
            self._since.pop(index, None)
            self._since[index] = now
            if index in self._first:
                self._again.add(index)
                self.repeated += 1
            else:
                self._first[index] = now, self._delivered

    def arrive(self, index: int, size: int, now: float) -> None:
        """Note that a chunk of ``size`` bytes has come, also one that was already given up."""
        self._since.pop(index, None)
        self._delivered += size
        self._doublings = 0
        self._arrived = True
        self._arrived_at = now
        asked, again = self._first.pop(index, None), index in self._again
        self._again.discard(index)
        if asked is None or now <= asked[0] or (again and self._flight_s):
            return
        flight = now - asked[0]
        rate = (self._delivered - asked[1]) / flight
        self._shortest_s = min(self._shortest_s, flight)
        self._flight_s += (flight - self._flight_s) * (_SMOOTHING if self._flight_s else 1.0)
        self._rate = max(rate, self._rate + (rate - self._rate) * _RATE_DECAY)
        self._flights += 1

    def postpone(self, index: int, now: float) -> None:
        """Restart the retry time of a chunk that came but was unusable."""
        if self._since.pop(index, None) is not None:
            self._since[index] = now

    def expire(self, now: float) -> list[int]:
        """Remove and return the chunks whose retry time is over, oldest ask first."""
        limit = self.retry_after
        # Added up as next_expiry() does, so that rounding cannot make a caller wake up too early for ever.
        if now < self._arrived_at + limit:
            return []
        late = [index for index, since in self._since.items() if now >= since + limit]
        for index in late:
            del self._since[index]
        if late:
            self._doublings = 0 if self._arrived else self._doublings + 1
            self._arrived = False
        return late

    def release(self) -> list[int]:
        """Remove and return all chunks; what still arrives of them counts with its whole flight."""
        released = list(self._since)
        self._since.clear()
        return released

    def interrupt(self) -> list[int]:
        """Remove and return all chunks, because the link broke: their flights say nothing about the path."""
        self._first.clear()
        self._again.clear()
        return self.release()

    def window(self, first: int, most: int, chunk_bytes: int) -> int:
        """How many chunks should be outstanding.

        Args:
            first: While little is known of the path.
            most: At most.
            chunk_bytes: Of a chunk.
        """
        # What comes first of a burst looks slow: only a whole window tells that less would do.
        least = first if self._flights < first else min(LEAST_WINDOW, first)
        return min(most, max(least, ceil(self.worthwhile_bytes / chunk_bytes)))

    @property
    def patience(self) -> float:
        """The retry time without its doublings, seconds."""
        if not self._flight_s:
            return self._retry_s
        return min(MAX_RETRY_S, max(_LEAST_RETRY_S, _FLIGHTS_PER_RETRY * self._flight_s))

    @property
    def retry_after(self) -> float:
        """Time after an ask at which it is repeated, seconds."""
        return min(MAX_RETRY_S, self.patience * 2.0 ** min(self._doublings, 16))

    @property
    def worthwhile_bytes(self) -> float:
        """How many bytes in flight keep the path busy: twice the bandwidth-delay product; 0 when unknown."""
        if not self._rate:
            return 0.0
        return _GAIN * self._rate * max(self._shortest_s, _JITTER_S)

    def next_expiry(self) -> float | None:
        """When :meth:`expire` will next return something; None when nothing is outstanding."""
        oldest = next(iter(self._since.values()), None)
        return None if oldest is None else max(oldest, self._arrived_at) + self.retry_after
