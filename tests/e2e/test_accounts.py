"""What an enrolled device may and may not do, on both brokers with the files that the enrolment writes for them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fleets import TOPICS, Served, child, mosquitto_served, nats_served

from federation.bundle import address, write_bundle
from federation.errors import BrokerRefusedError
from federation.wire.link import Disconnected, Message

pytestmark = pytest.mark.network


@pytest.fixture(params=[nats_served, mosquitto_served], ids=["nats", "mosquitto"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    yield from request.param(tmp_path)


def test_an_agent_writes_its_own_branch_only(served: Served) -> None:
    served.enroll("a")
    b = served.client(served.enroll("b"), "b").connected()
    aggregator = served.aggregator()
    forbidden = [
        TOPICS.plan,
        TOPICS.aggregator,
        TOPICS.object_chunk("0" * 64, 0),
        TOPICS.offer("a"),
        TOPICS.state("a"),
        TOPICS.telemetry("a"),
        TOPICS.predictions("a"),
        TOPICS.receipt("b"),
        f"{TOPICS.prefix}/release/stable",
        f"{TOPICS.prefix}/agent/b/anything",
        "fedge/1/other/agent/b/up/offer",
        "$MQTT/msgs/fedge/1/fleet/plan",
    ]
    allowed = [TOPICS.state("b"), TOPICS.telemetry("b"), TOPICS.predictions("b"), TOPICS.offer("b")]
    for qos in (0, 1):
        for topic in (*forbidden, *allowed):
            assert b.link.publish(topic, b"by b", qos=qos, retain=topic.endswith(("state", "plan")))
    b.link.publish(TOPICS.offer("b"), b"last")
    aggregator.hears(TOPICS.offer("b"), b"last")
    by_b = {
        event.topic for event in aggregator.heard if isinstance(event, Message) and event.payload == b"by b"
    }
    assert by_b == set(allowed)


def test_an_agent_reads_what_is_for_all_and_its_own_branch_only(served: Served) -> None:
    served.enroll("a")
    bundle = served.enroll("b")
    aggregator = served.aggregator()
    chunk = TOPICS.object_chunk("0" * 64, 0)
    aggregator.link.publish(TOPICS.plan, b"first", retain=True)
    aggregator.link.publish(chunk, b"chunk", retain=True)
    aggregator.link.publish(TOPICS.state("a"), b"birth of a", retain=True)
    aggregator.hears(TOPICS.state("a"), b"birth of a")
    b = served.client(bundle, "b").connected()
    spied = [
        TOPICS.down("a"),
        TOPICS.up("a"),
        TOPICS.down("+"),
        TOPICS.state("a"),
        TOPICS.everything,
        "#",
        "$MQTT/#",
    ]
    for filter_ in spied:
        b.link.subscribe([(filter_, 1)])
    b.link.subscribe([(TOPICS.down("b"), 1), (TOPICS.state("b"), 1), (chunk, 0), (TOPICS.plan, 1)])
    b.hears(TOPICS.plan, b"first")
    b.hears(chunk, b"chunk")
    aggregator.link.publish(TOPICS.credit("a"), b"secret")
    aggregator.link.publish(TOPICS.credit("b"), b"for b")
    aggregator.link.publish(TOPICS.plan, b"last", retain=True)
    b.hears(TOPICS.credit("b"), b"for b")
    b.hears(TOPICS.plan, b"last")
    aggregator.hears(TOPICS.credit("a"), b"secret")
    assert b.topics() <= {TOPICS.plan, TOPICS.credit("b"), chunk, TOPICS.aggregator}


VICTIM = """
import sys
from pathlib import Path
from federation.bundle import address, read_bundle
from federation import logs
from federation.wire.link import Inbox, Link, Will
logs.configure()
path, topic = Path(sys.argv[1]), sys.argv[2]
link = Link(address(read_bundle(path)), "victim", on_event=Inbox().put, will=Will(topic, b"dead"), will_delay_s=0)
link.start()
link.wait_connected(30)
print("up", flush=True)
sys.stdin.read()
"""


def test_an_agents_will_reaches_the_aggregator_and_a_forged_one_does_not(
    served: Served, tmp_path: Path
) -> None:
    served.enroll("a")
    path = tmp_path / "b.json"
    write_bundle(path, served.enroll("b"))
    aggregator = served.aggregator()
    for topic in (TOPICS.state("a"), TOPICS.state("b")):
        with child(VICTIM, path, topic) as victim:
            victim.kill()
    aggregator.hears(TOPICS.state("b"), b"dead")
    assert TOPICS.state("a") not in aggregator.topics()


def test_a_wrong_password_or_user_is_refused(served: Served) -> None:
    where = address(served.enroll("a"))
    _, password = served.enrolment.aggregator_account()
    for wrong in (
        replace(where, password="guess"),
        replace(where, password=None, username=None),
        replace(where, username="b"),
        replace(where, password=password),
    ):
        with pytest.raises(BrokerRefusedError):
            served.client(wrong, "a").connected()
    served.client(where, "a").connected()


def test_an_enrolment_drops_nobody_and_a_replaced_or_revoked_bundle_is_void_at_once(served: Served) -> None:
    aggregator = served.aggregator()
    bundles = {name: served.enroll(name) for name in ("a", "b", "c")}
    clients = {name: served.client(bundle, name).connected() for name, bundle in bundles.items()}
    served.client(served.enroll("d"), "d").connected()
    renewed = served.enroll("a", again=True)
    served.enrolment.revoke("b")
    served.reload()
    for name in ("a", "b"):
        clients[name].wait(lambda item: isinstance(item, Disconnected) and item.refused, "thrown out")
    served.client(renewed, "a-again").connected()
    clients["c"].link.publish(TOPICS.offer("c"), b"still here")
    aggregator.hears(TOPICS.offer("c"), b"still here")
    for client in (aggregator, clients["c"]):
        assert not [item for item in client.heard if isinstance(item, Disconnected)]


def test_a_message_of_the_largest_size_passes(served: Served) -> None:
    aggregator = served.aggregator()
    topic = TOPICS.object_chunk("0" * 64, 0)
    overhead = 1 + 4 + 2 + len(topic) + 2  # fixed header, length, topic length, topic, packet id
    payload = bytes((1 << 20) - overhead - 1)  # one byte of empty properties in MQTT 5
    assert aggregator.link.publish(topic, payload, retain=True)
    aggregator.hears(topic, payload)
    late = served.client(served.aggregator_address(), "late").connected()
    late.link.subscribe([(topic, 0)])
    assert late.hears(topic, payload).retain
    assert not [item for item in aggregator.heard if isinstance(item, Disconnected)]
