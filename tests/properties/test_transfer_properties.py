"""Transfers over a channel that drops, duplicates, delays and corrupts always end, within their bounds."""

import heapq
import random
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from federation.errors import PeerError
from federation.wire.messages import Credit, ObjectRef
from federation.wire.objects import PartialObject
from federation.wire.transfer import (
    Complete,
    CreditCommand,
    CreditScheduler,
    Download,
    DownloadCommand,
    Finished,
    Grant,
    Subscribe,
    Unsubscribe,
    Upload,
    Write,
    check_chunk,
    chunk_span,
    make_ref,
)

CHUNK = 64
STEPS = 20_000
"""Far more events than any of these transfers needs: reaching it means that one does not end."""


@dataclass(frozen=True)
class Faults:
    """Probabilities per message, and the longest delay in seconds: unequal delays reorder."""

    drop: float
    duplicate: float
    corrupt: float
    delay_s: float
    seed: int


faults = st.builds(
    Faults,
    drop=st.sampled_from([0.0, 0.05, 0.4]),
    duplicate=st.sampled_from([0.0, 0.3]),
    corrupt=st.sampled_from([0.0, 0.2]),
    delay_s=st.sampled_from([0.0, 0.01, 1.0, 20.0]),
    seed=st.integers(0, 2**32 - 1),
)


def random_bytes(chunks: int) -> st.SearchStrategy[bytes]:
    """Up to ``chunks`` chunks. Drawn by size, since drawn byte by byte they would almost always be small."""
    sizes = st.integers(1, chunks * CHUNK)
    return st.builds(lambda size, seed: random.Random(seed).randbytes(size), sizes, st.integers(0, 2**32 - 1))


objects = random_bytes(60)
scattered = st.sets(st.integers(0, 59))


@dataclass(frozen=True)
class Message:
    agent: str
    index: int
    payload: bytes
    credit: Credit | None = None


