"""aggregator.reception: offers, credits, chunks and receipts with a real store, real files and real signatures."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from memory_link import ADDRESS, MemoryBroker

from aggregator.admission import Limits, OpenRound
from aggregator.reception import REFUSAL_LOG_INTERVAL_S, Checked, Reception
from aggregator.rounds import AgentOut, Event, UpdateStored
from aggregator.store import Store
from federation.errors import Rejection
from federation.wire.codec import encode
from federation.wire.inbox import LinkEvent, Message
from federation.wire.messages import (
    Credit,
    Decline,
    DeclineCode,
    Receipt,
    TrainMetrics,
    UpdateOffer,
    decode_msgpack,
)
from federation.wire.signing import AGGREGATOR, Purpose, seal, unseal
from federation.wire.topics import Topics
from federation.wire.transfer import make_ref

RUN, BASE = "0" * 16, "b" * 64
TOPICS = Topics("home")
SERVER_KEY = Ed25519PrivateKey.generate()
KEYS = {"pi1": Ed25519PrivateKey.generate(), "pi2": Ed25519PrivateKey.generate()}
SCHEMA = {"b": (3,), "w": (20, 20)}
STATE = OpenRound(
    run=RUN,
    round=1,
    open=True,
    base=BASE,
    cohort=frozenset(KEYS),
    encoding="float32",
    upload_chunk_bytes=64,
    schema=SCHEMA,
)


class Later(Executor):
    """Runs what was submitted when the test says so, in this thread."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Future[Any], Any, tuple[Any, ...]]] = deque()

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, fn, args))
        return future

    def work(self) -> None:
        while self.waiting:
            future, call, arguments = self.waiting.popleft()
            try:
                future.set_result(call(*arguments))
            except Exception as error:  # noqa: BLE001 - an executor hands over whatever was raised
                future.set_exception(error)


