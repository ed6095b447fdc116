"""Fixtures of the end-to-end tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import BrokerName, Federation

MakeFederation = Callable[[BrokerName], Federation]


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
