"""federation.wire.rate: how a cap is written, and that the bucket keeps it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import ConfigError
from federation.wire.rate import (
    BURST_S,
    CHUNK_S,
    KEEPALIVE_S,
    LEAST_RATE,
    USUAL_CHUNK_BYTES,
    TokenBucket,
    keepalive_s,
    parse_rate,
    upload_chunk_bytes,
)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("16kbit", 2000),
        ("256kbit", 32_000),
        ("1mbit", 125_000),
        (" 1.5 Mbit/s ", 187_500),
        ("0.5MBIT", 62_500),
        ("1000mbit", 125e6),
    ],
)
def test_rates_are_bits_a_second(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "1", "1m", "200kB", "1mbps", "-1mbit", "1e3kbit", "kbit", "1,5mbit", "nan"]
)
def test_anything_else_is_told_what_to_write(text: str) -> None:
    with pytest.raises(ConfigError, match=r"such as 256kbit or 1\.5mbit"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0mbit", "15.9kbit", "0.001mbit"])
def test_too_low_a_cap_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="set it to 16kbit or more"):
        parse_rate(text)


def test_what_shrinks_and_what_stretches_under_a_cap() -> None:
    assert upload_chunk_bytes(LEAST_RATE) == 8000
    assert upload_chunk_bytes(125_000) == 500_000
    assert keepalive_s(None) == keepalive_s(125_000) == KEEPALIVE_S
    slow = keepalive_s(LEAST_RATE)
    assert slow > KEEPALIVE_S
    assert slow / 2 >= USUAL_CHUNK_BYTES / LEAST_RATE
    assert upload_chunk_bytes(LEAST_RATE) / LEAST_RATE == CHUNK_S


def test_a_debt_is_paid_off_before_the_next_message() -> None:
    bucket = TokenBucket(1000.0)
    assert bucket.ready_at(5.0) == 5.0
    bucket.spend(3000, 5.0)  # 1,000 were saved up
    assert bucket.ready_at(5.0) == 7.0
    assert bucket.ready_at(6.5) == 7.0
    assert bucket.ready_at(7.0) == 7.0
    bucket.spend(1, 7.0)
    assert bucket.ready_at(7.0) == pytest.approx(7.001)


def test_an_idle_link_saves_up_a_bounded_burst() -> None:
    bucket = TokenBucket(1000.0)
    bucket.spend(0, 0.0)
    bucket.spend(1001, 1e6)
    assert bucket.ready_at(1e6) == pytest.approx(1e6 + 1e-3)


@given(
    st.floats(LEAST_RATE, 1e8),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**6)), min_size=1, max_size=30),
)
def test_no_span_lets_more_through_than_the_formula(rate: float, steps: list[tuple[float, int]]) -> None:
    bucket, now, sent = TokenBucket(rate), 0.0, []
    for pause, size in steps:
        now = bucket.ready_at(now + pause)
        bucket.spend(size, now)
        sent.append((now, size))
    largest = max(size for _, size in sent)
    for first in range(len(sent)):
        total = 0
        for at, size in sent[first:]:
            total += size
            bound = rate * (at - sent[first][0]) + rate * BURST_S + largest
            assert total <= bound * (1 + 1e-9)
