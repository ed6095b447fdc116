"""A device that looks at pictures and follows releases, with everything real but the camera; the broker is the test's choice."""

import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from brokers import until
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from memory_link import MemoryBroker, MemoryLink
from release_authority import Authority, Files, key_of

from edge_agent.inference.feed import Feed, Frame, Problem
from edge_agent.inference.loop import InferenceLoop
from edge_agent.inference.sinks import Sink
from edge_agent.releases.follower import Follower
from edge_agent.releases.options import FollowerOptions
from edge_agent.releases.rollout_work import Settings
from edge_agent.releases.slots import Slots
from federation.bundle import Bundle
from federation.errors import ReleaseFault
from federation.wire.link import Link, MakeLink
from federation.wire.messages import ObjectRef
from federation.wire.predictions import ModelState, PredictionMessage
from federation.wire.release import Channel, Release, ReleaseReport, RolloutState
from federation.wire.signing import Purpose, private_key_bytes, unseal
from federation.wire.topics import Topics

AGENT = "pi1"
TOPICS = Topics("garden")
DEADLINE_S = 120.0
FRAME_S = 0.004

DEVICE_KEY = key_of("device")


def bundle_of(authority: Authority, broker: str = "mqtt://127.0.0.1:1") -> Bundle:
    """An identity that pins the authority's keys."""
    return Bundle(
        federation=authority.federation,
        agent=AGENT,
        private_key=private_key_bytes(DEVICE_KEY).hex(),
        aggregator_key=authority.keys[0],
        broker=broker,
        username=AGENT,
        password="secret",
        release_keys=authority.keys,
    )


def options_of(**changes: Any) -> FollowerOptions:
    """Probation of a moment; settings of the state table and of the follower may be mixed."""
    settings: dict[str, Any] = {
        "channel": Channel.STABLE,
        "max_latency_ms": 5000.0,
        "probation_s": 0.1,
        "probation_frames": 5,
        "retry_s": 0.2,
    }
    known = set(settings)
    settings |= {name: value for name, value in changes.items() if name in known}
    others = {name: value for name, value in changes.items() if name not in known}
    return FollowerOptions(Settings(**settings), **others)


class Pictures(Feed):
    """Numbered pictures for ever: none is passed over, so what a swap loses shows."""

    def __init__(self, values: tuple[int, ...] = (20, 230)) -> None:
        self.values = values
        self._number = 0
        self._stopped = threading.Event()

    def start(self) -> None:
        pass

    def take(self, timeout_s: float) -> Frame | Problem | None:
        if self._stopped.wait(min(FRAME_S, timeout_s)):
            return None
        self._number += 1
        value = self.values[self._number % len(self.values)]
        return Frame(name=str(self._number), image=np.full((6, 5), value, np.uint8))

    def stop(self) -> None:
        self._stopped.set()
        self.ended = True

    def close(self) -> None:
        pass


class Collected(Sink):
    """All predictions and problems, in order."""

    def __init__(self) -> None:
        self.predictions: list[PredictionMessage] = []
        self.problems: list[Problem] = []

    def prediction(self, message: PredictionMessage) -> None:
        self.predictions.append(message)

    def problem(self, problem: Problem) -> None:
        self.problems.append(problem)


class Station:
    """A device's inference process without the process.

    Args:
        folder: Its state; another station with the same one is the next life of the device.
        authority: Whose releases it follows.
        make_link: To the broker.
        options: Its settings.
        broker: URL, for a real one.
    """

    def __init__(
        self,
        folder: Path,
        authority: Authority,
        make_link: MakeLink = Link,
        options: FollowerOptions | None = None,
        *,
        broker: str = "mqtt://127.0.0.1:1",
        pictures: Pictures | None = None,
        install: Callable[..., None] | None = None,
    ) -> None:
        self.slots = Slots(folder)
        self.pictures = pictures or Pictures()
        self.seen = Collected()
        sinks: list[Sink] = [self.seen]
        self.loop = InferenceLoop(self.pictures, sinks)
        self.follower = Follower(
            bundle_of(authority, broker),
            self.slots,
            options or options_of(),
            install=install or self.loop.install,
            health=self.loop.health,
            make_link=make_link,
            wall=lambda: authority.issued_at + 1,
        )
        self._thread = threading.Thread(target=self.loop.run, daemon=True)

    def start(self) -> "Station":
        self._thread.start()
        self.follower.start()
        return self

    def stop(self) -> None:
        self.follower.stop()
        self.loop.stop()
        self._thread.join(DEADLINE_S)
        self.slots.close()

    def runs(self, number: int) -> None:
        """Wait until frames are labelled by that release."""
        until(
            lambda: bool(self.seen.predictions) and self.seen.predictions[-1].release == number,
            timeout_s=DEADLINE_S,
            what=f"release {number} labels; {self.seen.problems[-3:]}",
        )

    def numbers(self) -> list[int]:
        """Of the frames that were labelled or failed."""
        names = [message.source for message in self.seen.predictions]
        names += [problem.name for problem in self.seen.problems]
        return sorted(int(name) for name in names)

    def lost(self) -> set[int]:
        """Frames that came after the first label and were neither labelled nor failed."""
        numbers = self.numbers()
        return set(range(numbers[0], numbers[-1] + 1)) - set(numbers)


