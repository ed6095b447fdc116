import hashlib
import random

import pytest

from federation.errors import ConfigError, PeerError, Rejection
from federation.wire.messages import MAX_CHUNKS, Credit, ObjectRef, decode_msgpack, encode_msgpack
from federation.wire.transfer import (
    MAX_WINDOW,
    Complete,
    CreditCommand,
    CreditScheduler,
    Download,
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


def payload_of(data: bytes, ref: ObjectRef, index: int) -> bytes:
    offset, length = chunk_span(ref, index)
    return data[offset : offset + length]


def an_object(chunks: int, seed: int = 1) -> tuple[bytes, ObjectRef]:
    data = random.Random(seed).randbytes(chunks * CHUNK - 5)
    return data, make_ref(data, CHUNK)


def granted(commands: list[CreditCommand]) -> dict[str, tuple[int, ...]]:
    return {command.agent: command.indices for command in commands if isinstance(command, Grant)}


def next_of(scheduler: CreditScheduler) -> tuple[float, dict[str, tuple[int, ...]]]:
    """When it grants something by itself, and what: a wake-up may be too early, and then another one follows."""
    for _ in range(10):
        wakeup = scheduler.next_wakeup()
        assert wakeup is not None
        grants = granted(scheduler.tick(wakeup))
        if grants:
            return wakeup, grants
    raise AssertionError("it wakes up and does nothing")


# Chunks and references


def test_reference_survives_the_wire_and_describes_every_chunk() -> None:
    data, ref = an_object(5)
    assert decode_msgpack(encode_msgpack(ref), ObjectRef) == ref
    assert ref.sha256 == hashlib.sha256(data).hexdigest()
    assert b"".join(payload_of(data, ref, index) for index in range(ref.chunks)) == data
    for index in range(ref.chunks):
        check_chunk(ref, index, payload_of(data, ref, index))
    assert make_ref(memoryview(data), CHUNK) == ref


@pytest.mark.parametrize(
    ("length", "chunk_bytes"), [(0, 64), (100, 63), (100, 1 << 25), (64 * MAX_CHUNKS + 1, 64)]
)
def test_impossible_cuts_are_config_errors(length: int, chunk_bytes: int) -> None:
    with pytest.raises(ConfigError):
        make_ref(bytes(length), chunk_bytes)


def test_too_many_chunks_says_which_size_would_do() -> None:
    with pytest.raises(ConfigError, match="chunk_bytes to at least 65 "):
        make_ref(bytes(64 * MAX_CHUNKS + 1), 64)
    assert make_ref(bytes(64 * MAX_CHUNKS + 1), 65).chunks <= MAX_CHUNKS


def test_bad_chunks_each_have_their_code() -> None:
    data, ref = an_object(3)
    good = payload_of(data, ref, 1)
    cases = [
        (3, good, Rejection.MALFORMED),
        (-1, good, Rejection.MALFORMED),
        (1, good[:-1], Rejection.WRONG_LENGTH),
        (2, good, Rejection.WRONG_LENGTH),
        (0, good, Rejection.WRONG_HASH),
        (1, bytes([good[0] ^ 1]) + good[1:], Rejection.WRONG_HASH),
    ]
    for index, payload, code in cases:
        with pytest.raises(PeerError) as caught:
            check_chunk(ref, index, payload)
        assert caught.value.code is code


# Download


def test_download_takes_a_window_and_refills_at_half() -> None:
    data, ref = an_object(20)
    download = Download(ref, set())
    assert download.start(0.0) == [Subscribe(tuple(range(8)))]
    for index in range(3):
        assert download.chunk(index, payload_of(data, ref, index), 1.0) == [
            Write(index, payload_of(data, ref, index))
        ]
    commands = download.chunk(3, payload_of(data, ref, 3), 1.0)
    assert commands[1] == Unsubscribe((0, 1, 2, 3))
    assert commands[2] == Subscribe((8, 9, 10, 11))
    assert (download.received, download.total, download.bytes_received) == (4, 20, 4 * CHUNK)


def test_download_window_grows_with_the_rate_to_its_limit() -> None:
    data, ref = an_object(400)
    download = Download(ref, set())
    now, held, largest = 0.0, list(range(8)), 0
    download.start(now)
    while held:
        now += 0.1  # the path's delay: whatever is subscribed arrives a tenth of a second later
        arriving, held = held, []
        for index in arriving:
            for command in download.chunk(index, payload_of(data, ref, index), now):
                if isinstance(command, Subscribe):
                    held += command.indices
        largest = max(largest, len(held))
    assert download.finished
    assert download.window == MAX_WINDOW
    assert MAX_WINDOW // 2 <= largest <= MAX_WINDOW


def test_download_window_shrinks_on_a_slow_path() -> None:
    data, ref = an_object(40)
    download = Download(ref, set())
    now, held = 0.0, list(range(8))
    download.start(now)
    while held:
        now += 1.0  # one chunk a second
        index = held.pop(0)
        for command in download.chunk(index, payload_of(data, ref, index), now):
            if isinstance(command, Subscribe):
                held += command.indices
    assert download.finished
    assert download.window == 2, "one in flight while the next is asked for: a longer line helps nobody"


def test_download_asks_again_ever_more_rarely_and_takes_what_comes_late() -> None:
    data, ref = an_object(2)
    download = Download(ref, set())
    download.start(0.0)
    asked_at: list[float] = []
    now = 0.0
    while len(asked_at) < 8:
        wakeup = download.next_wakeup()
        assert wakeup is not None
        assert download.tick(wakeup - 0.001) == []
        now = wakeup
        assert download.tick(now) == [Subscribe((0, 1))]
        asked_at.append(now)
    assert asked_at == [2, 6, 14, 30, 62, 122, 182, 242]
    download.chunk(0, payload_of(data, ref, 0), now)
    assert download.chunk(1, payload_of(data, ref, 1), now)[-1] == Finished()
    assert download.next_wakeup() is None


def test_chunks_the_broker_lacks_do_not_hold_up_the_others() -> None:
    data, ref = an_object(12)
    download = Download(ref, set())
    download.start(0.0)
    unsubscribe, subscribe = download.tick(2.0)
    assert subscribe == Subscribe((8, 9, 10, 11, 0, 1, 2, 3))
    assert unsubscribe == Unsubscribe((4, 5, 6, 7))
    late = download.chunk(5, payload_of(data, ref, 5), 2.5)
    assert late[0] == Write(5, payload_of(data, ref, 5)), "it was in flight when its topic was given up"


def test_corrupt_chunk_is_not_written_and_heals() -> None:
    data, ref = an_object(1)
    download = Download(ref, set())
    download.start(0.0)
    assert download.chunk(0, b"x" * len(data), 1.0) == []
    assert download.chunk(0, b"", 1.0) == []
    assert (download.corrupt, download.received) == (1, 0)
    assert download.next_wakeup() == 3.0
    assert download.tick(3.0) == [Subscribe((0,))]
    assert download.chunk(0, data, 3.5) == [Write(0, data), Unsubscribe((0,)), Finished()]
    assert download.chunk(0, data, 3.6) == [], "a duplicate"


def test_download_resumes_and_reconnects() -> None:
    data, ref = an_object(10)
    download = Download(ref, {0, 1, 2, 3, 4, 5})
    assert download.reconnected(0.0) == [], "not started"
    assert download.start(0.0) == [Subscribe((6, 7, 8, 9))]
    download.chunk(7, payload_of(data, ref, 7), 0.1)
    assert download.reconnected(50.0) == [Subscribe((6, 8, 9))]
    assert download.next_wakeup() == 50.4, "four flights of 0.1 s"
    assert Download(ref, set(range(10))).start(0.0) == [Finished()]


def test_download_ignores_indices_it_does_not_know() -> None:
    data, ref = an_object(2)
    download = Download(ref, set())
    download.start(0.0)
    assert download.chunk(99_999, data, 0.1) == []
    assert download.corrupt == 0


# Upload


def test_upload_repeats_its_offer_with_back_off_until_credited() -> None:
    _, ref = an_object(4)
    upload = Upload(ref)
    due = [second for second in range(200) if upload.due(float(second))]
    assert due == [0, 2, 6, 14, 30, 62, 122, 182]
    assert upload.credit(Credit(sha256=ref.sha256, chunks=(2, 0, 2))) == (2, 0)
    assert [second for second in range(200, 215) if upload.due(float(second))] == [202, 204, 208]
    upload.reconnected()
    assert upload.due(215.0)


def test_upload_refuses_credits_that_are_not_for_it() -> None:
    _, ref = an_object(4)
    upload = Upload(ref)
    for credit in (Credit(sha256=ref.sha256, chunks=(1, 4)), Credit(sha256="0" * 64, chunks=(1,))):
        with pytest.raises(PeerError) as caught:
            upload.credit(credit)
        assert caught.value.code is Rejection.MALFORMED


# CreditScheduler


def test_scheduler_grants_first_come_first_served_and_refills_at_half() -> None:
    _, ref = an_object(8)
    scheduler = CreditScheduler(max_transfers=2, window=4)
    assert scheduler.offer("a", ref, set(), 0.0) == [Grant("a", ref.sha256, (0, 1, 2, 3))]
    assert scheduler.offer("b", ref, {0, 1}, 0.0) == [Grant("b", ref.sha256, (2, 3, 4, 5))]
    assert scheduler.offer("c", ref, set(), 0.0) == []
    assert (scheduler.active, scheduler.queued, scheduler.outstanding) == (2, 1, 8)
    assert scheduler.chunk("a", ref.sha256, 0, 0.1) == []
    assert scheduler.chunk("a", ref.sha256, 0, 0.1) == [], "a duplicate"
    assert scheduler.chunk("a", ref.sha256, 3, 0.1) == [Grant("a", ref.sha256, (4, 5))]
    for index in (1, 2, 4, 5):
        commands = scheduler.chunk("a", ref.sha256, index, 0.2)
    scheduler.chunk("a", ref.sha256, 6, 0.3)
    commands = scheduler.chunk("a", ref.sha256, 7, 0.3)
    assert commands == [Complete("a", ref.sha256), Grant("c", ref.sha256, (0, 1, 2, 3))]
    assert not scheduler.wanted("a", ref.sha256, 7)


def test_only_what_was_asked_for_is_wanted() -> None:
    _, ref = an_object(8)
    scheduler = CreditScheduler(max_transfers=1, window=2)
    scheduler.offer("a", ref, set(), 0.0)
    assert scheduler.wanted("a", ref.sha256, 1)
    assert not scheduler.wanted("a", ref.sha256, 2)
    assert not scheduler.wanted("a", "0" * 64, 1)
    assert not scheduler.wanted("b", ref.sha256, 1)
    assert scheduler.chunk("a", ref.sha256, 2, 0.0) == []


def test_repeated_offer_grants_the_outstanding_again_without_double_counting() -> None:
    _, ref = an_object(8)
    scheduler = CreditScheduler(max_transfers=1, window=4)
    scheduler.offer("a", ref, set(), 0.0)
    scheduler.chunk("a", ref.sha256, 1, 0.1)
    assert scheduler.offer("a", ref, {1}, 0.2) == [], "it is only slower than its own patience"
    assert scheduler.offer("a", ref, {1}, 5.0) == [Grant("a", ref.sha256, (0, 2, 3))]
    assert scheduler.outstanding == 3
    assert next_of(scheduler)[0] == 5.4, "four flights of 0.1 s"


def test_other_offer_replaces_the_former_behind_those_that_wait() -> None:
    _, ref = an_object(8)
    _, other = an_object(8, seed=2)
    scheduler = CreditScheduler(max_transfers=1, window=4)
    scheduler.offer("a", ref, set(), 0.0)
    scheduler.offer("b", ref, set(), 0.0)
    assert granted(scheduler.offer("a", other, set(), 1.0)) == {"b": (0, 1, 2, 3)}
    assert not scheduler.wanted("a", ref.sha256, 0)
    assert (scheduler.active, scheduler.queued) == (1, 1)


def test_complete_offer_needs_no_credit() -> None:
    _, ref = an_object(3)
    assert CreditScheduler().offer("a", ref, {0, 1, 2}, 0.0) == [Complete("a", ref.sha256)]


def test_lost_chunks_are_granted_again_after_a_retry_time_that_follows_the_path() -> None:
    _, ref = an_object(12)
    scheduler = CreditScheduler(max_transfers=1, window=4)
    scheduler.offer("a", ref, set(), 0.0)
    assert scheduler.tick(1.9) == []
    assert granted(scheduler.tick(2.0)) == {"a": (4, 5, 6, 7)}, "the late ones go behind the others"
    assert scheduler.wanted("a", ref.sha256, 0), "and are taken if they come"
    for index in range(4):
        scheduler.chunk("a", ref.sha256, index, 3.0)  # three seconds after the first ask
    assert next_of(scheduler)[0] == 3.0 + 4 * 3.0


def test_stalled_transfer_loses_its_place_but_not_its_chunks() -> None:
    _, ref = an_object(6)
    scheduler = CreditScheduler(max_transfers=1, window=4)
    scheduler.offer("a", ref, set(), 0.0)
    scheduler.chunk("a", ref.sha256, 0, 0.5)
    scheduler.offer("b", ref, set(), 1.0)
    assert granted(scheduler.tick(10.0)) == {"a": (4, 5, 1, 2)}
    assert granted(scheduler.tick(10.5)) == {"b": (0, 1, 2, 3)}
    assert scheduler.wanted("a", ref.sha256, 2), "what is still in flight is not thrown away"
    assert scheduler.chunk("a", ref.sha256, 2, 11.0) == []
    scheduler.gone("b")
    wakeup = scheduler.next_wakeup()
    assert wakeup is not None
    assert wakeup <= 11.0
    assert granted(scheduler.tick(12.0)) == {"a": (3, 4, 5, 1)}


def test_alone_a_stalled_transfer_keeps_its_place() -> None:
    _, ref = an_object(6)
    scheduler = CreditScheduler(max_transfers=1, window=4)
    scheduler.offer("a", ref, set(), 0.0)
    for turn in range(20):
        assert next_of(scheduler)[1]["a"] == tuple((4 * (turn + 1) + i) % 6 for i in range(4))


def test_garbage_is_asked_for_again_after_the_retry_time_only() -> None:
    _, ref = an_object(2)
    scheduler = CreditScheduler(max_transfers=1, window=2)
    scheduler.offer("a", ref, set(), 0.0)
    assert scheduler.bad_chunk("a", ref.sha256, 0, 1.5) == []
    assert granted(scheduler.tick(2.0)) == {"a": (1,)}
    assert scheduler.bad_chunk("a", ref.sha256, 5, 2.0) == []
    assert next_of(scheduler)[1] == {"a": (0,)}


def test_cancelled_transfer_is_forgotten_and_its_place_taken_at_the_next_tick() -> None:
    _, ref = an_object(6)
    scheduler = CreditScheduler(max_transfers=1, window=4)
    scheduler.offer("a", ref, set(), 0.0)
    scheduler.offer("b", ref, set(), 0.0)
    assert scheduler.cancel("a") == []
    assert not scheduler.wanted("a", ref.sha256, 0)
    assert granted(scheduler.tick(0.1)) == {"b": (0, 1, 2, 3)}


@pytest.mark.parametrize(("max_transfers", "window"), [(0, 1), (1, 0), (1, 65)])
def test_scheduler_limits_are_checked(max_transfers: int, window: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CreditScheduler(max_transfers=max_transfers, window=window)
