"""Rounds of real processes over a link that is slow, loses packets and stands still: TCP really retransmits.

Needs root, network namespaces and TUN devices; skipped elsewhere.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.store import Store
from aggregator.traffic import TrafficLog
from benchmarks.bad_link import SERVER_ADDRESS, BadLink, Quality, missing
from benchmarks.fleets import Fleet, Run
from benchmarks.processes import Child, Children
from federation.wire.messages import Traffic

pytestmark = [pytest.mark.network, pytest.mark.skipif(bool(missing()), reason=missing() or "it can be made")]

WHOLE = {"up_encoding": "float32", "down_encoding": "full"}
"""What moves most: small messages would hide how chunks fare."""

DIGITS = "digits@iid,agent=1/5"
STALL_S = 20.0
PATIENCE_S = 240.0


@pytest.fixture
def link() -> Iterator[BadLink]:
    with BadLink(Quality(bits_s=1e6, round_trip_s=0.05, loss=0.01)) as made:
        yield made


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path / "logs") as made:
        yield made


def logged(child: Child, event: str) -> bool:
    lines = (line for line in child.log.read_text().splitlines() if line.startswith("{"))
    return any(record["event"] == event for record in map(json.loads, lines))


def begin(children: Children, folder: Path, link: BadLink, rounds: int) -> tuple[Fleet, Child, Child]:
    """A server at one end and a device at the other, with a model of 400 KB."""
    run = Run("cnn", "digits", rounds, 1, train={"max_steps": 1}, settings=WHOLE)
    fleet = Fleet(
        children,
        folder,
        run,
        host=SERVER_ADDRESS,
        server_prefix=link.server,
        agent_prefix=link.device,
        telemetry_s=3600,
    )
    (agent,) = fleet.join([DIGITS])
    return fleet, fleet.serve(), agent


def moved(fleet: Fleet, number: int) -> Traffic:
    """What the device has moved for a round, as it tells."""
    with Store(fleet.state) as store:
        return next(e.moved for e in TrafficLog(store).read() if (e.round, e.agent) == (number, "agent-1"))


def test_rounds_over_a_slow_link_that_loses_packets_send_no_chunk_twice(
    children: Children, tmp_path: Path, link: BadLink
) -> None:
    fleet, server, _ = begin(children, tmp_path / "fleet", link, rounds=2)
    update = fleet.finish(server, PATIENCE_S)[-1].updates["agent-1"].bytes
    assert link.counts()["up_lost_packets"] > 0, "the link was as bad as it was meant to be"
    traffic = moved(fleet, 2)
    assert update < traffic.sent_bytes < 1.05 * update, "the update and small messages, nothing twice"
    assert update < traffic.received_bytes < 1.05 * update, "the model is as long as the update"


def test_a_round_goes_on_after_the_link_stood_still(
    children: Children, tmp_path: Path, link: BadLink
) -> None:
    fleet, server, agent = begin(children, tmp_path / "fleet", link, rounds=1)
    children.until(lambda: logged(agent, "update_offered"), PATIENCE_S, "the device offers its update")
    link.stall(STALL_S)
    (done,) = fleet.finish(server, PATIENCE_S)
    assert done.seconds > STALL_S, "it stood still in the middle of the delivery"
    update = done.updates["agent-1"].bytes
    assert moved(fleet, 1).sent_payload_bytes < 2 * update, (
        "some chunks were asked for again, not all of them"
    )
