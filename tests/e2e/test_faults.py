"""Kill -9, silence and full disks in the middle of rounds: nothing is lost, nothing counts twice."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import psutil
import pytest
from brokers import Relay
from devices import CHUNK_BYTES, Device, frame, noise
from processes import (
    LEARNING,
    PATIENCE_S,
    SHARES,
    TINY_SHAPES,
    TINY_TASK,
    WHOLE_RUN_S,
    BrokerName,
    Federation,
    FinishedRun,
    MakeFederation,
    Process,
    Tensors,
    begin_tiny_run,
    dies_before,
    same_bits,
    wrong_clock,
)

from federation.errors import Rejection
from federation.wire.link import BrokerAddress
from federation.wire.messages import Receipt, RoundPlan, UpdateOffer
from federation.wire.transfer import chunk_span

pytestmark = pytest.mark.network

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

NAMES = ("a", "b", "c")
LARGE_SHAPES: Shapes = {"weight": (100, 100)}
"""About 40 chunks: several windows of credit, so that an upload can be cut in its middle."""

SMALL = 1e-4
"""Of a real agent's model, made-up updates may change so little that it can go on learning."""

TEN_YEARS_S = 10 * 365 * 86400

both_brokers = pytest.mark.parametrize("broker", ["embedded", "mosquitto"])


def serving(rounds: int, *more: object) -> tuple[object, ...]:
    return (
        *TINY_TASK,
        *("--rounds", rounds, "--min-agents", 2, "--cohort-size", 3, "--deadline", 120),
        *("--up-encoding", "float32"),  # what devices without a codec write; deltas go down in the default
        *("--set", "rounds.gather_s=600", "--set", f"broker.chunk_bytes={CHUNK_BYTES}"),
        *more,
    )


@contextmanager
def devices_of(federation: Federation, names: tuple[str, ...] = NAMES) -> Iterator[dict[str, Device]]:
    """Devices that have announced themselves; enrolled where they were not yet."""
    bundles = {name: federation.enrolment_of(name) for name in names}
    made: dict[str, Device] = {}
    try:
        for name, bundle in bundles.items():
            made[name] = Device(bundle)
        for device in made.values():
            device.connected()
        yield made
    finally:
        for device in made.values():
            device.stop()


def deliver(device: Device, plan: RoundPlan, shapes: Shapes = TINY_SHAPES, *, scale: float = 1.0) -> Receipt:
    delta = noise(shapes, device.name, plan.round)
    data = frame({name: np.multiply(array, scale, dtype=np.float32) for name, array in delta.items()})
    # Unequal weights: an update that counted twice, or for another, would show in the model.
    return device.deliver(device.offer(plan, data, samples=10 + ord(device.name)), data)


# --- the aggregator dies ----------------------------------------------------------------------------------------

KILL_POINTS = (
    "between updates",
    "in mid-upload",
    "with the last chunk",
    "after the last receipt",
    "at the next plan",
)
FOLD_POINTS = ("write_delta", "write_checkpoint", "close_round")
"""What the fold does with the store, in this order: the aggregator dies just before it."""

ROUNDS = len(KILL_POINTS) + len(FOLD_POINTS) + 1
"""One for each point; a last one is left in peace."""


def play(federation: Federation, *, kill: bool) -> Tensors:
    """A run of made-up updates, its aggregator killed at each of the points or at none; the last model."""
    begin_tiny_run(federation.state)
    options = serving(ROUNDS)
    for name in NAMES:
        federation.enroll(name)
    server = federation.serve(*options)
    server.until_logged("broker_connected")
    with devices_of(federation) as devices:
        for number in range(1, ROUNDS + 1):
            point = (*KILL_POINTS, *FOLD_POINTS, "")[number - 1] if kill else ""

            def die(here: str, point: str = point) -> None:
                nonlocal server
                if here == point:
                    server.kill()
                    server = federation.serve(*options)

            plans = {name: device.in_round(number) for name, device in devices.items()}
            die("at the next plan")
            if point in FOLD_POINTS:
                server.kill()
                server = federation.serve(*options, environment=dies_before(federation.folder, point))
            assert deliver(devices["a"], plans["a"]).accepted
            die("between updates")
            assert deliver(devices["b"], plans["b"]).accepted
            c, data = devices["c"], frame(noise(TINY_SHAPES, "c", number))
            offer = c.offer(plans["c"], data, samples=10 + ord("c"))
            chunks = c.offer_until_asked(offer).chunks
            for index in chunks[:2]:
                c.send_chunk(offer, data, index)
            die("in mid-upload")
            for index in chunks[2:]:
                c.send_chunk(offer, data, index)
            die("with the last chunk")
            if point in FOLD_POINTS:
                assert until_dead(server, c, offer, data) == -signal.SIGKILL, server.tail
                row = federation.round(number)
                assert row is not None
                assert (row.phase, row.delivered) == ("folding", 3)
                server = federation.serve(*options)
            receipt = c.deliver(offer, data)
            # The round may have been closed, with this update, before its receipt was sent and lost.
            assert receipt.accepted or (kill and receipt.code is Rejection.STALE_ROUND)
            die("after the last receipt")
            federation.until_closed(number)
        assert not server.imports("libtorch"), "an aggregator that evaluates nothing needs no torch"
        assert server.wait() == 0
    rows = federation.report().rounds
    assert [(row.round, row.attempt, row.delivered) for row in rows] == [
        (number, 1, 3) for number in range(1, ROUNDS + 1)
    ]
    return federation.tensors(len(rows))


