"""aggregator.seeding: the broker holds the newest models whole, whatever it has lost or kept from before."""

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from memory_link import ADDRESS, MemoryBroker

from aggregator.seeding import Seeder
from aggregator.store import Store
from federation.wire.inbox import LinkEvent, Message
from federation.wire.messages import ObjectRef
from federation.wire.objects import ref_of_file
from federation.wire.topics import Topics

TOPICS = Topics("home")
PATIENCE_S = 20.0


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


SIZE = 1000

Piece = tuple[Path, ObjectRef]


class Server:
    """A seeder on a link whose messages are handed to it as the service does."""

    def __init__(self, folder: Path, broker: MemoryBroker) -> None:
        self.broker = broker
        self.present: list[str] = []
        self.plans = count(1)
        self.link = broker.make_link(ADDRESS, "server", on_event=self.hear)
        self.link.start()
        self.store = Store(folder, "home", create=True)
        self.kept: list[str] = []
        self.seeder = Seeder(self.link, TOPICS, self.store, self.present.append, self.kept.append)

    def hear(self, event: LinkEvent) -> None:
        chunk = TOPICS.parse_object_chunk(event.topic) if isinstance(event, Message) else None
        if chunk is not None and isinstance(event, Message):
            self.seeder.arrived(chunk[0], event.payload)

    def object(self, number: int, chunk_bytes: int = 64) -> Piece:
        """A file of its own content."""
        path = self.store.checkpoint_path(number)
        path.write_bytes(bytes([number]) * SIZE)
        return path, ref_of_file(path, chunk_bytes)

    def wants(self, *pieces: Piece) -> None:
        """A new plan names these objects; wait until the broker holds them all."""
        name = f"plan {next(self.plans)}"
        self.seeder.want(name, pieces)
        eventually(lambda: name in self.present, "the broker holds them")
        assert {ref.sha256 for _, ref in pieces} <= set(held(self.broker))

    def keeps(self, *pieces: Piece) -> None:
        """These are the objects of the releases in force; wait until the broker holds them all."""
        name = f"releases {next(self.plans)}"
        self.seeder.keep(name, pieces)
        eventually(lambda: name in self.kept, "the broker holds them")
        assert {ref.sha256 for _, ref in pieces} <= set(held(self.broker))

    def wants_one(self, number: int, chunk_bytes: int = 64) -> ObjectRef:
        piece = self.object(number, chunk_bytes)
        self.wants(piece)
        return piece[1]

    def close(self) -> None:
        self.seeder.stop()
        self.store.close()


Start = Callable[[], Server]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Start]:
    broker = MemoryBroker()
    started: list[Server] = []

    def start() -> Server:
        started.append(Server(tmp_path, broker))
        return started[-1]

    yield start
    for one in started:
        one.close()


def held(broker: MemoryBroker) -> dict[str, int]:
    """Bytes per object on the broker."""
    sizes: dict[str, int] = {}
    for topic, payload in list(broker.retained.items()):
        chunk = TOPICS.parse_object_chunk(topic)
        assert chunk is not None
        sizes[chunk[0]] = sizes.get(chunk[0], 0) + len(payload)
    return sizes


def published(broker: MemoryBroker) -> list[str]:
    """Whose chunks were published, in order, without repetitions; what was cleared does not count."""
    chunks = [TOPICS.parse_object_chunk(topic) for _, topic, payload in list(broker.log) if payload]
    return list(dict.fromkeys(chunk[0] for chunk in chunks if chunk is not None))


def test_what_the_last_two_plans_name_is_kept_and_older_objects_cleared(server: Start) -> None:
    one = server()
    first, second, third = (one.wants_one(number) for number in range(3))
    eventually(lambda: first.sha256 not in held(one.broker), "the oldest is cleared")
    assert held(one.broker) == {second.sha256: 1000, third.sha256: 1000}


def test_what_an_earlier_process_left_is_cleared_one_day(server: Start) -> None:
    first = server()
    old = first.wants_one(0)
    first.close()
    second = server()
    assert old.sha256 in held(second.broker)
    new = second.wants_one(1)
    eventually(lambda: held(second.broker) == {new.sha256: 1000}, "the old one is cleared")


def test_after_a_reconnect_only_what_was_lost_is_sent_again(server: Start) -> None:
    one = server()
    ref = one.wants_one(0)
    sent = len(one.broker.log)
    one.seeder.connected()
    eventually(lambda: len(one.present) == 2, "it was looked for")
    assert len(one.broker.log) == sent, "the broker had kept it"
    one.broker.crash()
    one.seeder.connected()
    eventually(lambda: len(one.present) == 3, "it was sent again")
    assert held(one.broker) == {ref.sha256: 1000}


@pytest.mark.parametrize("chunk_bytes", [64, 128, 250])
def test_a_model_that_is_cut_anew_after_a_restart_is_sent_anew(server: Start, chunk_bytes: int) -> None:
    first = server()
    old = first.wants_one(0, chunk_bytes=100)
    first.close()
    second = server()
    ref = second.wants_one(0, chunk_bytes=chunk_bytes)
    assert ref.sha256 == old.sha256
    for index in range(ref.chunks):
        assert len(second.broker.retained[TOPICS.object_chunk(ref.sha256, index)]) in (
            chunk_bytes,
            1000 % chunk_bytes,
        )


def test_a_model_that_is_cut_anew_is_not_cleared_as_its_former_self(server: Start) -> None:
    one = server()
    one.wants_one(0, chunk_bytes=100)
    again = one.wants_one(0, chunk_bytes=128)
    later = one.wants_one(1)
    last = one.wants_one(2)
    eventually(
        lambda: held(one.broker) == {later.sha256: 1000, last.sha256: 1000}, "only the oldest is cleared"
    )
    assert again.sha256 not in held(one.broker)