class Door:
    """A reception, and what it says to its agents."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder, "home", create=True)
        self.store.open_round(1, 1, ("pi1", "pi2"), base=BASE, encoding="float32", deadline_s=60.0)
        self.heard: list[Message] = []
        self.posted: deque[Checked] = deque()
        self.executor = Later()
        broker = MemoryBroker()
        link = broker.make_link(ADDRESS, "server", on_event=lambda _: None)
        link.start()
        listener = broker.make_link(ADDRESS, "agents", on_event=self.hear)
        listener.start()
        listener.subscribe([(TOPICS.down("+"), 1)])
        self.reception = Reception(
            link=link,
            topics=TOPICS,
            store=self.store,
            key=SERVER_KEY,
            key_of=lambda name: KEYS[name].public_key() if name in KEYS else None,
            limits=Limits(max_samples=1000),
            executor=self.executor,
            post=self.posted.append,
        )

    def hear(self, event: LinkEvent) -> None:
        if isinstance(event, Message):
            self.heard.append(event)

    def says(
        self, message: UpdateOffer | Decline, agent: str = "pi1", now: float = 0.0, key: str = ""
    ) -> list[Event]:
        sealed = seal(message, purpose=Purpose.AGENT, federation="home", sender=agent, key=KEYS[key or agent])
        return self.reception.message(agent, sealed, now)

    def credits(self, agent: str = "pi1") -> list[int]:
        """Chunks that were asked for since the last look, in order."""
        mine = [message for message in self.heard if message.topic == TOPICS.credit(agent)]
        self.heard = [message for message in self.heard if message not in mine]
        return [index for message in mine for index in decode_msgpack(message.payload, Credit).chunks]

    def receipts(self, agent: str = "pi1") -> list[Receipt]:
        mine = [message for message in self.heard if message.topic == TOPICS.receipt(agent)]
        self.heard = [message for message in self.heard if message not in mine]
        return [
            unseal(
                message.payload,
                Receipt,
                purpose=Purpose.RECEIPT,
                federation="home",
                sender=AGGREGATOR,
                key=SERVER_KEY.public_key(),
            )
            for message in mine
        ]

    def uploads(self, data: bytes, agent: str = "pi1", now: float = 0.0) -> None:
        """Send whatever is asked for until nothing is."""
        ref = make_ref(data, 64)
        while asked := self.credits(agent):
            for index in asked:
                self.reception.chunk(agent, ref.sha256, index, data[64 * index : 64 * (index + 1)], now)

    def checks(self, now: float = 0.0) -> list[Event]:
        self.executor.work()
        return [
            event
            for _ in range(len(self.posted))
            for event in self.reception.checked(self.posted.popleft(), now)
        ]

    def refused(self) -> list[str]:
        return [code for _, _, code, _, _ in reversed(self.store.refusals())]


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    made = Door(tmp_path)
    made.reception.open(STATE)
    yield made
    made.store.close()


def update(value: float = 0.5, schema: dict[str, tuple[int, ...]] = SCHEMA) -> bytes:
    return encode(
        {name: np.full(shape, value, np.float32) for name, shape in schema.items()},
        "float32",
        np.random.default_rng(0),
    )


def offer(data: bytes, **fields: Any) -> UpdateOffer:
    made = UpdateOffer(
        run=RUN,
        round=1,
        base=BASE,
        object=make_ref(data, 64),
        encoding="float32",
        samples=10,
        metrics=TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=1.0),
    )
    return msgspec.structs.replace(made, **fields)


def test_an_update_from_its_offer_to_its_receipt(door: Door) -> None:
    data = update()
    assert door.says(offer(data)) == []
    door.uploads(data)
    assert door.receipts() == [], "nothing is promised before it is on disk"
    assert door.checks() == [UpdateStored("pi1")]
    (receipt,) = door.receipts()
    assert (receipt.accepted, receipt.sha256, receipt.run, receipt.round) == (
        True,
        make_ref(data, 64).sha256,
        RUN,
        1,
    )
    assert door.store.update_path(1, "pi1").read_bytes() == data
    assert list(door.store.updates(1)) == ["pi1"]
    assert not list((door.store.folder / "incoming").iterdir())


def test_the_accepted_offer_again_gets_the_receipt_again_and_counts_once(door: Door) -> None:
    data = update()
    door.says(offer(data))
    door.uploads(data)
    assert door.says(offer(data)) == [], "it is being checked: the receipt will come"
    door.checks()
    door.receipts()
    assert door.says(offer(data)) == []
    door.reception.shut()
    assert door.says(offer(data)) == []
    assert [receipt.accepted for receipt in door.receipts()] == [True, True]
    assert door.credits() == []
    assert list(door.store.updates(1)) == ["pi1"]


def test_an_offer_again_asks_for_what_is_missing_only(door: Door) -> None:
    data = update()
    door.says(offer(data))
    first = door.credits()
    door.reception.chunk("pi1", make_ref(data, 64).sha256, first[0], data[64 * first[0] :][:64], 0.0)
    door.credits()
    door.says(offer(data))
    assert first[0] not in door.credits()


def test_after_a_restart_or_a_lost_link_only_the_rest_is_asked_for(door: Door, tmp_path: Path) -> None:
    data = update()
    ref = make_ref(data, 64)
    door.says(offer(data))
    sent = door.credits()
    for index in sent:
        door.reception.chunk("pi1", ref.sha256, index, data[64 * index :][:64], 0.0)
    door.reception.gone("pi1")
    door.credits()
    restarted = Door(tmp_path)
    restarted.reception.open(STATE)
    for one in (door, restarted):
        one.says(offer(data))
        asked = one.credits()
        assert asked
        assert not set(asked) & set(sent)
    restarted.store.close()


def test_after_a_lost_link_what_was_on_its_way_is_asked_for_at_once(door: Door) -> None:
    data = update()
    door.says(offer(data))
    asked = door.credits()
    assert asked
    door.says(offer(data), now=0.1)
    assert door.credits() == [], "an agent that is only slow is not asked twice"
    door.reception.back("pi1")
    door.says(offer(data), now=0.2)
    assert door.credits() == asked


def test_chunks_that_were_not_asked_for_are_dropped(door: Door) -> None:
    data = update()
    ref = make_ref(data, 64)
    door.reception.chunk("pi1", ref.sha256, 0, data[:64], 0.0)
    door.says(offer(data))
    asked = door.credits()
    door.reception.chunk("pi1", ref.sha256, max(asked) + 1, data[:64], 0.0)
    door.reception.chunk("pi2", ref.sha256, 0, data[:64], 0.0)
    door.reception.chunk("pi1", "c" * 64, 0, data[:64], 0.0)
    door.reception.chunk("pi1", ref.sha256, 4000, data[:64], 0.0)
    assert door.refused() == []
    door.reception.gone("pi1")
    door.says(offer(data))
    assert door.credits()[0] == 0, "nothing was stored"


def test_a_corrupt_chunk_is_asked_for_again(door: Door) -> None:
    data = update()
    ref = make_ref(data, 64)
    door.says(offer(data))
    first, *rest = door.credits()
    door.reception.chunk("pi1", ref.sha256, first, bytes(64), 0.0)
    for index in rest:
        door.reception.chunk("pi1", ref.sha256, index, data[64 * index :][:64], 0.0)
    assert door.refused() == ["wrong_hash"]
    door.uploads(data)
    wakeup = door.reception.next_wakeup()
    assert wakeup is not None
    door.reception.tick(wakeup)
    assert door.credits() == [first]
    door.reception.chunk("pi1", ref.sha256, first, data[:64], wakeup)
    assert door.checks(wakeup) == [UpdateStored("pi1")]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (update(schema={"b": (3,)}), Rejection.MISSING_TENSOR),
        (update(schema={"b": (3,), "w": (20, 19)}), Rejection.WRONG_SHAPE),
        (update()[:-4] + np.float32(np.nan).tobytes(), Rejection.NON_FINITE),
    ],
)
def test_an_update_with_bad_content_is_refused_for_good(door: Door, data: bytes, code: Rejection) -> None:
    door.says(offer(data))
    door.uploads(data)
    assert door.checks() == [AgentOut("pi1")]
    (receipt,) = door.receipts()
    assert (receipt.accepted, receipt.code) == (False, code)
    assert door.store.updates(1) == {}
    assert door.refused() == [code.value]
    assert not [path for path in door.store.folder.rglob("*pi1*") if path.is_file()]


def test_an_update_that_is_checked_while_the_round_closes_is_late(door: Door) -> None:
    data = update()
    door.says(offer(data))
    door.uploads(data)
    door.reception.shut()
    assert door.checks() == []
    (receipt,) = door.receipts()
    assert (receipt.accepted, receipt.code) == (False, Rejection.LATE)
    assert door.store.updates(1) == {}


def test_an_upload_in_progress_is_dropped_when_the_round_closes(door: Door) -> None:
    data = update()
    door.says(offer(data))
    asked = door.credits()
    door.reception.shut()
    door.reception.chunk("pi1", make_ref(data, 64).sha256, asked[0], data[:64], 0.0)
    assert not list((door.store.folder / "incoming").iterdir())
    assert door.reception.next_wakeup() is None
    door.says(offer(data))
    assert [receipt.code for receipt in door.receipts()] == [Rejection.LATE]


def test_two_agents_upload_side_by_side(door: Door) -> None:
    one, two = update(0.25), update(0.75)
    door.says(offer(one), "pi1")
    door.says(offer(two), "pi2")
    door.uploads(two, "pi2")
    door.uploads(one, "pi1")
    assert door.checks() == [UpdateStored("pi2"), UpdateStored("pi1")]
    assert door.store.update_path(1, "pi1").read_bytes() == one
    assert door.store.update_path(1, "pi2").read_bytes() == two


def test_another_update_of_the_same_agent_takes_the_place_of_an_unfinished_one_only(door: Door) -> None:
    first, second = update(0.25), update(0.75)
    door.says(offer(first))
    door.credits()
    door.says(offer(second))
    door.uploads(second)
    assert door.checks() == [UpdateStored("pi1")]
    door.receipts()
    door.says(offer(first))
    assert [receipt.code for receipt in door.receipts()] == [Rejection.DUPLICATE]
    assert door.store.update_path(1, "pi1").read_bytes() == second


def test_a_decline_is_passed_on_and_one_for_another_round_is_not(door: Door) -> None:
    assert door.says(Decline(run=RUN, round=1, reason="too hot")) == [AgentOut("pi1")]
    assert door.says(Decline(run=RUN, round=2, reason="too hot")) == []
    assert door.refused() == ["future_round"]


def test_the_last_decline_of_a_round_is_kept_for_the_operator(door: Door) -> None:
    door.says(Decline(run=RUN, round=1, reason="too hot"))
    door.says(Decline(run=RUN, round=1, reason="no masks", code=DeclineCode.TERMS))
    kept = [row[:4] for row in door.store.declines()]
    assert kept == [(1, "pi1", "terms", "no masks")]


def test_who_has_not_proved_to_be_the_agent_gets_no_receipt(door: Door) -> None:
    assert door.says(offer(update()), "pi1", key="pi2") == []
    assert door.reception.message("stranger", b"", 0.0) == []
    assert door.reception.message("pi1", b"\xff", 0.0) == []
    assert door.heard == []
    assert door.refused() == ["bad_signature", "unknown_agent", "malformed"]


def test_refusals_are_written_once_in_a_while_per_agent_and_code(door: Door) -> None:
    for now in (0.0, 0.1, REFUSAL_LOG_INTERVAL_S * 0.99, REFUSAL_LOG_INTERVAL_S):
        door.reception.message("pi1", b"", now)
    door.reception.message("pi2", b"", 0.0)
    assert door.refused() == ["malformed"] * 3


def test_a_flood_of_invented_names_does_not_wear_the_disk_out(door: Door) -> None:
    for number in range(50):
        door.reception.message(f"stranger{number}", b"", 0.0)
    assert door.refused() == ["unknown_agent"]


def test_before_the_first_round_is_known_an_offer_waits(tmp_path: Path) -> None:
    door = Door(tmp_path)
    assert door.says(offer(update())) == []
    assert door.says(Decline(run=RUN, round=1, reason="")) == []
    assert door.heard == [], "a refusal would make the agent throw its update away"
    assert door.refused() == []
    door.reception.open(STATE)
    door.says(offer(update()))
    assert door.credits()
    door.store.close()
