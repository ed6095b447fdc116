"""benchmarks.rollout_device: frames are counted by their numbers, and a log is read as it grows."""

import json
from pathlib import Path

from benchmarks.rollout_device import Label, Records, account, moment


def labels(*frames: tuple[int, int]) -> list[Label]:
    """Of pairs of a frame's number and the drops that were counted when it was labelled."""
    return [Label(frame=number, time=float(number), release=1, dropped=dropped) for number, dropped in frames]


def test_every_frame_is_accounted_for() -> None:
    found = account(labels((1, 0), (2, 0), (4, 1), (6, 1), (7, 1)), failed=[5])
    assert (found.captured, found.labelled, found.failed, found.dropped, found.lost) == (6, 4, 1, 1, 0)


def test_a_frame_that_is_neither_labelled_nor_dropped_is_lost() -> None:
    assert account(labels((1, 0), (2, 0), (5, 0), (6, 0)), failed=[]).lost == 2


def test_a_drop_that_was_counted_before_its_gap_shows_is_not_counted_alone() -> None:
    # Frame 3 was replaced by 4 while 2 was being labelled: the message of 2 counts it already.
    assert account(labels((1, 0), (2, 1)), failed=[]).captured == 1
    assert account(labels((1, 0), (2, 1), (4, 1), (5, 1)), failed=[]).lost == 0


def test_drops_and_failures_before_the_first_label_are_not_of_this_count() -> None:
    found = account(labels((10, 3), (11, 3), (12, 3)), failed=[4, 5])
    assert (found.captured, found.dropped, found.failed, found.lost) == (2, 0, 0, 0)


def test_a_log_is_read_line_by_line_as_it_grows(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = json.dumps({"event": "release_confirmed", "number": 2, "timestamp": "2026-01-01T00:00:01.5Z"})
    log.write_text(f"not JSON\n{line}\n{line[:20]}")
    records = Records(log)
    (found,) = records.events("release_confirmed", number=2)
    assert moment(found) == 1767225601.5
    assert records.events("release_confirmed", number=3) == []
    with log.open("a") as file:
        file.write(f"{line[20:]}\n")
    assert len(records.events("release_confirmed")) == 2
