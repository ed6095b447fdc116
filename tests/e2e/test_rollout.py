"""Releases over real brokers to a real `edge-agent infer`: signed manifests and chunks come from the test itself."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brokers import until
from fleets import Served, gone, mosquitto_served, nats_served
from inferring import CONFIG, PATIENCE_S, BrokerServer, Inferring, identity
from PIL import Image
from processes import MakeFederation
from release_authority import (
    DAY_S,
    REQUIREMENTS,
    Authority,
    Files,
    broken,
    enormous,
    good,
    key_of,
    misshapen,
    mistaken,
    not_finite,
    padded,
    pictures,
)

from edge_agent.releases.slots import Slots
from federation.bundle import write_bundle
from federation.errors import ReleaseFault
from federation.task.model_delta import make_delta
from federation.wire.messages import decode_json
from federation.wire.predictions import PredictionMessage
from federation.wire.release import Requirements, RolloutState

CONFIRMED, REFUSED = RolloutState.CONFIRMED, RolloutState.REFUSED

BROKERS: dict[str, Callable[[Path], Iterator[Served]]] = {"nats": nats_served, "mosquitto": mosquitto_served}


@pytest.fixture(params=BROKERS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    yield from BROKERS[request.param](tmp_path / "state")


@pytest.fixture
def on_mosquitto(tmp_path: Path) -> Iterator[Served]:
    yield from mosquitto_served(tmp_path / "state")


class Field:
    """A device in the field and the one who signs its releases."""

    def __init__(self, folder: Path, served: Served) -> None:
        self.folder = folder
        self.authority = Authority("fleet", issued_at=time.time())
        self.bundle = identity(served, self.authority)
        self.server = BrokerServer(served, self.authority, self.bundle)
        self.lives: list[Inferring] = []

    def start(self, config: str = CONFIG) -> Inferring:
        self.lives.append(Inferring(self.folder, self.bundle, config))
        return self.lives[-1]

    def release(self, number: int, files: Files) -> None:
        """Publish one as stable."""
        release = self.server.make(number, files)
        self.server.seed(release)
        self.server.announce(release)

    def close(self) -> None:
        for life in self.lives:
            if life.popen.poll() is None:
                life.kill()
            print(life.tail())  # noqa: T201 - pytest shows it with a failure


MakeField = Callable[[Served], Field]


@pytest.fixture
def make_field(tmp_path: Path) -> Iterator[MakeField]:
    made: list[Field] = []

    def make(served: Served) -> Field:
        made.append(Field(tmp_path, served))
        return made[-1]

    yield make
    for field in made:
        field.close()


def test_releases_take_over_between_two_frames_and_none_is_lost(
    served: Served, make_field: MakeField, tmp_path: Path
) -> None:
    field = make_field(served)
    server = field.server
    device = field.start()
    server.shows(lambda state: "no model" in state.state, "a device without a model says so")
    first_files, second_files = good(tmp_path, 1), good(tmp_path, 2)
    first = server.make(1, first_files)
    server.seed(first)
    server.announce(first)
    server.hears(1, CONFIRMED)
    delta = make_delta(first_files.model, second_files.model)
    second = server.make(2, second_files, delta=(first.model.sha256, delta))
    server.seed(second, without=server.chunk_topics(second.model))
    server.announce(second)
    server.hears(2, CONFIRMED)
    server.announce(first)
    report = server.hears(1, CONFIRMED, after=len(server.reports()))
    assert report.running == 1
    device.labels_on()
    assert device.finish() == 0, device.tail()
    assert device.labelled == device.fed
    assert device.failed == 0
    assert not device.logged("link_fault"), "the account's rights are enough"
    state = server.shows(lambda state: not state.online, "the goodbye")
    assert state.installed_version == "1"
    predictions = [
        decode_json(payload, PredictionMessage)
        for payload in server.payloads(server.topics.predictions(server.agent))
    ]
    assert {prediction.release for prediction in predictions} == {1, 2}


def test_whatever_is_wrong_with_a_release_the_current_one_runs_on_and_the_fault_is_told(
    on_mosquitto: Served, make_field: MakeField, tmp_path: Path
) -> None:
    field = make_field(on_mosquitto)
    server, authority = field.server, field.authority
    first = server.make(1, good(tmp_path, 1))
    server.seed(first)
    server.announce(first)
    device = field.start()
    server.hears(1, CONFIRMED)
    stable = server.topics.release("stable")
    second = server.make(2, good(tmp_path, 2))
    server.seed(second)

    # What no pinned key has signed for this federation.
    envelope = authority.sign(authority.manifest(second))
    forged = {
        ReleaseFault.MALFORMED: envelope[:-1],
        ReleaseFault.WRONG_FEDERATION: authority.sign(authority.manifest(second), federation="other"),
        ReleaseFault.BAD_SIGNATURE: authority.sign(authority.manifest(second), key=key_of("stranger")),
    }
    for fault, payload in forged.items():
        server.publish(stable, payload)
        server.shows(lambda state, fault=fault: fault.value in state.state, fault.value)  # type: ignore[misc]
    tampered = bytearray(envelope)
    tampered[len(tampered) // 2] ^= 1
    server.publish(stable, bytes(tampered))

    # What was signed, and is not to be taken up.
    server.announce(second, lifetime_s=-DAY_S)
    server.hears(2, REFUSED, ReleaseFault.EXPIRED)
    server.announce(server.make(22, good(tmp_path, 22)), version=1)
    server.hears(22, REFUSED, ReleaseFault.DOWNGRADE)
    authority.version = 100
    future = Requirements(opset=900, ir_version=10, min_runtime="1.18", card_format="1")
    server.announce(server.make(3, good(tmp_path, 3), requirements=future))
    server.hears(3, REFUSED, ReleaseFault.INCOMPATIBLE)
    assert future != REQUIREMENTS

    # What was signed in good faith, and does not work here.
    bad = {
        ReleaseFault.BROKEN: broken,
        ReleaseFault.WRONG_SHAPE: misshapen,
        ReleaseFault.NON_FINITE: not_finite,
        ReleaseFault.WRONG_ANSWER: mistaken,
        ReleaseFault.TOO_BIG: enormous,
    }
    for number, (fault, make) in enumerate(bad.items(), start=4):
        field.release(number, make(tmp_path))
        assert server.hears(number, REFUSED, fault).running == 1
    field.release(20, broken(tmp_path))
    server.hears(20, REFUSED, ReleaseFault.QUARANTINED)

    device.labels_on()
    state = server.shows(lambda state: not state.in_progress, "idle")
    assert state.installed_version == "1"
    field.release(21, good(tmp_path, 21))
    server.hears(21, CONFIRMED)
    assert device.finish() == 0, device.tail()
    assert device.labelled == device.fed
    assert device.failed == 0


PADDING = 300_000
"""Some hundred chunks: enough to be interrupted in the middle."""


def test_a_download_goes_on_after_a_broker_that_was_killed_and_a_device_that_was(
    served: Served, make_field: MakeField, tmp_path: Path
) -> None:
    field = make_field(served)
    server = field.server
    release = server.make(1, padded(tmp_path, 1, PADDING), chunk_bytes=4096)
    topics = server.chunk_topics(release.model)
    late = set(topics[len(topics) // 2 :])
    server.seed(release, without=late)
    server.announce(release)
    device = field.start()
    device.until_logged("release_fetching")
    part = device.models / "parts" / f"{release.model.sha256}.part"
    here = part_of(part, len(topics) // 2 * 4096)
    until(here, timeout_s=PATIENCE_S, what="half of the model")
    device.kill()
    device = field.start()
    device.until_logged("release_fetching")
    served.restart()
    server.reconnect()
    server.seed(release, without=set(topics) - late)
    server.announce(release)
    server.hears(1, CONFIRMED)
    device.labels_on()


def part_of(part: Path, size: int) -> Callable[[], bool]:
    """Whether the first so many bytes of a file are there; the last chunk of them is not all zeros."""

    def there() -> bool:
        if not part.exists():
            return False
        with part.open("rb") as file:
            file.seek(size - 4096)
            return any(file.read(4096))

    return there


KILLS = 8


def test_kill_9_at_any_moment_of_a_rollout_leaves_a_device_that_starts_with_a_good_model(
    on_mosquitto: Served, make_field: MakeField, tmp_path: Path
) -> None:
    field = make_field(on_mosquitto)
    server = field.server
    files = [good(tmp_path, number) for number in range(KILLS + 2)]
    releases = [server.make(number + 1, one) for number, one in enumerate(files)]
    server.seed(releases[0])
    server.announce(releases[0])
    device = field.start()
    server.hears(1, CONFIRMED)
    draws = random.Random(5)
    hashes = {release.model.sha256 for release in releases}
    for release in releases[1:-1]:
        server.seed(release)
        server.announce(release)
        until_moment(device, draws)
        device.kill()
        with Slots(device.models) as slots:
            assert slots.current is not None
            slots.check(slots.current)
            assert slots.current.sha256 in hashes
            assert slots.quarantined(slots.current.sha256) is None
        device = field.start()
        device.labels_on(2)
    server.seed(releases[-1])
    server.announce(releases[-1])
    server.hears(releases[-1].number, CONFIRMED)
    assert device.terminate() == 0, device.tail()


def until_moment(device: Inferring, draws: random.Random) -> None:
    """Wait for one of the steps of a rollout, chosen at random, and perhaps a moment longer."""
    device.until_logged(
        draws.choice(["release_fetching", "object_fetched", "release_testing", "release_activated"])
    )
    time.sleep(draws.choice([0.0, 0.0, 0.01, 0.05, 0.2]))  # waits for nothing: another moment each time


def test_an_agent_that_trains_labels_frames_in_a_process_of_its_own(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation("mosquitto")
    assert federation.mosquitto is not None
    served = Served(federation.enrolment, federation.url, federation.mosquitto.reload)
    field = Field(tmp_path, served)
    federation.bundles[field.bundle.agent] = tmp_path / "trainer.bundle.json"
    write_bundle(tmp_path / "trainer.bundle.json", field.bundle)
    config = tmp_path / "trainer.toml"
    config.write_text(CONFIG.replace('source = "-"', 'source = "frames"'))
    source = tmp_path / "frames"
    source.mkdir()
    for number in range(2000):
        Image.fromarray(pictures()[number % 2]).save(source / f"{number:04d}.png")
    field.release(1, good(tmp_path, 1))
    agent = federation.agent(field.bundle.agent, "digits", "--source", source, "--config", config)
    try:
        agent.until_logged("release_activated")
        agent.until_logged("inference_source_ended")
        # Both processes connect; from then on the agent hears SIGTERM.
        agent.until(lambda: len(agent.logged("broker_connected")) > 1, "the agent's own connection")
        (child,) = agent.logged("inference_started")
        assert child["pid"] != agent.pid
        assert gone(int(child["pid"]))
        assert agent.terminate() == 0
    finally:
        served.close()