class Channel:
    """Messages in flight, in simulated time."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._random = random.Random(faults.seed)
        self._flying: list[tuple[float, int, Message]] = []
        self._sent = 0

    def send(self, message: Message, now: float) -> None:
        for _ in range(1 + (self._random.random() < self._faults.duplicate)):
            if self._random.random() < self._faults.drop:
                continue
            payload = message.payload
            if payload and self._random.random() < self._faults.corrupt:
                at = self._random.randrange(len(payload))
                payload = (
                    payload[:at] + bytes([payload[at] ^ 1 << self._random.randrange(8)]) + payload[at + 1 :]
                )
            arrival = now + self._random.uniform(0, self._faults.delay_s)
            self._sent += 1
            carried = Message(message.agent, message.index, payload, message.credit)
            heapq.heappush(self._flying, (arrival, self._sent, carried))

    def next_arrival(self) -> float | None:
        return self._flying[0][0] if self._flying else None

    def receive(self) -> Message:
        return heapq.heappop(self._flying)[2]


def pieces_of(data: bytes, ref: ObjectRef) -> list[bytes]:
    return [data[at : at + length] for at, length in (chunk_span(ref, i) for i in range(ref.chunks))]


class Agent:
    """A download run to its end against a broker that has every chunk; the link breaks now and then."""

    def __init__(self, download: Download, pieces: Sequence[bytes], faults: Faults, window_max: int) -> None:
        self.download = download
        self.pieces = pieces
        self.window_max = window_max
        self.channel = Channel(faults)
        self.dice = random.Random(faults.seed + 1)
        self.written: dict[int, bytes] = {}
        self.subscribed: set[int] = set()
        self.finished = False
        self.now = 0.0

    def obey(self, commands: list[DownloadCommand]) -> None:
        for command in commands:
            assert not self.finished, "Finished is the last command"
            match command:
                case Subscribe(indices):
                    self.subscribed.update(indices)
                    for index in indices:
                        self.channel.send(Message("", index, self.pieces[index]), self.now)
                case Unsubscribe(indices):
                    assert self.subscribed.issuperset(indices)
                    self.subscribed.difference_update(indices)
                case Write(index, payload):
                    assert index not in self.written
                    self.written[index] = payload
                case Finished():
                    self.finished = True
        assert len(self.subscribed) <= self.window_max

    def step(self) -> None:
        wakeup, arrival = self.download.next_wakeup(), self.channel.next_arrival()
        assert wakeup is not None, "an unfinished download waits for something"
        if arrival is not None and arrival <= wakeup:
            self.now = max(self.now, arrival)
            message = self.channel.receive()
            self.obey(self.download.chunk(message.index, message.payload, self.now))
        else:
            self.now = max(self.now, wakeup)
            self.obey(self.download.tick(self.now))
        if not self.finished and self.dice.random() < 0.01:
            self.subscribed.clear()
            self.obey(self.download.reconnected(self.now))

    def pull(self) -> dict[int, bytes]:
        self.obey(self.download.start(self.now))
        for _ in range(STEPS):
            if self.finished:
                break
            self.step()
        assert self.finished
        assert not self.subscribed, "no subscription is left behind"
        assert self.download.next_wakeup() is None
        assert self.download.finished
        return self.written


@given(objects, scattered, st.integers(1, 9), st.integers(0, 20), faults)
def test_download_ends_whatever_the_channel_does(
    data: bytes, have: set[int], window_min: int, more: int, faults: Faults
) -> None:
    ref = make_ref(data, CHUNK)
    pieces = pieces_of(data, ref)
    have = {index for index in have if index < ref.chunks}
    download = Download(ref, have, window_min=window_min, window_max=window_min + more)
    written = Agent(download, pieces, faults, window_min + more).pull()
    assert written == {index: piece for index, piece in enumerate(pieces) if index not in have}
    assert (download.received, download.total) == (ref.chunks, ref.chunks)
    assert download.bytes_received == sum(map(len, written.values()))


class Fleet:
    """Agents that upload to one scheduler: the real state machines, with a lossy channel in both directions."""

    def __init__(
        self, data: Sequence[bytes], have: set[int], scheduler: CreditScheduler, faults: Faults
    ) -> None:
        self.channel = Channel(faults)
        self.dice = random.Random(faults.seed + 1)
        self.scheduler = scheduler
        self.refs = {f"a{i}": make_ref(content, CHUNK) for i, content in enumerate(data)}
        self.pieces = {
            agent: pieces_of(content, self.refs[agent])
            for agent, content in zip(self.refs, data, strict=True)
        }
        self.uploads = {agent: Upload(ref) for agent, ref in self.refs.items()}
        self.stored = {
            agent: {index: self.pieces[agent][index] for index in have if index < ref.chunks}
            for agent, ref in self.refs.items()
        }
        self.completed: set[str] = set()
        self.now = 0.0

    def obey(self, commands: list[CreditCommand]) -> None:
        for command in commands:
            match command:
                case Grant(agent, sha256, indices):
                    self.channel.send(
                        Message(agent, -1, b"", Credit(sha256=sha256, chunks=indices)), self.now
                    )
                case Complete(agent, sha256):
                    assert agent not in self.completed
                    assert sha256 == self.refs[agent].sha256
                    self.completed.add(agent)

    def offer_where_due(self) -> None:
        for agent in self.refs.keys() - self.completed:
            if self.uploads[agent].due(self.now) and self.dice.random() > 0.2:
                self.obey(self.scheduler.offer(agent, self.refs[agent], self.stored[agent].keys(), self.now))

    def deliver(self, message: Message) -> None:
        agent, upload = message.agent, self.uploads[message.agent]
        if message.credit is not None:
            for index in upload.credit(message.credit):
                self.channel.send(Message(agent, index, self.pieces[agent][index]), self.now)
            return
        ref = self.refs[agent]
        if not self.scheduler.wanted(agent, ref.sha256, message.index):
            return
        try:
            check_chunk(ref, message.index, message.payload)
        except PeerError:
            self.obey(self.scheduler.bad_chunk(agent, ref.sha256, message.index, self.now))
            return
        assert message.index not in self.stored[agent], "what is stored is not wanted"
        self.stored[agent][message.index] = message.payload
        self.obey(self.scheduler.chunk(agent, ref.sha256, message.index, self.now))

    def step(self) -> None:
        arrival, wakeup = self.channel.next_arrival(), self.scheduler.next_wakeup()
        soon = min(time for time in (arrival, wakeup, self.now + 1.0) if time is not None)
        self.now = max(self.now, soon)
        if arrival is not None and arrival <= self.now:
            self.deliver(self.channel.receive())
        else:
            self.obey(self.scheduler.tick(self.now))
        if self.dice.random() < 0.005:
            agent = self.dice.choice(sorted(self.refs))
            if self.dice.random() < 0.5:
                self.obey(self.scheduler.gone(agent))
            else:
                self.scheduler.reconnected(agent)
            self.uploads[agent].reconnected()
        self.offer_where_due()


@given(
    st.lists(random_bytes(30), min_size=1, max_size=6),
    scattered,
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 20),
    faults,
)
def test_uploads_end_whatever_the_channel_does_with_bounded_chunks_outstanding(
    data: list[bytes], have: set[int], max_transfers: int, window: int, bound: int, faults: Faults
) -> None:
    scheduler = CreditScheduler(max_transfers=max_transfers, window=window, credit_bytes=bound * CHUNK)
    fleet = Fleet(data, have, scheduler, faults)
    fleet.offer_where_due()
    for _ in range(STEPS):
        assert scheduler.outstanding <= max_transfers * window
        assert scheduler.outstanding_bytes <= bound * CHUNK
        assert scheduler.active <= max_transfers
        if len(fleet.completed) == len(data):
            break
        fleet.step()
    assert fleet.completed == fleet.refs.keys()
    for agent, content in zip(fleet.refs, data, strict=True):
        assert b"".join(piece for _, piece in sorted(fleet.stored[agent].items())) == content


@given(objects, st.randoms(use_true_random=False), st.integers(1, 3))
def test_join_after_split_is_identity_in_any_order_and_with_repeats(
    data: bytes, order: random.Random, repeats: int
) -> None:
    ref = make_ref(data, CHUNK)
    pieces = pieces_of(data, ref)
    indices = [index for index in range(ref.chunks) for _ in range(repeats)]
    order.shuffle(indices)
    with tempfile.TemporaryDirectory() as folder:
        partial = PartialObject(Path(folder) / "part", ref)
        for index in indices:
            check_chunk(ref, index, pieces[index])
            partial.write(index, pieces[index])
        assert partial.finish(Path(folder) / "whole").read_bytes() == data


@given(objects, st.data())
def test_object_resumes_after_any_prefix_of_its_file(data: bytes, draw: st.DataObject) -> None:
    ref = make_ref(data, CHUNK)
    pieces = pieces_of(data, ref)
    prefix = draw.draw(st.integers(0, len(data)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part"
        path.write_bytes(data[:prefix])
        with closing(PartialObject(path, ref)) as partial:
            whole_chunks = {index for index in range(ref.chunks) if sum(chunk_span(ref, index)) <= prefix}
            assert partial.have == whole_chunks
            written = Agent(Download(ref, partial.have), pieces, Faults(0, 0, 0, 0.1, 1), 64).pull()
            for index, payload in written.items():
                partial.write(index, payload)
            assert partial.finish(Path(folder) / "whole").read_bytes() == data
