import threading

from federation.wire.inbox import EVENT_OVERHEAD_BYTES
from federation.wire.link import Disconnected, Inbox, Message, Overflow


def message(size: int) -> Message:
    return Message("t", bytes(size), retain=False)


def test_messages_over_the_bound_become_one_overflow_with_their_number() -> None:
    inbox = Inbox(maxbytes=3 * (EVENT_OVERHEAD_BYTES + 101))
    for _ in range(5):
        inbox.put(message(100))
    inbox.put(Disconnected("gone", refused=False))
    assert [inbox.get(0) for _ in range(3)] == [message(100)] * 3
    assert inbox.get(0) == Overflow(2)
    assert inbox.get(0) == Disconnected("gone", refused=False)
    assert inbox.get(0) is None


def test_room_comes_back_when_messages_are_read() -> None:
    inbox = Inbox(maxbytes=EVENT_OVERHEAD_BYTES + 101)
    for _ in range(3):
        inbox.put(message(100))
        assert inbox.get(0) == message(100)


def test_an_overflow_is_told_again_after_the_first_was_read() -> None:
    inbox = Inbox(maxbytes=0)
    inbox.put(message(1))
    assert inbox.get(0) == Overflow(1)
    inbox.put(message(1))
    inbox.put(message(1))
    assert inbox.get(0) == Overflow(2)


def test_posted_objects_keep_their_place() -> None:
    inbox = Inbox()
    inbox.put(message(1))
    inbox.post("mine")
    assert [inbox.get(0), inbox.get(0)] == [message(1), "mine"]


def test_wake_ends_a_wait_without_an_item() -> None:
    inbox = Inbox()
    got: list[object] = []
    waiter = threading.Thread(target=lambda: got.append(inbox.get(None)))
    waiter.start()
    inbox.wake()
    waiter.join(20)
    assert got == [None]
