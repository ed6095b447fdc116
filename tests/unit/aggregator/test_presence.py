"""aggregator.presence: who is online, whatever the order in which a broker delivers births and deaths."""

from pathlib import Path

import pytest
from msgspec import structs

from aggregator.presence import Presence
from aggregator.rounds import AgentOffline, AgentOnline
from aggregator.store import Store
from federation.wire.messages import AgentState, Capabilities, encode_json

ABLE = Capabilities(
    version="0", device="cpu", threads=1, memory_mb=1, samples=1, encodings=("sq",), platform="test"
)
SESSION = "0" * 16
BIRTH = encode_json(AgentState(state="online", session=SESSION, capabilities=ABLE))
DEATH = encode_json(AgentState(state="offline", session=SESSION))


def presence_of(tmp_path: Path, encoding: str) -> Presence:
    return Presence(
        store=Store(tmp_path / "state", "home", create=True),
        enrolled=lambda _: True,
        encoding=encoding,
        on_gone=lambda _: None,
        on_back=lambda _: None,
    )


@pytest.fixture
def presence(tmp_path: Path) -> Presence:
    return presence_of(tmp_path, "sq:16")


def test_who_cannot_mask_is_not_invited_to_masked_rounds(tmp_path: Path) -> None:
    presence = presence_of(tmp_path, "masked:16")
    assert presence.state("pi1", BIRTH, retained=False) == [AgentOffline("pi1")]
    able = structs.replace(ABLE, encodings=("sq", "masked"))
    birth = encode_json(AgentState(state="online", session=SESSION, capabilities=able))
    assert presence.state("pi2", birth, retained=False) == [AgentOnline("pi2")]


def test_a_retained_birth_that_comes_after_its_death_is_stale(presence: Presence) -> None:
    assert presence.state("pi1", BIRTH, retained=False) == [AgentOnline("pi1")]
    assert presence.state("pi1", DEATH, retained=False) == [AgentOffline("pi1")]
    assert presence.state("pi1", BIRTH, retained=True) == []


def test_even_if_the_birth_was_never_heard_live(presence: Presence) -> None:
    assert presence.state("pi1", DEATH, retained=False) == []
    assert presence.state("pi1", BIRTH, retained=True) == []


def test_an_agent_whose_will_has_fired_comes_back_in_the_same_session(presence: Presence) -> None:
    presence.state("pi1", BIRTH, retained=False)
    presence.state("pi1", DEATH, retained=False)
    assert presence.state("pi1", BIRTH, retained=False) == [AgentOnline("pi1")]


def test_after_a_reconnect_the_broker_knows_better(presence: Presence) -> None:
    presence.state("pi1", BIRTH, retained=False)
    presence.state("pi1", DEATH, retained=False)
    presence.connected()
    assert presence.state("pi1", BIRTH, retained=True) == [AgentOnline("pi1")]
