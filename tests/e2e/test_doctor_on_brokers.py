"""The doctor against real brokers with the accounts and rights that an enrolment makes."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from brokers import Kind, free_port
from fleets import TOPICS, Client, Served, mosquitto_served, nats_served

from edge_agent.broker_checks import CHECKS, examine_broker
from edge_agent.findings import Finding, Level
from federation.bundle import Bundle
from federation.errors import ExitCode
from federation.wire.inbox import Message
from federation.wire.messages import AggregatorState, IdlePlan, encode_json
from federation.wire.signing import AGGREGATOR, Purpose, seal

RUN = "0123456789abcdef"


@pytest.fixture
def served(broker_kind: Kind, tmp_path: Path) -> Iterator[Served]:
    yield from (mosquitto_served if broker_kind == "mosquitto" else nats_served)(tmp_path)


def announce(served: Served) -> Client:
    """Publish what an aggregator that serves does, and listen to everything."""
    server = served.client(served.aggregator_address(), "aggregator").connected()
    server.link.subscribe([(TOPICS.everything, 1)])
    state = encode_json(AggregatorState(state="online", session=RUN, run=RUN, time=time.time()))
    plan = seal(
        IdlePlan(run=RUN, round=0, finished=False, reason="waiting", issued_at=0.0),
        purpose=Purpose.PLAN,
        federation=TOPICS.federation,
        sender=AGGREGATOR,
        key=served.enrolment.aggregator_key(),
    )
    server.link.publish(TOPICS.aggregator, state, retain=True)
    server.link.publish(TOPICS.plan, plan, retain=True)
    server.hears(TOPICS.plan, plan)
    return server


def examined(bundle: Bundle) -> dict[str, Finding]:
    findings = {finding.check: finding for finding in examine_broker(bundle)}
    assert tuple(findings) == CHECKS
    return findings


def test_a_healthy_device_passes_and_nobody_notices(served: Served) -> None:
    bundle = served.enroll("pi1")
    server = announce(served)
    findings = examined(bundle)
    assert {finding.level for finding in findings.values()} == {Level.OK}, findings
    server.link.publish(TOPICS.down("pi1").replace("#", "end"), b"")
    server.wait(lambda event: isinstance(event, Message) and event.topic.endswith("/down/end"), "the end")
    assert not any("/agent/pi1/" in topic and not topic.endswith("/end") for topic in server.topics())


def test_a_wrong_password_ends_the_examination_at_the_login(served: Served) -> None:
    bundle = served.enroll("pi1")
    announce(served)
    findings = examined(msgspec.structs.replace(bundle, password="wrong"))
    assert findings["login"].failed
    assert findings["login"].exit_code is ExitCode.BROKER
    assert "enroll" in findings["login"].remedy
    assert {findings[check].level for check in CHECKS[3:]} == {Level.SKIP}


def test_a_silent_broker_is_a_warning_since_an_agent_would_wait(served: Served) -> None:
    findings = examined(served.enroll("pi1"))
    assert (findings["aggregator"].level, findings["plan"].level) == (Level.WARN, Level.WARN)
    assert "aggregator serve" in findings["aggregator"].remedy


def test_nobody_listens_and_a_name_that_does_not_exist(served: Served) -> None:
    bundle = served.enroll("pi1")
    closed = examined(msgspec.structs.replace(bundle, broker=f"mqtt://127.0.0.1:{free_port()}"))
    assert closed["network"].failed
    assert "no broker listens there" in closed["network"].found + closed["network"].remedy
    unknown = examined(msgspec.structs.replace(bundle, broker="mqtt://broker.invalid"))
    assert unknown["name"].failed
    assert {unknown[check].level for check in CHECKS[1:]} == {Level.SKIP}
