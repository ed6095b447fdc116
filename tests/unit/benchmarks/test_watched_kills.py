"""benchmarks.private_kills: the comparison of what was done with what was paid would notice a ledger that is too low."""

import pytest

from benchmarks.private_kills import paid_for
from privacy.ledger_format import Entry


def ledger(*steps: int) -> tuple[Entry, ...]:
    return tuple(
        Entry(
            number=number,
            time=0.0,
            kind="dp-sgd",
            run="a" * 16,
            round=1,
            attempt=1,
            model="b" * 64,
            noise_multiplier=2.0,
            clip_norm=1.0,
            sample_rate=0.1,
            steps=count,
            delta=1e-5,
            data="",
        )
        for number, count in enumerate(steps, 1)
    )


@pytest.mark.parametrize(
    ("entries", "passes", "before", "good"),
    [
        ((), [], 0, True),
        ((3, 3), [2, 2, 2], 1, True),
        ((3, 3, 3), [2, 2, 2, 3, 3, 3], 1, True),
        ((3,), [0], 0, False),  # a sample was touched before the head was on disk
        ((3, 3), [1], 1, False),  # on the money of an earlier life
        ((3, 3), [2, 2, 2, 2], 1, False),  # one step too many
        ((3, 3, 3), [2, 2, 2, 2, 3], 1, False),  # one too many before the next was paid
        ((3,), [2, 2], 1, False),  # the entry was there, and is gone
    ],
)
def test_only_what_was_paid_before_it_was_done_passes(
    entries: tuple[int, ...], passes: list[int], before: int, good: bool
) -> None:
    assert paid_for(ledger(*entries), passes, before) is good