def until_dead(server: Process, device: Device, offer: UpdateOffer, data: bytes) -> int:
    """Send what is asked for until the server dies of it; its exit code."""

    def dead() -> bool:
        while device.asked:
            for index in device.asked.popleft().chunks:
                device.send_chunk(offer, data, index)
        return not server.alive()

    device.until(dead, "the end of the server", PATIENCE_S)
    return server.wait()


@both_brokers
def test_an_aggregator_killed_at_any_point_goes_on_with_the_same_round(
    broker: BrokerName, make_federation: MakeFederation
) -> None:
    disturbed = play(make_federation(broker), kill=True)
    assert same_bits(disturbed, play(make_federation(broker), kill=False))


# --- the broker dies --------------------------------------------------------------------------------------------


@both_brokers
def test_a_broker_killed_in_mid_upload_loses_nothing(
    broker: BrokerName, make_federation: MakeFederation
) -> None:
    federation = make_federation(broker)
    begin_tiny_run(federation.state, LARGE_SHAPES)
    for name in (*NAMES, "late"):
        federation.enroll(name)
    federation.serve(*serving(1)).until_logged("broker_connected")
    with devices_of(federation) as devices:
        a = devices["a"]
        plan = a.in_round(1)
        data = frame(noise(LARGE_SHAPES, "a", 1))
        offer = a.offer(plan, data, samples=10 + ord("a"))
        a.send_offer(offer)
        sent = a.credit(offer).chunks
        for index in sent:
            a.send_chunk(offer, data, index)
        until_written(federation, "a", offer, data, sent)
        connects = {name: device.connects for name, device in devices.items()}
        kill_broker(federation)
        for device in devices.values():
            device.reconnected(connects[device.name])
        # Whatever was asked before the loss came before the new connection: the next credit knows what is on the disk.
        a.asked.clear()
        again = a.offer_until_asked(offer).chunks
        assert set(sent).isdisjoint(again), "what has arrived is not asked for again"
        for name, device in devices.items():
            assert deliver(device, device.in_round(1), LARGE_SHAPES).accepted
            if name == "a":
                assert_a_newcomer_finds_plan_and_model(federation, plan)
        federation.until_closed(1)
    assert federation.delivered(1) == len(NAMES)


def until_written(
    federation: Federation, agent: str, offer: UpdateOffer, data: bytes, indices: tuple[int, ...]
) -> None:
    """Wait until these chunks are on the aggregator's disk: no credit tells that, a single chunk may bring the next."""
    upload = federation.state / "incoming" / f"{agent}-{offer.object.sha256}"

    def written() -> bool:
        there = upload.read_bytes()
        spans = (chunk_span(offer.object, index) for index in indices)
        return all(there[start : start + length] == data[start : start + length] for start, length in spans)

    federation.until(written, f"chunks {indices} of {agent} are written")


def kill_broker(federation: Federation) -> None:
    """Kill -9, and back again: mosquitto by us, the embedded one by its aggregator."""
    if federation.mosquitto is not None:
        federation.mosquitto.kill()
        federation.mosquitto.start()
        return
    (server,) = (process for process in federation.processes if process.alive())
    (broker,) = psutil.Process(server.pid).children()
    broker.kill()
    server.until_logged("broker_died")


def assert_a_newcomer_finds_plan_and_model(federation: Federation, plan: RoundPlan) -> None:
    late = Device(federation.enrolment_of("late"), announce=False).connected()
    try:
        assert late.in_round(1) == plan
        assert (
            late.fetch(plan.full.object)
            == (federation.state / "checkpoints/round-000000.safetensors").read_bytes()
        )
    finally:
        late.stop()