class Server:
    """The aggregator's side of releases: signs, publishes, listens. Where to is a matter of the subclass.

    Args:
        authority: Signs.
        agent: The device that it listens to.
        key: That device's.
    """

    def __init__(self, authority: Authority, agent: str, key: Ed25519PublicKey) -> None:
        self.authority, self.agent, self.key = authority, agent, key
        self.topics = Topics(authority.federation)

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish, retained."""
        raise NotImplementedError

    def payloads(self, topic: str) -> list[bytes]:
        """All that was published there so far."""
        raise NotImplementedError

    def make(self, number: int, files: Files, **more: Any) -> Release:
        return self.authority.release(number, model=files.model, golden=files.golden, **more)

    def seed(self, release: Release, *, without: Collection[str] = ()) -> None:
        """Put the chunks on the broker, but for those topics."""
        for topic, payload in self.authority.chunks(release):
            if topic not in without:
                self.publish(topic, payload)

    def announce(self, release: Release | None, channel: Channel = Channel.STABLE, **more: Any) -> bytes:
        """Sign and publish the next manifest."""
        envelope = self.authority.sign(self.authority.manifest(release, channel, **more))
        self.publish(self.topics.release(channel.value), envelope)
        return envelope

    def chunk_topics(self, ref: ObjectRef) -> list[str]:
        return [self.topics.object_chunk(ref.sha256, index) for index in range(ref.chunks)]

    def reports(self) -> list[ReleaseReport]:
        """All that the device has said, verified as the aggregator does."""
        return [self._open(payload) for payload in self.payloads(self.topics.release_report(self.agent))]

    def hears(
        self, number: int, state: RolloutState, fault: ReleaseFault | None = None, *, after: int = 0
    ) -> ReleaseReport:
        """Wait for such a report; ``after`` leaves out the first ones."""
        wanted = number, state, fault

        def found() -> list[ReleaseReport]:
            return [report for report in self.reports()[after:] if gist(report) == wanted]

        try:
            until(lambda: bool(found()), timeout_s=DEADLINE_S, what=str(wanted))
        except AssertionError as error:
            raise AssertionError(f"{error}; heard {self.heard()}") from None
        return found()[-1]

    def heard(self) -> list[tuple[int, RolloutState, ReleaseFault | None]]:
        return [gist(report) for report in self.reports()]

    def state(self) -> ModelState | None:
        """What the device shows now; None before it has shown anything."""
        payloads = self.payloads(self.topics.model(self.agent))
        return msgspec.json.decode(payloads[-1], type=ModelState) if payloads else None

    def shows(self, ready: Callable[[ModelState], bool], what: str) -> ModelState:
        """Wait until its state is so."""

        def so() -> bool:
            state = self.state()
            return state is not None and ready(state)

        until(so, timeout_s=DEADLINE_S, what=what)
        state = self.state()
        assert state is not None
        return state

    def _open(self, payload: bytes) -> ReleaseReport:
        return unseal(
            payload,
            ReleaseReport,
            purpose=Purpose.RELEASE_REPORT,
            federation=self.authority.federation,
            sender=self.agent,
            key=self.key,
        )


class MemoryServer(Server):
    """On a broker in memory."""

    def __init__(self, broker: MemoryBroker, authority: Authority) -> None:
        super().__init__(authority, AGENT, DEVICE_KEY.public_key())
        self.broker = broker

    def publish(self, topic: str, payload: bytes) -> None:
        self.broker.route("server", topic, payload, qos=1, retain=True)

    def payloads(self, topic: str) -> list[bytes]:
        return [payload for _, at, payload in list(self.broker.log) if at == topic]

    def link(self) -> MemoryLink:
        """The device's newest."""
        return self.broker.links[-1]


def gist(report: ReleaseReport) -> tuple[int, RolloutState, ReleaseFault | None]:
    return report.number, report.state, report.fault
