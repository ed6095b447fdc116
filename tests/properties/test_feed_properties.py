"""The pace of a camera and the paths on standard input, whatever comes and however it comes."""

import os
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.inference.feed import Pace, Problem
from edge_agent.inference.pictures import StdinFeed

gaps = st.lists(st.floats(0, 3), min_size=1, max_size=200)


@given(fps=st.floats(0.1, 100), gaps=gaps)
def test_a_pace_is_never_exceeded(fps: float, gaps: list[float]) -> None:
    pace, now, taken = Pace(fps), 0.0, list[float]()
    for gap in gaps:
        now += gap
        if pace.is_due(now):
            pace.took(now)
            taken.append(now)
    assert taken[0] == gaps[0]
    period_s = 1 / fps
    assert len(taken) <= (taken[-1] - taken[0]) / period_s + 2
    # Of three in a row, the outer two are a period apart: one came early at most, or one late.
    assert all(third - first >= period_s - 1e-9 for first, third in zip(taken, taken[2:], strict=False))


@given(fps=st.floats(0.1, 100), gaps=gaps)
def test_a_frame_that_is_a_period_late_is_always_taken(fps: float, gaps: list[float]) -> None:
    pace, now, last = Pace(fps), 0.0, None
    for gap in gaps:
        now += gap
        due = pace.is_due(now)
        if last is None or now - last >= 1.5 / fps:
            assert due
        if due:
            pace.took(now)
            last = now


names = st.text(
    st.characters(blacklist_characters="\r\n\0", blacklist_categories=["Cs"]), min_size=1, max_size=20
)


@given(paths=st.lists(names.filter(lambda name: not name.startswith("/")), max_size=20), data=st.data())
def test_paths_are_the_same_however_their_bytes_arrive(paths: list[str], data: st.DataObject) -> None:
    separators = [data.draw(st.sampled_from(["\n", "\r\n", "\n\n"])) for _ in paths]
    stream = "".join(f"missing/{path}{end}" for path, end in zip(paths, separators, strict=True)).encode()
    if data.draw(st.booleans()):
        stream = stream.rstrip(b"\r\n")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    reader, writer = os.pipe()
    feed = StdinFeed(reader, Pace(0))
    seen: list[str] = []

    def drain(timeout_s: float) -> None:
        while (item := feed.take(timeout_s)) is not None:
            assert isinstance(item, Problem)
            seen.append(item.name)

    try:
        for start, end in pairwise([0, *cuts, len(stream)]):
            os.write(writer, stream[start:end])
            drain(0)
        os.close(writer)
        drain(10)
    finally:
        feed.close()
        os.close(reader)
    assert feed.ended
    assert seen == [str(Path(f"missing/{path}")) for path in paths]
