"""federation.wire.sending: what overtakes what, and what is sent once."""

import pytest

from federation.errors import TransportError
from federation.wire.address import LARGEST_PACKET
from federation.wire.inbox import Limits
from federation.wire.sending import WAITING_BYTES, Publish, SendQueue, Subscribe, publish_job


def opened(limits: Limits | None = None) -> SendQueue:
    queue = SendQueue(4, lambda: None)
    queue.open(limits or Limits(max_packet_bytes=LARGEST_PACKET))
    return queue


def chunk(topic: str, payload: bytes = b"x" * 100) -> Publish:
    return publish_job(topic, payload, qos=0, retain=False, bulk=True)


def control(topic: str, qos: int = 0) -> Publish:
    return publish_job(topic, b"", qos=qos, retain=False)


def drained(queue: SendQueue) -> list[str]:
    topics = []
    while (job := queue.take(acks_free=True, idle=True)) is not None:
        assert isinstance(job, Publish)
        topics.append(job.topic)
    return topics


def test_control_overtakes_chunks_that_were_queued_before_it() -> None:
    queue = opened()
    for topic in ("chunk/0", "chunk/1"):
        assert queue.put(chunk(topic))
    assert queue.put(control("offer"))
    assert drained(queue) == ["offer", "chunk/0", "chunk/1"]


def test_a_chunk_waits_until_what_went_before_is_written() -> None:
    queue = opened()
    queue.put(chunk("chunk/0"))
    queue.put(Subscribe((("a", 0),)))
    assert isinstance(queue.take(acks_free=True, idle=False), Subscribe)
    assert queue.take(acks_free=True, idle=False) is None
    assert drained(queue) == ["chunk/0"]


def test_a_chunk_that_waits_is_not_queued_twice_but_one_that_has_gone_may_go_again() -> None:
    queue = opened()
    for _ in range(3):
        assert queue.put(chunk("chunk/0"))
        assert queue.waiting == 1
    assert drained(queue) == ["chunk/0"]
    assert queue.waiting == 0
    assert queue.put(chunk("chunk/0"))
    assert drained(queue) == ["chunk/0"]


def test_a_disconnect_forgets_what_waits() -> None:
    queue = opened()
    queue.put(chunk("chunk/0"))
    queue.close()
    assert not queue.put(chunk("chunk/0"))
    queue.open(Limits(max_packet_bytes=LARGEST_PACKET))
    assert drained(queue) == []
    assert queue.put(chunk("chunk/0"))
    assert drained(queue) == ["chunk/0"]


def test_what_waits_is_bounded_and_room_comes_back() -> None:
    queue = opened()
    payload = bytes(16 * 1024 * 1024)
    taken = [queue.put(chunk(f"chunk/{index}", payload)) for index in range(6)]
    assert sum(taken) == WAITING_BYTES // len(payload) - 1
    assert not queue.put(chunk("chunk/9", payload))
    assert len(drained(queue)) == sum(taken)
    assert queue.put(chunk("chunk/9", payload))


def test_bulk_that_waited_for_room_takes_none_from_control() -> None:
    queue = opened()
    payload = bytes(WAITING_BYTES // 3)
    for index in range(4):
        queue.put_bulk(publish_job(f"seed/{index}", payload, qos=1, retain=True, bulk=True), 1.0)
    assert queue.put(control("plan"))
    with pytest.raises(TransportError, match="took no bulk message"):
        queue.put_bulk(publish_job("seed/4", payload, qos=1, retain=True, bulk=True), 0.01)


def test_last_words_overtake_and_chunks_are_dropped() -> None:
    queue = opened()
    queue.put(chunk("chunk/0"))
    queue.end([control("farewell", qos=1)])
    assert queue.put(chunk("chunk/1"))
    assert drained(queue) == ["farewell"]
    assert not queue.unsaid


def test_control_waits_until_it_is_handed_on() -> None:
    queue = opened()
    queue.put(chunk("chunk/0"))
    waits = [queue.control_waits]
    queue.end([control("farewell", qos=1)])
    waits.append(queue.control_waits)
    drained(queue)
    assert [*waits, queue.control_waits] == [False, True, False]


def test_last_words_without_a_broker_stay_unsaid() -> None:
    queue = opened()
    queue.close()
    queue.end([control("farewell", qos=1)])
    queue.open(Limits())
    assert queue.unsaid
    assert drained(queue) == []


def test_a_chunk_over_the_limit_is_refused() -> None:
    queue = opened(Limits(max_packet_bytes=2048))
    with pytest.raises(TransportError, match="over the broker's limit"):
        queue.put(chunk("chunk/0", bytes(4096)))


def test_what_nobody_wants_any_more_is_taken_back() -> None:
    queue = opened()
    queue.put_bulk(chunk("seed/0"), 1.0)
    for index in range(5):
        queue.put(chunk(f"chunk/{index}"))
    queue.put(control("offer"))
    queue.drop_waiting()
    assert queue.waiting == 0
    assert drained(queue) == ["offer", "seed/0"]
    queue.settled(refused=False)
    queue.flush(0.01)  # nothing is missed: it was not lost but given up
