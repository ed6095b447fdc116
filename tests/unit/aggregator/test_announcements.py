"""What everybody hears, and when it is said again."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from memory_link import MemoryBroker

from aggregator.announcements import PLAN_REPEAT_S, Announcements
from federation.wire.address import BrokerAddress
from federation.wire.inbox import Message
from federation.wire.messages import STATE_INTERVAL_S, IdlePlan
from federation.wire.topics import Topics

TOPICS = Topics("garden")
PLAN = IdlePlan(run="0" * 16, round=3, finished=False, reason="waiting", issued_at=0.0)


def test_a_plan_is_said_twice_and_the_state_from_time_to_time() -> None:
    broker, heard = MemoryBroker(), list[str]()

    def listen(event: object) -> None:
        if isinstance(event, Message):
            heard.append(event.topic)

    address = BrokerAddress.parse("mqtt://127.0.0.1:1")
    link = broker.make_link(address, "aggregator", on_event=lambda _: None)
    listener = broker.make_link(address, "listener", on_event=listen)
    for each in (link, listener):
        each.start()
        each.wait_connected(5.0)
    listener.subscribe([(TOPICS.plan, 1), (TOPICS.aggregator, 1)])
    said = Announcements(TOPICS, Ed25519PrivateKey.generate(), "0" * 16)

    said.refresh(link, 0.0)
    said.plan(PLAN, link, 0.0)
    assert heard == [TOPICS.aggregator, TOPICS.plan]
    assert said.due == PLAN_REPEAT_S
    said.refresh(link, PLAN_REPEAT_S)
    assert heard[2:] == [TOPICS.plan]
    assert said.due == STATE_INTERVAL_S
    said.refresh(link, STATE_INTERVAL_S)
    assert heard[3:] == [TOPICS.aggregator]
    for each in (link, listener):
        each.stop()
