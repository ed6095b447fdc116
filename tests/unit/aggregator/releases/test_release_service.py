"""aggregator.releases.service in a real server: manifests and objects on the broker, canaries that widen or halt."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from memory_federation import LIMITS, NAME, TASK, Federation, eventually
from memory_link import ADDRESS, MemoryBroker
from releases import Follower, add_release, in_order, share_between

from aggregator.config import ReleaseConfig
from aggregator.privacy_config import PrivacyConfig
from aggregator.records import StoredVersion
from aggregator.releases import service as release_service
from aggregator.releases.records import ReleaseState, RequestKind, StoredRelease
from aggregator.releases.store import ReleaseStore
from aggregator.service import Service
from federation.errors import ReleaseFault
from federation.release import open_manifest
from federation.wire.inbox import Limits
from federation.wire.messages import ObjectRef
from federation.wire.release import Channel, Manifest, RolloutState
from federation.wire.signing import public_key
from federation.wire.topics import Topics

TOPICS = Topics(NAME)
STEP_S = 0.3
CONFIRMED, REFUSED, ROLLED_BACK = RolloutState.CONFIRMED, RolloutState.REFUSED, RolloutState.ROLLED_BACK


class Rollout:
    """A server without rounds to do, its store of releases as another process sees it, and devices that run models."""

    def __init__(self, folder: Path, broker: MemoryBroker) -> None:
        self.folder, self.broker = folder, broker
        self.federation = Federation(
            folder, broker, 2, up="float32", down="full", privacy=PrivacyConfig(), min_agents=3, count=1
        )
        self.configure(step_s=STEP_S, widen=100.0)
        self.database = self.federation.store()
        self.store = ReleaseStore(self.database)
        self.devices = {name: self.device(name) for name in self.federation.names}
        self.service: Service | None = None

    def configure(self, **settings: float | bool) -> None:
        config = msgspec.structs.replace(ReleaseConfig(), **settings)
        self.federation.config = msgspec.structs.replace(self.federation.config, release=config)

    def device(self, name: str) -> Follower:
        link = self.broker.make_link(ADDRESS, name, on_event=lambda _: None)
        link.start()
        return Follower(self.federation.bundles[name], link)

    def serve(self) -> None:
        self.service, self.ended = self.federation.serve()

    def stop(self) -> None:
        assert self.service is not None
        self.service.stop()
        self.ended.result(40)

    def restart(self) -> None:
        self.stop()
        self.serve()

    def add(self, *, delta: bool = False) -> StoredRelease:
        return add_release(self.store, self.folder, delta=delta)

    def asks(self, kind: RequestKind, number: int | None = None, share: float | None = None) -> str:
        """Ask as a command does, and wait for the answer."""
        request = self.store.request(kind, number, share)
        eventually(lambda: self.store.outcome(request), "the server answers")
        return self.store.outcome(request) or ""

    def says(self, channel: Channel) -> Manifest | None:
        """What a device reads on the broker now: signed with a key that it has pinned."""
        payload = self.broker.retained.get(TOPICS.release(channel.value))
        if payload is None:
            return None
        keys = [public_key(key) for key in self.federation.bundles["pi0"].release_keys]
        return open_manifest(payload, federation=NAME, keys=keys, channel=channel).manifest

    def announced(self, channel: Channel, number: int | None, share: float | None = None) -> Manifest:
        """Wait until a channel names that release, and that share."""

        def said() -> bool:
            manifest = self.says(channel)
            if manifest is None:
                return False
            named = None if manifest.release is None else manifest.release.number
            return named == number and share in (None, manifest.share)

        eventually(said, f"{channel.value} names release {number}")
        manifest = self.says(channel)
        assert manifest is not None
        return manifest

    def state(self, number: int) -> ReleaseState:
        stored = self.store.release(number)
        assert stored is not None
        return stored.state

    def held(self, ref: ObjectRef) -> int:
        """Bytes of an object that the broker holds."""
        topics = [TOPICS.object_chunk(ref.sha256, index) for index in range(ref.chunks)]
        return sum(len(self.broker.retained.get(topic, b"")) for topic in topics)

    def whole(self, row: StoredRelease) -> bool:
        return all(self.held(ref) == ref.length for _, ref in row.objects)

    def refused(self, code: str) -> bool:
        return code in self.database.refusal_counts()

    def close(self) -> None:
        self.federation.close()
        self.database.close()


@pytest.fixture
def rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rollout]:
    monkeypatch.setattr(release_service, "POLL_S", 0.02)
    one = Rollout(tmp_path, MemoryBroker(limits=LIMITS))
    yield one
    one.close()


def begun(rollout: Rollout) -> tuple[StoredRelease, Manifest, Follower, Follower]:
    """A stable release and a canary of another on one of two devices, with the server running."""
    rollout.serve()
    for device in rollout.devices.values():
        device.show()
    rollout.add()
    row = rollout.add(delta=True)
    rollout.asks(RequestKind.STABLE, 1)
    first, second = in_order(NAME, 2, rollout.federation.names)
    share = share_between(NAME, 2, first, second)
    answer = rollout.asks(RequestKind.CANARY, 2, share)
    assert "release 2 goes to" in answer
    manifest = rollout.announced(Channel.CANARY, 2, share)
    return row, manifest, rollout.devices[first], rollout.devices[second]


def test_a_canary_that_every_device_confirms_becomes_the_stable_release(rollout: Rollout) -> None:
    row, manifest, first, second = begun(rollout)
    assert rollout.whole(row), "the objects are there before the manifest that names them"
    assert manifest.release == row.release
    assert manifest.expires_at > time.time() + 80 * 86400
    first.report(manifest, CONFIRMED)
    manifest = rollout.announced(Channel.CANARY, 2, 1.0)
    second.report(manifest, CONFIRMED)
    stable = rollout.announced(Channel.STABLE, 2, 1.0)
    canary = rollout.announced(Channel.CANARY, None)
    assert manifest.version < stable.version < canary.version
    assert [rollout.state(number) for number in (1, 2)] == [ReleaseState.RETIRED, ReleaseState.STABLE]
    assert "2 of 2" in rollout.store.releases()[1].reason


@pytest.mark.parametrize("state", [REFUSED, ROLLED_BACK])
def test_a_canary_that_a_device_gives_up_is_halted_and_the_stable_release_stays(
    rollout: Rollout, state: RolloutState
) -> None:
    row, manifest, first, _ = begun(rollout)
    first.report(manifest, state, ReleaseFault.TOO_SLOW)
    rollout.announced(Channel.CANARY, None, 0.0)
    rollout.announced(Channel.STABLE, 1, 1.0)
    halted = rollout.store.release(2)
    assert halted is not None
    assert halted.state is ReleaseState.HALTED
    assert "1 of 1 devices" in halted.reason
    assert "too_slow 1" in halted.reason
    eventually(lambda: rollout.held(row.release.model) == 0, "its objects are cleared from the broker")


def test_what_a_device_reports_while_the_server_is_away_is_heard_when_it_is_back(rollout: Rollout) -> None:
    _, manifest, first, _ = begun(rollout)
    rollout.stop()
    first.report(manifest, ROLLED_BACK, ReleaseFault.CRASHED)
    rollout.serve()
    rollout.announced(Channel.CANARY, None)
    assert rollout.state(2) is ReleaseState.HALTED


def test_a_failure_that_was_recorded_before_the_server_died_is_acted_upon(rollout: Rollout) -> None:
    """As when it is killed between the report and the decision."""
    _, manifest, first, _ = begun(rollout)
    rollout.stop()
    rollout.store.record_report(first.name, first.says(manifest, ROLLED_BACK, ReleaseFault.CRASHED))
    rollout.serve()
    rollout.announced(Channel.CANARY, None)
    assert rollout.state(2) is ReleaseState.HALTED


def test_a_canary_goes_on_after_a_restart_and_versions_rise(rollout: Rollout) -> None:
    _, manifest, first, second = begun(rollout)
    first.report(manifest, CONFIRMED)
    rollout.announced(Channel.CANARY, 2, 1.0)
    rollout.restart()
    again = rollout.announced(Channel.CANARY, 2, 1.0)
    assert again.version > manifest.version
    second.report(again, CONFIRMED)
    rollout.announced(Channel.STABLE, 2)
    assert rollout.state(2) is ReleaseState.STABLE


def test_a_broker_that_lost_everything_gets_manifests_and_objects_again(rollout: Rollout) -> None:
    row, manifest, first, _ = begun(rollout)
    rollout.broker.crash()
    eventually(lambda: rollout.whole(row), "the objects are there again")
    assert rollout.announced(Channel.CANARY, 2).version == manifest.version
    rollout.announced(Channel.STABLE, 1)
    first.show()
    first.report(manifest, CONFIRMED)
    rollout.announced(Channel.CANARY, 2, 1.0)


Forge = Callable[[Follower, Manifest], None]


def other_key(device: Follower, manifest: Manifest) -> None:
    device.send(device.says(manifest, ROLLED_BACK), Ed25519PrivateKey.generate())


def rubbish(device: Follower, _: Manifest) -> None:
    device.link.publish(device.topics.release_report(device.name), b"\x93rubbish", qos=1, retain=True)


def other_model(device: Follower, manifest: Manifest) -> None:
    device.send(device.says(manifest, ROLLED_BACK, sha256="f" * 64))


def no_such_release(device: Follower, manifest: Manifest) -> None:
    device.send(device.says(manifest, ROLLED_BACK, number=77))


def replayed(device: Follower, manifest: Manifest) -> None:
    device.send(device.says(manifest, CONFIRMED, time=1.0))


def of_an_earlier_life(device: Follower, manifest: Manifest) -> None:
    former = device.session
    device.session = "0" * 16
    device.report(manifest, RolloutState.TESTING)
    device.send(device.says(manifest, ROLLED_BACK, session=former))


def in_anothers_name(device: Follower, manifest: Manifest) -> None:
    device.name = "pi0" if device.name == "pi1" else "pi1"
    device.report(manifest, ROLLED_BACK)


@pytest.mark.parametrize(
    ("forge", "code"),
    [
        (other_key, "bad_signature"),
        (rubbish, "malformed"),
        (other_model, "wrong_hash"),
        (no_such_release, "wrong_hash"),
        (replayed, "duplicate"),
        (of_an_earlier_life, "duplicate"),
        (in_anothers_name, "bad_signature"),
    ],
)
def test_a_report_that_is_not_what_it_says_is_refused_with_a_code(
    rollout: Rollout, forge: Forge, code: str
) -> None:
    _, manifest, first, _ = begun(rollout)
    first.report(manifest, RolloutState.FETCHING)
    eventually(lambda: rollout.store.reports(2), "the honest one is heard")
    forge(first, manifest)
    eventually(lambda: rollout.refused(code), "the other one is refused")
    assert rollout.state(2) is ReleaseState.CANARY, "nothing came of it"


def test_a_device_that_is_not_enrolled_any_more_does_not_count(rollout: Rollout) -> None:
    _, manifest, first, second = begun(rollout)
    rollout.federation.enrolment.revoke(first.name)
    eventually(lambda: first.name not in rollout.store.followers(), "it is forgotten")
    first.report(manifest, ROLLED_BACK)
    manifest = rollout.announced(Channel.CANARY, 2, 1.0)
    second.report(manifest, CONFIRMED)
    rollout.announced(Channel.STABLE, 2)


def test_an_operator_takes_back_a_canary_and_then_the_stable_release(rollout: Rollout) -> None:
    begun(rollout)
    assert "release 2 is taken back" in rollout.asks(RequestKind.ROLLBACK)
    rollout.announced(Channel.CANARY, None)
    assert rollout.state(2) is ReleaseState.WITHDRAWN
    assert "no release before 1" in rollout.asks(RequestKind.ROLLBACK)
    before = rollout.announced(Channel.STABLE, 1)
    rollout.add()
    rollout.asks(RequestKind.STABLE, 3)
    rollout.announced(Channel.STABLE, 3)
    assert "go back to release 1" in rollout.asks(RequestKind.ROLLBACK)
    after = rollout.announced(Channel.STABLE, 1)
    assert after.version > before.version, "devices must not take it for a replay"
    assert [rollout.state(number) for number in (1, 3)] == [ReleaseState.STABLE, ReleaseState.WITHDRAWN]


def test_a_release_that_was_halted_may_be_released_again_and_is_judged_afresh(rollout: Rollout) -> None:
    _, manifest, first, _ = begun(rollout)
    first.report(manifest, REFUSED, ReleaseFault.NO_SPACE)
    rollout.announced(Channel.CANARY, None)
    rollout.asks(RequestKind.CANARY, 2, manifest.share)
    again = rollout.announced(Channel.CANARY, 2, manifest.share)
    first.report(again, CONFIRMED)
    rollout.announced(Channel.CANARY, 2, 1.0)


@pytest.mark.parametrize(
    ("kind", "number", "answer"),
    [
        (RequestKind.CANARY, 9, "there is no release 9"),
        (RequestKind.STABLE, 1, "release 1 is the stable one already"),
        (RequestKind.CANARY, 1, "release 1 is the stable one already"),
        (RequestKind.ROLLBACK, 9, "there is no release 9"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    rollout: Rollout, kind: RequestKind, number: int, answer: str
) -> None:
    begun(rollout)
    before = rollout.says(Channel.STABLE), rollout.says(Channel.CANARY)
    outcome = rollout.asks(kind, number)
    assert outcome.startswith("refused")
    assert answer in outcome
    assert (rollout.says(Channel.STABLE), rollout.says(Channel.CANARY)) == before


def test_a_release_whose_chunks_the_broker_does_not_take_is_not_announced(
    rollout: Rollout, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_run(rollout)
    rollout.add()
    rollout.broker.limits = Limits(max_packet_bytes=1400)
    rollout.store.request(RequestKind.STABLE, 1)
    rollout.serve()
    assert rollout.ended.result(40), "nobody waits for what cannot be"
    assert "release_not_served" in capsys.readouterr().out, "the operator is told"
    assert rollout.says(Channel.STABLE) is None


# --- without rounds -----------------------------------------------------------------------------------------------


def finish_run(rollout: Rollout) -> None:
    """As after the last round of a run."""
    with rollout.federation.store() as store:
        store.open_round(1, 1, ("pi0",), base="0" * 64, encoding="float32", deadline_s=1.0)
        store.close_round(1, 0.1, StoredVersion("0" * 64, "full"))


def test_a_finished_run_announces_what_was_asked_for_and_ends(rollout: Rollout) -> None:
    finish_run(rollout)
    row = rollout.add()
    request = rollout.store.request(RequestKind.STABLE, 1)
    rollout.serve()
    assert rollout.ended.result(40)
    assert rollout.store.outcome(request) == "release 1 goes to all devices"
    assert rollout.whole(row)
    rollout.announced(Channel.STABLE, 1)


def test_a_finished_run_without_releases_ends_as_ever(rollout: Rollout) -> None:
    finish_run(rollout)
    rollout.serve()
    assert rollout.ended.result(40)
    assert rollout.says(Channel.STABLE) is None


def test_with_stay_a_finished_run_is_served_until_it_is_stopped(rollout: Rollout) -> None:
    finish_run(rollout)
    rollout.configure(step_s=STEP_S, widen=100.0, stay=True)
    _, manifest, first, second = begun(rollout)
    first.report(manifest, CONFIRMED)
    second.report(rollout.announced(Channel.CANARY, 2, 1.0), CONFIRMED)
    rollout.announced(Channel.STABLE, 2)
    assert not rollout.ended.done()
    rollout.stop()
    assert rollout.ended.result(0), "its run is finished all the same"


def test_a_release_that_is_made_at_the_end_of_a_run_is_announced_before_the_server_ends(
    rollout: Rollout,
) -> None:
    finish_run(rollout)

    def make(number: int) -> str:
        with rollout.federation.store() as database:
            store = ReleaseStore(database)
            row = add_release(store, rollout.folder)
            store.request(RequestKind.STABLE, row.number)
        return f"release {row.number} of round {number}"

    config, federation = rollout.federation.config, rollout.federation
    for _ in range(2):
        with federation.store() as database:
            database.lock()
            service = Service(
                config,
                database,
                federation.enrolment,
                TASK,
                ADDRESS,
                make_link=rollout.broker.make_link,
                make_release=make,
            )
            assert service.run()
        assert len(rollout.store.releases()) == 1, "once, however often the server is started"
        rollout.announced(Channel.STABLE, 1)