# --- real agents ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(WHOLE_RUN_S)
def test_real_agents_survive_every_kind_of_kill_with_the_same_bits(
    undisturbed: FinishedRun, make_federation: MakeFederation
) -> None:
    federation = make_federation("mosquitto")
    for name in SHARES:
        federation.enroll(name)
    assert federation.mosquitto is not None
    server = federation.serve(*LEARNING)
    agents = {name: federation.agent(name, data) for name, data in SHARES.items()}

    # Round 1: an agent dies in mid-training, and trains again.
    victim = agents["agent-1"]
    victim.until_logged("training_started", round=1)
    victim.kill()
    assert not victim.logged("model_trained")
    agents["agent-1"] = federation.agent("agent-1", SHARES["agent-1"])

    # Round 2: the aggregator dies with two of three updates in.
    slow = agents["agent-3"]
    slow.until_logged("training_started", round=2)
    slow.pause()
    assert not slow.logged("model_trained", round=2)
    federation.until(lambda: federation.delivered(2) == 2, "two have delivered")
    server.kill()
    server = federation.serve(*LEARNING)
    server.until_logged("round_resumed", round=2, delivered=2)
    slow.go_on()

    # Round 3: the broker dies, and an agent with its update written but not yet received.
    mute = agents["agent-2"]
    mute.until_logged("training_started", round=3)
    server.pause()
    mute.until_logged("model_trained", round=3)
    outbox = federation.bundles["agent-2"].with_name("agent-2.state") / "outbox" / "offer"
    federation.until(outbox.exists, "the update is written")
    mute.kill()
    federation.mosquitto.kill()
    federation.mosquitto.start()
    server.go_on()
    agents["agent-2"] = federation.agent("agent-2", SHARES["agent-2"])

    server.until_logged("run_finished")
    assert server.wait() == 0
    heir = agents["agent-2"]
    heir.until_logged("update_accepted")
    assert not heir.logged("training_started"), "the update that lay in the outbox was delivered"
    assert [agent.terminate() for agent in agents.values()] == [0, 0, 0]
    rows = federation.report().rounds
    assert [(row.phase, row.attempt, row.delivered) for row in rows] == [("closed", 1, 3)] * 3
    for number in (1, 2, 3):
        assert same_bits(federation.tensors(number), undisturbed.federation.tensors(number)), (
            f"round {number}"
        )


# --- somebody never comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["vanished", "silent"])
def test_a_round_does_not_wait_for_an_agent_that_never_comes_back(
    gone: str, make_federation: MakeFederation
) -> None:
    federation = make_federation("embedded")
    begin_tiny_run(federation.state)
    bundles = {name: federation.enroll(name) for name in NAMES}
    # Vanished: the grace ends the wait long before the deadline. Silent but connected: only the deadline does.
    patience = (
        ("--deadline", 600, "--set", "rounds.grace_s=0.5")
        if gone == "vanished"
        else ("--deadline", 2, "--set", "rounds.grace_s=600")
    )
    federation.serve(*serving(1, *patience)).until_logged("broker_connected")
    relay = Relay(federation.port)
    through_relay = BrokerAddress.parse(
        federation.url.replace(str(federation.port), str(relay.port)),
        username=bundles["c"].username,
        password=bundles["c"].password,
    )
    lost = Device(bundles["c"], where=through_relay).connected()
    with devices_of(federation, ("a", "b")) as devices:
        lost.in_round(1)
        if gone == "vanished":
            relay.close()
        for device in devices.values():
            assert deliver(device, device.in_round(1)).accepted
        federation.until_closed(1)
    row = federation.round(1)
    assert row is not None
    assert (row.delivered, row.cohort, row.attempt) == (2, 3, 1)
    lost.stop()
    if gone == "silent":
        relay.close()


