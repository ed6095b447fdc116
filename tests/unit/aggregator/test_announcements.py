"""What everybody hears, and when it is said again."""

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from memory_link import ADDRESS, MemoryBroker, MemoryLink

from aggregator.announcements import PLAN_REPEAT_S, Announcements
from federation.wire.inbox import Message
from federation.wire.messages import STATE_INTERVAL_S, FullModel, IdlePlan, RoundPlan, TaskSpec, TrainSpec
from federation.wire.topics import Topics
from federation.wire.transfer import make_ref

TOPICS = Topics("garden")
PLAN = IdlePlan(run="0" * 16, round=3, finished=False, reason="waiting", issued_at=0.0)
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))


def plan_from(base: str) -> RoundPlan:
    """The plan of a round that starts from that version."""
    return RoundPlan(
        run="0" * 16,
        round=1,
        attempt=1,
        task=TASK,
        train=TrainSpec(),
        base=base,
        full=FullModel(version=base, object=make_ref(b"model" * 20, 64)),
        deltas=(),
        up_encoding="sq:16",
        max_noise=0.0,
        cohort=("pi1",),
        deadline_s=1.0,
        issued_at=0.0,
        upload_chunk_bytes=64,
    )


def started(broker: MemoryBroker, on_event: Callable[[object], None] = lambda _: None) -> MemoryLink:
    link = broker.make_link(ADDRESS, "anybody", on_event=on_event)
    link.start()
    link.wait_connected(5.0)
    return link


def test_a_plan_is_held_back_until_the_broker_has_all_that_leads_to_its_model() -> None:
    link = started(MemoryBroker())
    said = Announcements(TOPICS, Ed25519PrivateKey.generate(), "0" * 16)
    said.hold(plan_from("a" * 64))
    said.model_present("b" * 64, link, 0.0)
    assert not link.broker.log, "that was the model of an earlier plan"
    said.hold(plan_from("b" * 64))
    said.model_present("a" * 64, link, 0.0)
    assert not link.broker.log, "and this one is not held any more"
    said.model_present("b" * 64, link, 0.0)
    said.model_present("b" * 64, link, 0.0)
    assert [topic for _, topic, _ in link.broker.log] == [TOPICS.plan], "it was published, and once"


def test_an_idle_plan_takes_the_place_of_one_that_is_held_back() -> None:
    link = started(MemoryBroker())
    said = Announcements(TOPICS, Ed25519PrivateKey.generate(), "0" * 16)
    said.hold(plan_from("a" * 64))
    said.plan(PLAN, link, 0.0)
    said.model_present("a" * 64, link, 0.0)
    assert len(link.broker.log) == 1


def test_a_plan_is_said_twice_and_the_state_from_time_to_time() -> None:
    broker, heard = MemoryBroker(), list[str]()

    def listen(event: object) -> None:
        if isinstance(event, Message):
            heard.append(event.topic)

    link, listener = started(broker), started(broker, listen)
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
