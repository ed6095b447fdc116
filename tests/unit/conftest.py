"""Fixtures of the unit tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_federation import LIMITS, Federation, Start
from memory_link import MemoryBroker, Weather

from aggregator.privacy_config import PrivacyConfig


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Start]:
    started: list[Federation] = []

    def start(
        agents: int = 3,
        *,
        weather: Weather | None = None,
        seed: int = 0,
        up: str = "float32",
        down: str = "full",
        privacy: PrivacyConfig | None = None,
        **rounds: float,
    ) -> Federation:
        broker = MemoryBroker(weather or Weather(), LIMITS, seed)
        started.append(
            Federation(
                tmp_path / f"memory-{len(started)}",
                broker,
                agents,
                up=up,
                down=down,
                privacy=privacy or PrivacyConfig(),
                **rounds,
            )
        )
        return started[-1]

    yield start
    for one in started:
        one.close()
