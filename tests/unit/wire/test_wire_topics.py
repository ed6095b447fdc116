"""federation.wire.topics: what is built is parsed, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.wire.topics import AgentTopic, Topics, is_name

names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
indices = st.integers(0, 4095)
HOME = Topics("home")
HASH = "0123456789abcdef" * 4


@given(federation=names, agent=names, sha256=hashes, index=indices)
def test_what_is_built_is_parsed(federation: str, agent: str, sha256: str, index: int) -> None:
    topics = Topics(federation)
    built = {
        topics.state(agent): AgentTopic(agent, "state"),
        topics.telemetry(agent): AgentTopic(agent, "telemetry"),
        topics.offer(agent): AgentTopic(agent, "offer"),
        topics.credit(agent): AgentTopic(agent, "credit"),
        topics.receipt(agent): AgentTopic(agent, "receipt"),
        topics.upload_chunk(agent, sha256, index): AgentTopic(agent, "chunk", sha256, index),
    }
    for topic, parsed in built.items():
        assert topics.parse_agent(topic) == parsed
        assert topics.parse_object_chunk(topic) is None
    chunk = topics.object_chunk(sha256, index)
    assert topics.parse_object_chunk(chunk) == (sha256, index)
    assert topics.parse_agent(chunk) is None
    for topic in [*built, chunk, topics.plan, topics.aggregator, topics.predictions(agent), topics.up(agent)]:
        assert topic.count("/") <= 7, "AWS IoT takes no more"


@given(st.text())
def test_any_other_text_parses_to_nothing(text: str) -> None:
    for topic in (text, f"{HOME.prefix}/{text}", f"{HOME.prefix}/agent/pi1/{text}"):
        parsed = HOME.parse_agent(topic)
        if parsed is not None:
            assert topic in (
                HOME.state("pi1"),
                HOME.telemetry("pi1"),
                HOME.offer("pi1"),
                HOME.credit("pi1"),
                HOME.receipt("pi1"),
            )
        assert HOME.parse_object_chunk(topic) is None


@pytest.mark.parametrize(
    "topic",
    [
        "fedge/1/home/agent/pi1",
        "fedge/1/home/agent/pi1/",
        "fedge/1/home/agent//state",
        "fedge/1/home/agent/PI1/state",
        "fedge/1/home/agent/../state",
        "fedge/1/home/agent/pi1\n/state",
        f"fedge/1/home/agent/{'a' * 64}/state",
        "fedge/1/home/agent/pi1/state/",
        "fedge/1/home/agent/pi1/up/offer/x",
        f"fedge/1/home/agent/pi1/up/{HASH}",
        f"fedge/1/home/agent/pi1/up/{HASH}/-1",
        f"fedge/1/home/agent/pi1/up/{HASH}/01",
        f"fedge/1/home/agent/pi1/up/{HASH}/1000000",
        f"fedge/1/home/agent/pi1/up/{HASH}/٣",
        f"fedge/1/home/agent/pi1/up/{HASH.upper()}/1",
        f"fedge/1/home/agent/pi1/up/{HASH[:-1]}/1",
        "fedge/1/homestead/agent/pi1/state",
        "fedge/1/away/agent/pi1/state",
        "fedge/2/home/agent/pi1/state",
        f"fedge/1/home/object/{HASH}/1/2",
        f"fedge/1/home/object/{HASH}/",
        f"fedge/1/home/object/../{HASH}/1",
        "",
        "#",
        "+/+/+",
    ],
)
def test_hostile_topics_parse_to_nothing(topic: str) -> None:
    assert HOME.parse_agent(topic) is None
    assert HOME.parse_object_chunk(topic) is None


@pytest.mark.parametrize("name", ["", "-a", "_a", "A", "a b", "a/b", "a+", "ä", "a\n", "a" * 64, "a.b"])
def test_a_bad_federation_name_is_refused(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(ValueError, match="federation name"):
        Topics(name)
