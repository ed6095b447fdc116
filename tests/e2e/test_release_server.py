"""Releases through real brokers from a real `aggregator serve`: it is killed with -9 at every point, and the broker too."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from processes import TINY_TASK, BrokerName, Federation, MakeFederation, Process, begin_tiny_run
from releases import Follower, add_release, in_order, share_between

from aggregator.releases.records import ReleaseState, RequestKind, StoredRelease
from aggregator.releases.store import ReleaseStore
from aggregator.store import Store
from federation.bundle import Bundle, address
from federation.errors import ReleaseFault
from federation.release import open_manifest
from federation.wire.link import Connected, Inbox, Link, Message
from federation.wire.release import Channel, Manifest, ReleaseReport, RolloutState
from federation.wire.signing import public_key
from federation.wire.transfer import check_chunk

PATIENCE_S = 120.0

SETTINGS = (
    *("--set", "release.step_s=0.5", "--set", "release.widen=100.0"),
    *("--set", "rounds.min_agents=9", "--log-format", "json"),
)
"""Rounds never begin: there is nobody to train."""

CONFIRMED, ROLLED_BACK = RolloutState.CONFIRMED, RolloutState.ROLLED_BACK


class Device(Follower):
    """A device with a link of its own, and with the rights of a device."""

    def __init__(self, bundle: Bundle) -> None:
        self._inbox = Inbox()
        link = Link(address(bundle), f"{bundle.agent}-infer", on_event=self._inbox.put, retry_max_s=0.3)
        super().__init__(bundle, link)
        self._keys = [public_key(key) for key in bundle.release_keys]
        self.connects = 0
        self.heard: dict[str, bytes] = {}
        self._last: ReleaseReport | None = None
        link.start()

    def send(self, report: ReleaseReport, key: Ed25519PrivateKey | None = None) -> None:
        self._last = report
        super().send(report, key)

    def step(self) -> None:
        match self._inbox.get(0.02):
            case Connected():
                self.connects += 1
                self.heard.clear()
                self.link.subscribe([(self.topics.releases, 1), (self.topics.objects, 1)])
                self.show()
                if self._last is not None:  # the broker may have lost it, as a real device knows
                    self.send(self._last)
            case Message(topic=topic, payload=payload):
                self.heard[topic] = payload
            case _:
                pass

    def until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert time.monotonic() < deadline, f"{self.name} never saw: {what}"
            self.step()

    def reads(self, channel: Channel) -> Manifest | None:
        payload = self.heard.get(self.topics.release(channel.value))
        if payload is None:
            return None
        return open_manifest(
            payload, federation=self.topics.federation, keys=self._keys, channel=channel
        ).manifest

    def reads_release(self, channel: Channel, number: int | None, share: float | None = None) -> Manifest:
        """Wait until a channel names that release, and that share."""

        def said() -> bool:
            manifest = self.reads(channel)
            named = None if manifest is None or manifest.release is None else manifest.release.number
            return manifest is not None and named == number and share in (None, manifest.share)

        self.until(said, f"{channel.value} names release {number}")
        manifest = self.reads(channel)
        assert manifest is not None
        return manifest

    def holds(self, row: StoredRelease) -> bool:
        """Whether every chunk of a release has come, and is right."""
        for path, ref in row.objects:
            for index in range(ref.chunks):
                payload = self.heard.get(self.topics.object_chunk(ref.sha256, index))
                if not payload:
                    return False
                check_chunk(ref, index, payload)
            assert path.stat().st_size == ref.length
        return True


class Field:
    """A federation with a release on all devices and another on the first of two."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        begin_tiny_run(federation.state)
        self.database = Store(federation.state)
        self.store = ReleaseStore(self.database)
        bundles = [federation.enroll(name) for name in ("pi1", "pi2")]
        self.rows = [add_release(self.store, federation.folder) for _ in range(2)]
        names = in_order("fleet", 2, ["pi1", "pi2"])
        self.share = share_between("fleet", 2, *names)
        self.store.request(RequestKind.STABLE, 1)
        self.server = self.serve()
        self.devices = {bundle.agent: Device(bundle) for bundle in bundles}
        self.first, self.second = (self.devices[name] for name in names)

    def serve(self, environment: dict[str, str] | None = None) -> Process:
        self.server = self.federation.serve(*TINY_TASK, *SETTINGS, environment=environment)
        return self.server

    def begun(self) -> Manifest:
        """Begin the canary once both devices are known; wait until it is announced and its objects are there."""
        for device in self.devices.values():
            device.until(lambda: device.name in self.store.followers(), "the server knows it")  # noqa: B023 - used at once
        self.store.request(RequestKind.CANARY, 2, self.share)
        manifest = self.first.reads_release(Channel.CANARY, 2, self.share)
        self.first.until(lambda: all(map(self.first.holds, self.rows)), "the objects")
        return manifest

    def state(self, number: int) -> ReleaseState:
        row = self.store.release(number)
        assert row is not None
        return row.state

    def close(self) -> None:
        for device in self.devices.values():
            device.link.stop()
        self.database.close()


