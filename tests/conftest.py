"""Fixtures for all tests: real brokers, and the folder with the real data sets where there is one."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import structlog
from brokers import Broker, Certificates, Kind, Relay, make_certificates

BROKERS: dict[str, tuple[Kind, Literal[0, 3, 5]]] = {
    "mosquitto-5": ("mosquitto", 5),
    "mosquitto-3.1.1": ("mosquitto", 3),
    "nats": ("nats", 0),
}

MakeBroker = Callable[..., Broker]


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """A command that was run in this process has set a level, which the next test's captured log would lack."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[MakeBroker]:
    """Start a broker: ``make_broker("mosquitto", accounts={…})``, see :class:`brokers.Broker`. Ended by itself."""
    started: list[Broker] = []

    def make(kind: Kind, **options: Any) -> Broker:
        broker = Broker(kind, tmp_path / f"broker-{len(started)}", **options)
        started.append(broker)
        broker.start()
        return broker

    yield make
    for broker in started:
        broker.stop()


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, make_broker: MakeBroker) -> Broker:
    """Each supported broker in turn, open to everybody."""
    kind, version = BROKERS[request.param]
    return make_broker(kind, version=version)


@pytest.fixture(params=["mosquitto", "nats"])
def broker_kind(request: pytest.FixtureRequest) -> Kind:
    """Each broker program in turn, for tests that configure it themselves."""
    kind: Kind = request.param
    return kind


@pytest.fixture
def make_relay() -> Iterator[Callable[[Broker], Relay]]:
    """Put a network that can be cut in front of a broker."""
    made: list[Relay] = []

    def make(broker: Broker) -> Relay:
        made.append(Relay(broker.port))
        return made[-1]

    yield make
    for relay in made:
        relay.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The authority that the test brokers' certificates come from."""
    return make_certificates(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def foreign_certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Another authority, which nobody has signed anything for."""
    return make_certificates(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="session")
def fedge_data() -> Path | None:
    """The folder with the real data sets (``FEDGE_DATA``), or None: then use ``digits``, which needs no files."""
    folder = os.environ.get("FEDGE_DATA")
    return Path(folder) if folder and Path(folder).is_dir() else None
