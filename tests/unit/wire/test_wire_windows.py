"""How much is asked for at once, over fast paths and slow ones, and that nothing is asked for twice without need."""

import random

from federation.wire.credit import FIRST_WINDOW
from federation.wire.messages import ObjectRef
from federation.wire.transfer import (
    Complete,
    CreditCommand,
    CreditScheduler,
    Download,
    DownloadCommand,
    Grant,
    Subscribe,
    Unsubscribe,
    chunk_span,
    make_ref,
)

CHUNK = 64
SLOW_CHUNK = 96 * 1024
STANDING_SUBSCRIPTIONS = 6
"""What an agent is subscribed to besides chunks, with some room."""


def an_object(chunks: int) -> tuple[bytes, ObjectRef]:
    data = random.Random(1).randbytes(chunks * CHUNK - 5)
    return data, make_ref(data, CHUNK)


def payload_of(data: bytes, ref: ObjectRef, index: int) -> bytes:
    offset, length = chunk_span(ref, index)
    return data[offset : offset + length]


def granted(commands: list[CreditCommand]) -> dict[str, tuple[int, ...]]:
    return {command.agent: command.indices for command in commands if isinstance(command, Grant)}


def slow_object(chunks: int) -> tuple[bytes, ObjectRef]:
    data = bytes(chunks * SLOW_CHUNK)
    return data[:SLOW_CHUNK], make_ref(data, SLOW_CHUNK)


class Line:
    """A link that carries one chunk after the other: what is asked for stands in line. TCP loses nothing.

    Args:
        rate: Bytes a second.
        delay_s: From the ask to the first byte.
        stall: From when to when it stands still, seconds.
    """

    def __init__(self, rate: float, delay_s: float = 0.05, stall: tuple[float, float] = (0.0, 0.0)) -> None:
        self._chunk_s, self._delay_s, self._stall = SLOW_CHUNK / rate, delay_s, stall
        self._flying: list[tuple[float, int]] = []
        self._free_at = 0.0
        self.carried = 0
        self.longest = 0

    def send(self, indices: tuple[int, ...], now: float) -> None:
        for index in indices:
            self._free_at = max(self._free_at, now + self._delay_s) + self._chunk_s
            if self._stall[0] <= self._free_at < self._stall[1]:
                self._free_at = self._stall[1] + self._chunk_s
            self._flying.append((self._free_at, index))
            self.carried += 1
        self.longest = max(self.longest, len(self._flying))

    @property
    def next_arrival(self) -> float:
        return self._flying[0][0] if self._flying else float("inf")

    def receive(self) -> int:
        return self._flying.pop(0)[1]


def pull(download: Download, line: Line, payload: bytes) -> None:
    """Run a download over a line to its end."""

    def obey(commands: list[DownloadCommand], now: float) -> None:
        for command in commands:
            if isinstance(command, Subscribe):
                line.send(command.indices, now)

    obey(download.start(0.0), 0.0)
    while not download.finished:
        wakeup = download.next_wakeup()
        assert wakeup is not None
        if wakeup < line.next_arrival:
            obey(download.tick(wakeup), wakeup)
        else:
            now = line.next_arrival
            obey(download.chunk(line.receive(), payload, now), now)


def test_a_slow_link_carries_no_chunk_twice() -> None:
    for rate in (125_000, 12_500):
        payload, ref = slow_object(40)
        download, line = Download(ref, set()), Line(rate)
        pull(download, line, payload)
        assert download.repeated == 0
        assert line.carried == ref.chunks


def test_after_a_stall_a_download_repeats_next_to_nothing() -> None:
    payload, ref = slow_object(60)
    download, line = Download(ref, set()), Line(125_000, stall=(10.0, 30.0))
    pull(download, line, payload)
    assert download.repeated == 0, "while it waited it asked for others"
    assert line.carried == ref.chunks


def test_a_connection_never_holds_more_subscriptions_than_aws_iot_allows() -> None:
    data, ref = an_object(400)
    download = Download(ref, set())
    held: set[int] = set()

    def obey(commands: list[DownloadCommand]) -> None:
        for command in commands:
            if isinstance(command, Subscribe):
                held.update(command.indices)
            elif isinstance(command, Unsubscribe):
                held.difference_update(command.indices)
            assert len(held) + STANDING_SUBSCRIPTIONS <= 50

    obey(download.start(0.0))
    dice, arrived, now = random.Random(2), set[int](), 0.0
    while not download.finished:
        now += 0.001
        if dice.random() < 0.02:  # all that is outstanding is late: its place is taken by others
            now += 100.0
            obey(download.tick(now))
        index = min(held - arrived)
        arrived.add(index)
        obey(download.chunk(index, payload_of(data, ref, index), now))
    assert not held


