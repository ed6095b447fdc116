"""federation.logs: progress is told now and then."""

from federation.logs import Sparingly


def test_the_first_line_comes_after_an_interval_and_then_one_each() -> None:
    telling = Sparingly(10.0)
    told = [now for now in range(100, 145) if telling.due(float(now))]
    assert told == [110, 120, 130, 140]


def test_rare_events_are_each_told_and_a_new_beginning_waits_again() -> None:
    telling = Sparingly(10.0)
    assert [now for now in (0, 49, 98, 147) if telling.due(float(now))] == [49, 98, 147]
    telling.restart()
    assert not telling.due(500.0)
    assert telling.due(510.0)
