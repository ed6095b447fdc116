"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import LEARNING, SHARES, BrokerName, Federation, FinishedRun, MakeFederation, finish


@pytest.fixture
def make_federation(tmp_path: Path) -> Iterator[MakeFederation]:
    """A federation of real processes, ended with the test: ``make_federation("mosquitto")``."""
    made: list[Federation] = []

    def make(broker: BrokerName) -> Federation:
        folder = tmp_path / f"federation-{len(made)}"
        folder.mkdir()
        made.append(Federation(folder, broker))
        return made[-1]

    yield make
    for federation in made:
        federation.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    """What a run gives when nothing goes wrong."""
    federation = Federation(tmp_path_factory.mktemp("undisturbed"), "embedded")
    try:
        for name in SHARES:
            federation.enroll(name)
        server = federation.serve(*LEARNING)
        agents = {name: federation.agent(name, data) for name, data in SHARES.items()}
        yield finish(federation, server, agents)
    finally:
        federation.close()