def test_credits_for_slow_links_are_never_given_twice_and_slow_devices_do_not_wait_for_each_other() -> None:
    _, ref = slow_object(20)
    scheduler = CreditScheduler()
    lines = {f"a{number}": Line(125_000) for number in range(40)}
    done: set[str] = set()

    def obey(commands: list[CreditCommand], now: float) -> None:
        for command in commands:
            match command:
                case Grant(agent, _, indices):
                    lines[agent].send(indices, now)
                case Complete(agent):
                    done.add(agent)

    for agent in lines:
        obey(scheduler.offer(agent, ref, set(), 0.0), 0.0)
    assert scheduler.active == len(lines)
    offers_at, now = 2.0, 0.0
    while len(done) < len(lines):
        agent = min(lines, key=lambda name: lines[name].next_arrival)
        wakeup = scheduler.next_wakeup()
        assert wakeup is not None
        now = max(now, min(lines[agent].next_arrival, wakeup, offers_at))
        if now == offers_at:  # a device repeats its offer while it hears nothing new
            offers_at += 2.0
            for name in lines.keys() - done:
                obey(scheduler.offer(name, ref, set(), now), now)
        elif now == lines[agent].next_arrival:
            obey(scheduler.chunk(agent, ref.sha256, lines[agent].receive(), now), now)
        else:
            obey(scheduler.tick(now), now)
    assert {line.carried for line in lines.values()} == {ref.chunks}
    assert max(line.longest for line in lines.values()) <= FIRST_WINDOW


def test_offer_after_a_reconnect_is_granted_at_once() -> None:
    _, ref = an_object(8)
    scheduler = CreditScheduler(max_transfers=1, window=4)
    scheduler.offer("a", ref, set(), 0.0)
    scheduler.chunk("a", ref.sha256, 1, 0.1)
    scheduler.reconnected("a")
    assert scheduler.offer("a", ref, {1}, 0.15) == [Grant("a", ref.sha256, (0, 2, 3, 4))]
    scheduler.reconnected("a")
    wakeup = scheduler.next_wakeup()
    assert wakeup is not None
    assert granted(scheduler.tick(wakeup)) == {"a": (0, 2, 3, 4)}, "it goes on without an offer too"
    assert scheduler.offer("a", ref, {1}, 0.2) == []
    scheduler.reconnected("nobody")


def test_credits_stay_within_one_bound_and_go_first_to_those_that_came_first() -> None:
    _, ref = an_object(100)
    scheduler = CreditScheduler(credit_bytes=10 * CHUNK)
    agents = [f"a{number}" for number in range(5)]
    granted_first = [granted(scheduler.offer(agent, ref, set(), 0.0)) for agent in agents]
    assert granted_first == [{"a0": (0, 1, 2, 3)}, {"a1": (0, 1, 2, 3)}, {}, {}, {}]
    now, left = 0.0, {agent: set(range(100)) for agent in agents}
    while any(left.values()):
        now += 0.01
        agent, index = next(
            (agent, index)
            for agent in agents
            for index in sorted(left[agent])
            if scheduler.wanted(agent, ref.sha256, index)
        )
        left[agent].remove(index)
        scheduler.chunk(agent, ref.sha256, index, now)
        assert scheduler.outstanding_bytes <= 10 * CHUNK
        assert scheduler.active or not any(left.values())


def test_the_window_of_a_fast_path_grows_and_one_chunk_fits_any_bound() -> None:
    _, ref = an_object(400)
    scheduler = CreditScheduler()
    held = list(granted(scheduler.offer("a", ref, set(), 0.0))["a"])
    now, longest = 0.0, 0
    while held:
        now += 0.1
        arriving, held = held, []
        for index in arriving:
            held += granted(scheduler.chunk("a", ref.sha256, index, now)).get("a", ())
        longest = max(longest, len(held))
    assert 32 <= longest <= 64
    tiny = CreditScheduler(credit_bytes=1)
    assert granted(tiny.offer("a", ref, set(), 0.0)) == {"a": (0,)}
    assert granted(tiny.chunk("a", ref.sha256, 0, 0.1)) == {"a": (1,)}