def test_a_round_without_its_quorum_is_extended_and_goes_on_with_a_replacement(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation("embedded")
    begin_tiny_run(federation.state)
    for name in ("a", "b", "replacement"):
        federation.enroll(name)
    options = serving(1, "--cohort-size", 2, "--deadline", 1, "--set", "rounds.grace_s=0.5")
    server = federation.serve(*options)
    server.until_logged("broker_connected")
    with devices_of(federation, ("a",)) as one:
        with devices_of(federation, ("b",)) as other:
            plan = one["a"].in_round(1)
            other["b"].in_round(1)
        # b has said goodbye. a delivers; its work is kept through any number of extensions.
        assert deliver(one["a"], plan).accepted
        server.until_logged("round_extended", round=1)
        assert federation.delivered(1) == 1
        with devices_of(federation, ("replacement",)) as new:
            replacement = new["replacement"]
            replacement.until(
                lambda: isinstance(replacement.plan, RoundPlan) and "replacement" in replacement.plan.cohort,
                "it is invited",
            )
            data = frame(noise(TINY_SHAPES, "replacement", 1))
            assert replacement.deliver(replacement.offer(plan, data), data).accepted
            federation.until_closed(1)
    row = federation.round(1)
    assert row is not None
    assert row.delivered == 2
    assert row.attempt > 1


# --- a clock that is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_s", [-TEN_YEARS_S, +TEN_YEARS_S], ids=["jumps ahead", "jumps back"])
def test_a_clock_that_jumps_by_twenty_years_neither_ends_nor_prolongs_a_round(
    first_s: int, make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation("embedded")
    begin_tiny_run(federation.state)
    for name in NAMES:
        federation.enroll(name)
    options = serving(1, "--deadline", 3, "--set", "rounds.grace_s=600")
    server = federation.serve(*options, environment=wrong_clock(tmp_path, first_s))
    server.until_logged("broker_connected")
    with devices_of(federation) as devices:
        plan = devices["a"].in_round(1)
        assert deliver(devices["a"], plan).accepted
        server.kill()
        federation.serve(*options, environment=wrong_clock(tmp_path, -first_s))
        assert deliver(devices["b"], plan).accepted
        # c is silent: the deadline must come in its time, by whatever clock it was written down.
        federation.until_closed(1)
    assert federation.delivered(1) == 2


# --- full disks -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Use up all but nothing of it; delete the file to make room again."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        block = bytes(4096)
        try:
            while file.write(block):
                pass
        except OSError:
            os.fsync(file.fileno())
    return ballast


def test_an_aggregator_with_a_full_disk_says_so_and_goes_on_later(
    small_disk: Path, make_federation: MakeFederation
) -> None:
    federation = make_federation("mosquitto")
    begin_tiny_run(federation.state, LARGE_SHAPES)
    for name in NAMES:
        federation.enroll(name)
    state = small_disk / "state"
    subprocess.run(["cp", "-a", str(federation.state), str(state)], check=True)
    federation.state = state
    server = federation.serve(*serving(1))
    server.until_logged("broker_connected")
    with devices_of(federation) as devices:
        plan = devices["a"].in_round(1)
        assert deliver(devices["a"], plan, LARGE_SHAPES).accepted
        ballast = fill(small_disk)
        b = devices["b"]
        data = frame(noise(LARGE_SHAPES, "b", 1))
        offer = b.offer(plan, data, samples=10 + ord("b"))
        b.send_offer(offer)
        assert until_dead(server, b, offer, data) == 2
        last = server.text.splitlines()[-1]
        # Whichever comes first: the update's file, or a commit of the database.
        assert last.startswith(("error: no space left on the disk that holds", "error: cannot write")), last
        assert str(state) in last
        assert "free" in last, "the remedy"
        assert "Traceback" not in server.text
        ballast.unlink()
        federation.serve(*serving(1)).until_logged("round_resumed", round=1, delivered=1)
        for name in ("b", "c"):
            assert deliver(devices[name], plan, LARGE_SHAPES).accepted
        federation.until_closed(1)
    assert federation.delivered(1) == 3


def test_an_agent_with_a_full_disk_declines_and_takes_part_again_when_there_is_room(
    small_disk: Path, make_federation: MakeFederation
) -> None:
    federation = make_federation("embedded")
    for name in ("full", "a", "b"):
        federation.enroll(name)
    server = federation.serve(
        *("--data", "digits", "--rounds", 2, "--min-agents", 2, "--cohort-size", 3, "--deadline", 300),
        *("--set", "rounds.gather_s=600", "--up-encoding", "float32"),
    )
    ballast = fill(small_disk)
    agent = federation.agent("full", "digits@iid,agent=1/3", "--state", small_disk)
    server.until_logged("broker_connected")
    shapes = {name: array.shape for name, array in federation.tensors(0).items()}
    with devices_of(federation, ("a", "b")) as devices:
        assert deliver(devices["a"], devices["a"].in_round(1), shapes, scale=SMALL).accepted
        agent.until_logged("round_declined", round=1)
        assert "no space left" in agent.logged("round_declined", round=1)[0]["reason"]
        ballast.unlink()
        assert deliver(devices["b"], devices["b"].in_round(1), shapes, scale=SMALL).accepted
        federation.until_closed(1)
        assert federation.delivered(1) == 2
        for device in devices.values():
            assert deliver(device, device.in_round(2), shapes, scale=SMALL).accepted
        federation.until_closed(2)
    assert federation.delivered(2) == 3
    assert agent.terminate() == 0