@pytest.fixture
def in_field(make_federation: MakeFederation) -> Iterator[Callable[[BrokerName], Field]]:
    fields: list[Field] = []

    def make(broker: BrokerName) -> Field:
        fields.append(Field(make_federation(broker)))
        return fields[-1]

    yield make
    for field in fields:
        field.close()


@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize("broker", ["mosquitto", "embedded"])
def test_a_canary_outlives_kills_of_its_server_and_becomes_stable(
    in_field: Callable[[BrokerName], Field], broker: BrokerName
) -> None:
    field = in_field(broker)
    manifest = field.begun()
    field.server.kill()
    field.serve()
    field.server.until_logged("canary_resumed", release=2)
    field.first.report(manifest, CONFIRMED)
    widened = field.first.reads_release(Channel.CANARY, 2, 1.0)
    assert widened.version > manifest.version
    field.server.kill()
    field.serve()
    field.server.until_logged("broker_connected")
    second = field.second.reads_release(Channel.CANARY, 2, 1.0)
    field.second.report(second, CONFIRMED)
    stable = field.first.reads_release(Channel.STABLE, 2)
    assert field.first.reads_release(Channel.CANARY, None).version > stable.version > second.version
    field.first.until(lambda: field.state(2) is ReleaseState.STABLE, "it is stable")


def dies_in_the_store(folder: Path, step: str) -> dict[str, str]:
    """Environment of a server that is killed just before it takes this step of halting a canary."""
    decided = "self.release(2).state.value == 'halted'"
    condition = "any(hasattr(one, 'reason') for one in arguments[0])" if step == "carry_out" else decided
    place = folder / f"before-{step}"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from aggregator.releases.store import ReleaseStore\n"
        f"whole = ReleaseStore.{step}\n"
        "def step(self, *arguments):\n"
        f"    if {condition}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(self, *arguments)\n"
        f"ReleaseStore.{step} = step\n"
    )
    return {"PYTHONPATH": str(place)}


@pytest.mark.network
@pytest.mark.timeout(600)
def test_a_server_that_dies_at_any_step_of_halting_a_canary_halts_it_once(
    in_field: Callable[[BrokerName], Field],
) -> None:
    field = in_field("mosquitto")
    manifest = field.begun()
    field.server.kill()
    field.first.report(manifest, ROLLED_BACK, ReleaseFault.WRONG_ANSWER)  # nobody is there to hear it
    field.first.link.flush(PATIENCE_S)
    for step, state in (
        ("carry_out", ReleaseState.CANARY),
        ("next_manifest_version", ReleaseState.HALTED),
        ("record_manifest", ReleaseState.HALTED),
    ):
        server = field.serve(dies_in_the_store(field.federation.folder, step))
        assert server.wait() == -9, f"killed before {step}"
        assert field.state(2) is state
    field.serve()
    empty = field.first.reads_release(Channel.CANARY, None)
    assert empty.version > manifest.version
    assert "wrong_answer 1" in field.store.releases()[1].reason
    halts = [process.logged("canary_halted") for process in field.federation.processes]
    assert sum(map(len, halts)) == 1, "decided once"
    assert field.state(1) is ReleaseState.STABLE


@pytest.mark.network
@pytest.mark.timeout(600)
def test_a_broker_that_was_killed_gets_manifests_and_objects_again(
    in_field: Callable[[BrokerName], Field],
) -> None:
    field = in_field("mosquitto")
    manifest = field.begun()
    broker = field.federation.mosquitto
    assert broker is not None
    before = field.first.connects
    broker.kill()
    broker.start()
    field.first.until(lambda: field.first.connects > before, "the broker again")
    assert field.first.reads_release(Channel.CANARY, 2).version == manifest.version
    field.first.until(lambda: all(map(field.first.holds, field.rows)), "the objects again")
    field.first.report(manifest, CONFIRMED)
    field.first.reads_release(Channel.CANARY, 2, 1.0)