def test_all_objects_of_a_plan_are_brought_in_its_order_and_it_is_told_once(server: Start) -> None:
    one = server()
    pieces = [one.object(number) for number in range(3)]
    one.wants(*pieces)
    assert published(one.broker) == [ref.sha256 for _, ref in pieces]
    assert one.present == ["plan 1"]


def test_an_object_that_goes_on_from_plan_to_plan_is_sent_once_and_stays(server: Start) -> None:
    """The full model, over many rounds of deltas."""
    one = server()
    model = one.object(0)
    deltas = [one.object(number) for number in range(1, 6)]
    for delta in deltas:
        one.wants(delta, model)
    kept = {model[1].sha256: SIZE, deltas[-1][1].sha256: SIZE, deltas[-2][1].sha256: SIZE}
    eventually(lambda: held(one.broker) == kept, "older deltas are cleared")
    chunks = [topic for _, topic, payload in one.broker.log if payload and model[1].sha256 in topic]
    assert len(chunks) == model[1].chunks
    assert one.present == [f"plan {number}" for number in range(1, 6)]


def test_a_plan_of_what_is_there_already_is_told_at_once(server: Start) -> None:
    """As in the next attempt of a round, or the next version that equals the former."""
    one = server()
    piece = one.object(0)
    one.wants(piece)
    one.seeder.want("again", [piece])
    assert one.present == ["plan 1", "again"]


def test_only_the_last_plan_is_told(server: Start) -> None:
    """Plans that come while there is no broker: whoever waits for the former one waits in vain."""
    one = server()
    one.broker.cut(one.link)
    one.seeder.want("former", [one.object(0)])
    one.seeder.want("last", [one.object(1), one.object(2)])
    one.broker.restore(one.link)
    one.seeder.connected()
    eventually(lambda: one.present, "the broker holds them")
    assert set(one.present) == {"last"}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_of_several_objects_only_the_one_that_was_lost_is_sent_again(server: Start, lost: int) -> None:
    one = server()
    pieces = [one.object(number) for number in range(3)]
    one.wants(*pieces)
    gone = pieces[lost][1]
    for index in range(gone.chunks):
        one.broker.retained.pop(TOPICS.object_chunk(gone.sha256, index))
    sent = len(one.broker.log)
    one.seeder.connected()
    eventually(lambda: len(one.present) == 2, "it was looked for, and sent")
    topics = [topic for _, topic, _ in one.broker.log[sent:]]
    assert topics == [TOPICS.object_chunk(gone.sha256, index) for index in range(gone.chunks)]


def test_the_next_process_sends_only_what_the_broker_has_not(server: Start) -> None:
    first = server()
    pieces = [first.object(number) for number in range(2)]
    first.wants(*pieces)
    first.close()
    second = server()
    sent = len(second.broker.log)
    second.seeder.connected()  # long before there are enough agents for a plan
    second.seeder.connected()
    eventually(second.seeder._work.empty, "it has seen that")
    new = second.object(2)
    second.wants(new, *pieces)
    topics = [topic for _, topic, _ in second.broker.log[sent:]]
    assert topics == [TOPICS.object_chunk(new[1].sha256, index) for index in range(new[1].chunks)]


def test_objects_of_releases_stay_while_plans_come_and_go(server: Start) -> None:
    one = server()
    model = one.object(10)
    one.keeps(model)
    refs = [one.wants_one(number) for number in range(4)]
    kept = {model[1].sha256: SIZE, refs[-1].sha256: SIZE, refs[-2].sha256: SIZE}
    eventually(lambda: held(one.broker) == kept, "older models are cleared")
    assert "releases 1" not in one.present, "a plan that waits hears of its own objects only"


def test_objects_of_a_release_that_is_not_in_force_any_more_are_cleared_without_any_plan(
    server: Start,
) -> None:
    """As when a server serves releases after its last round."""
    one = server()
    first, second, third = (one.object(number) for number in range(3))
    one.keeps(first, second)
    one.keeps(second, third)
    kept = {second[1].sha256: SIZE, third[1].sha256: SIZE}
    eventually(lambda: held(one.broker) == kept, "the oldest is cleared")
    one.keeps(first, second)
    assert first[1].sha256 in held(one.broker), "one that is in force again is there again"


def test_releases_in_force_are_not_sent_again_by_the_next_process_nor_cleared_by_its_first_plan(
    server: Start,
) -> None:
    first = server()
    model, gone = first.object(10), first.object(11)
    first.keeps(model, gone)
    first.close()
    second = server()
    sent = len(second.broker.log)
    second.keeps(model)
    plan = second.object(0)
    second.wants(plan)
    kept = {model[1].sha256: SIZE, plan[1].sha256: SIZE}
    eventually(lambda: held(second.broker) == kept, "what is in force no more is cleared")
    again = [topic for _, topic, payload in second.broker.log[sent:] if payload and model[1].sha256 in topic]
    assert again == [], "the broker had kept it"


def test_a_broker_that_forgot_everything_gets_plans_and_releases_again(server: Start) -> None:
    one = server()
    model, plan = one.object(10), one.object(0)
    one.keeps(model)
    one.wants(plan)
    one.broker.crash()
    one.seeder.connected()
    eventually(
        lambda: held(one.broker) == {model[1].sha256: SIZE, plan[1].sha256: SIZE}, "both are there again"
    )


def test_an_object_that_two_releases_have_is_sent_once(server: Start) -> None:
    one = server()
    golden = one.object(9)
    one.keeps(one.object(0), golden, one.object(1), golden)
    chunks = [topic for _, topic, payload in one.broker.log if payload and golden[1].sha256 in topic]
    assert len(chunks) == golden[1].chunks
