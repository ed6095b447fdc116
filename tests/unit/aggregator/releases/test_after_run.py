"""aggregator.releases.after_run: a release is made of a run's last model once, whatever happens to the server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aggregator.releases.after_run import AfterRun, Made
from aggregator.store import Store
from federation.errors import VerificationError


class Run:
    """A finished run whose server may be started again."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder, "home", create=True)
        self.work: list[Callable[[], object]] = []
        self.made: list[int] = []
        self.fault = ""

    def make(self, number: int) -> str:
        self.made.append(number)
        if self.fault:
            raise VerificationError(self.fault)
        return f"release of round {number}"

    def server(self, *, auto: bool = True) -> AfterRun:
        self.work.clear()
        return AfterRun(self.store, self.work.append, self.make if auto else None)

    def finishes(self, server: AfterRun) -> None:
        while self.work:
            done = self.work.pop()()
            assert isinstance(done, Made)
            server.made(done)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    one = Run(tmp_path)
    yield one
    one.store.close()


def test_it_is_made_once_for_a_round(run: Run) -> None:
    server = run.server()
    server.finished(3)
    server.finished(3)
    assert len(run.work) == 1
    run.finishes(server)
    assert not server.busy
    server.finished(3)
    again = run.server()
    again.finished(3)
    assert not again.busy
    assert run.made == [3]
    again.finished(5)  # rounds.count was raised
    run.finishes(again)
    assert run.made == [3, 5]


def test_a_server_that_dies_meanwhile_leaves_it_to_the_next(run: Run) -> None:
    run.server().finished(3)
    again = run.server()
    again.finished(3)
    run.finishes(again)
    assert run.made == [3]


def test_what_failed_is_tried_again_by_the_next_server(run: Run) -> None:
    run.fault = "no pictures"
    server = run.server()
    server.finished(3)
    run.finishes(server)
    assert not server.busy
    run.fault = ""
    again = run.server()
    again.finished(3)
    run.finishes(again)
    assert run.made == [3, 3]


@pytest.mark.parametrize(("auto", "number"), [(False, 3), (True, 0)])
def test_without_the_setting_or_a_round_there_is_nothing_to_do(run: Run, auto: bool, number: int) -> None:
    server = run.server(auto=auto)
    server.finished(number)
    assert not server.busy
    assert run.work == []
