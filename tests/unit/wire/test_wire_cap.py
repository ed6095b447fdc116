"""A download under a cap: what it asks for over time, on paths faster and no faster than the cap."""

import heapq
import random

import pytest

from federation.wire.messages import MAX_CHUNKS
from federation.wire.rate import BURST_S, LEAST_RATE, TokenBucket
from federation.wire.transfer import (
    PULL_BYTES,
    Download,
    DownloadCommand,
    Finished,
    Subscribe,
    Unsubscribe,
    Write,
    chunk_span,
    cut_size,
    make_ref,
)


class Path:
    """A broker that holds every chunk, behind a path that delivers them one after the other."""

    def __init__(
        self, length: int, chunk_bytes: int, *, cap: float, speed: float, delay_s: float = 0.05
    ) -> None:
        self.data = random.Random(7).randbytes(length)
        self.ref = make_ref(self.data, chunk_bytes)
        self.cap, self.speed, self.delay_s = cap, speed, delay_s
        self.bucket = TokenBucket(cap)
        self.download = Download(self.ref, set(), cap=self.bucket)
        self.on_their_way: list[tuple[float, int]] = []
        self.free_at = 0.0
        self.asked: list[tuple[float, int]] = []
        self.written: set[int] = set()
        self.given_up: set[int] = set()
        self.finished_at: float | None = None

    def carry_out(self, commands: list[DownloadCommand], now: float) -> None:
        for command in commands:
            match command:
                case Subscribe(indices):
                    for index in indices:
                        self.asked.append((now, index))
                        self.free_at = max(self.free_at, now) + chunk_span(self.ref, index)[1] / self.speed
                        heapq.heappush(self.on_their_way, (self.free_at + self.delay_s, index))
                case Unsubscribe(indices):
                    self.given_up |= {*indices} - self.written
                case Write(index):
                    self.written.add(index)
                case Finished():
                    self.finished_at = now

    def run(self) -> None:
        now = 0.0
        self.carry_out(self.download.start(now), now)
        for _ in range(100_000):
            if self.finished_at is not None:
                return
            arrival = self.on_their_way[0][0] if self.on_their_way else None
            wakeup = self.download.next_wakeup()
            due = [at for at in (arrival, wakeup) if at is not None]
            assert due, "nothing will ever happen again"
            now = max(now, min(due))
            if arrival is not None and arrival <= now:
                _, index = heapq.heappop(self.on_their_way)
                offset, size = chunk_span(self.ref, index)
                self.carry_out(self.download.chunk(index, self.data[offset : offset + size], now), now)
            else:
                self.carry_out(self.download.tick(now), now)
        raise AssertionError(f"not finished: {len(self.written)} of {self.ref.chunks} chunks")

    def check_cap(self) -> None:
        """No span of time asks for more than the cap, the burst, and one chunk."""
        costs = [(at, chunk_span(self.ref, index)[1] + PULL_BYTES) for at, index in self.asked]
        for first in range(len(costs)):
            total = 0
            for at, cost in costs[first:]:
                total += cost
                assert (
                    total
                    <= self.cap * (at - costs[first][0] + BURST_S) + self.ref.chunk_bytes + PULL_BYTES + 1
                )


@pytest.mark.parametrize("faster", [1.0, 1.5, 100.0], ids=["as the cap", "a little faster", "much faster"])
@pytest.mark.parametrize(
    ("cap", "chunk_bytes", "chunks"),
    [(LEAST_RATE, 96 * 1024, 6), (125_000.0, 96 * 1024, 60), (32_000.0, 1024, 200), (1e6, 16 * 1024, 100)],
)
def test_a_capped_download_asks_no_faster_and_takes_waiting_for_no_loss(
    cap: float, chunk_bytes: int, chunks: int, faster: float
) -> None:
    path = Path(chunks * chunk_bytes - 5, chunk_bytes, cap=cap, speed=cap * faster)
    path.run()
    path.check_cap()
    assert len(path.written) == chunks
    assert len(path.asked) == chunks, "a chunk was asked for again"
    assert not path.given_up, "a chunk on its way was taken for lost"
    assert path.finished_at is not None
    least = (chunks * chunk_bytes) / cap
    assert path.finished_at <= least * (1 + PULL_BYTES / chunk_bytes) + chunk_bytes / cap + BURST_S


def test_asking_again_is_paid_for_too() -> None:
    path = Path(10 * 1000, 1000, cap=4000.0, speed=1e9)
    download = path.download
    now = 0.0
    path.carry_out(download.start(now), now)
    path.on_their_way.clear()  # the broker has lost everything
    for _ in range(40):
        wakeup = download.next_wakeup()
        assert wakeup is not None
        now = max(now, wakeup)
        path.carry_out(download.tick(now), now)
    assert len(path.asked) > path.ref.chunks
    path.check_cap()


def test_two_downloads_share_one_cap() -> None:
    one = Path(20 * 1000, 1000, cap=4000.0, speed=1e9)
    two = Path(20 * 1000, 1000, cap=4000.0, speed=1e9)
    two.download = Download(two.ref, set(), cap=one.bucket)
    one.carry_out(one.download.start(0.0), 0.0)
    two.carry_out(two.download.start(0.0), 0.0)
    asked = len(one.asked) + len(two.asked)
    assert asked * (1000 + PULL_BYTES) <= 4000 * BURST_S + 1000 + PULL_BYTES
    assert two.download.next_wakeup() is not None, "it waits for its turn"


def test_a_stopped_download_waits_for_nothing() -> None:
    path = Path(20 * 1000, 1000, cap=4000.0, speed=1e9)
    path.download.start(0.0)
    path.download.stop()
    assert path.download.next_wakeup() is None
    assert path.download.tick(100.0) == []


@pytest.mark.parametrize(
    ("length", "largest", "preferred", "cut"),
    [
        (10**6, 98_304, None, 98_304),
        (10**6, 98_304, 8000, 8000),
        (10**6, 4096, 8000, 4096),
        (100 * 8000 * MAX_CHUNKS, 10**6, 8000, 800_000),
        (8000 * MAX_CHUNKS + 1, 98_304, 8000, 8001),
    ],
)
def test_a_slow_link_gets_small_chunks_but_never_too_many(
    length: int, largest: int, preferred: int | None, cut: int
) -> None:
    assert cut_size(length, largest, preferred) == cut
