"""The thread that follows releases: between the link, the state table (``rollout``) and what carries out its commands.

The loop over the frames never waits for this thread, and goes on with the model that it has, whatever happens here:
without a broker, with a full disk, even if this thread fails.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from edge_agent.inference.health import Health
from edge_agent.releases.announcer import Announcer, farewell, is_farewell
from edge_agent.releases.installer import TEST_END_S, Install, Installer
from edge_agent.releases.options import FollowerOptions
from edge_agent.releases.release_fetch import ReleaseFetch
from edge_agent.releases.rollout import Rollout
from edge_agent.releases.rollout_events import (
    Activate,
    Adopt,
    Command,
    Confirm,
    Event,
    Failed,
    Fetch,
    HealthSeen,
    ManifestArrived,
    ManifestRefused,
    Passed,
    Pin,
    Pinned,
    Quarantine,
    Remember,
    Report,
    RollBack,
    SelfTest,
    ShowState,
    StopWork,
    Tick,
)
from edge_agent.releases.rollout_memory import FILE, RolloutMemory
from edge_agent.releases.slots import Slots
from federation.bundle import Bundle, address
from federation.errors import ConfigError, ReleaseError, ReleaseFault
from federation.release import open_manifest
from federation.wire.link import (
    Connected,
    Disconnected,
    Inbox,
    Link,
    LinkFailed,
    MakeLink,
    Message,
    Overflow,
    Will,
)
from federation.wire.predictions import ModelState, PredictionMessage
from federation.wire.rate import TokenBucket
from federation.wire.release import Channel, Requirements
from federation.wire.signing import public_key
from federation.wire.topics import Topics

log = structlog.get_logger()

INBOX_BYTES: Final = 8 * 2**20
"""Four windows of chunks: what does not fit is asked for again, and a device that labels frames has little memory."""

HEALTH_S: Final = 1.0
"""Between two looks at a release on probation."""

LONGEST_TURN_S: Final = 30.0
"""While a release is worked on, its manifest's expiry is looked at so often."""

RESTART_S: Final = 10.0
"""After which a follower that failed for an unforeseen reason begins anew; it doubles."""

RESTART_MAX_S: Final = 3600.0

JOIN_S: Final = 10.0
"""For the thread at the end: one activation, on a slow card."""

TITLE: Final = "fedge model"


@dataclass(frozen=True, slots=True)
class _Following:
    """What a device needs to follow releases."""

    rollout: Rollout
    fetch: ReleaseFetch
    installer: Installer
    memory: RolloutMemory


class Follower:
    """One device's inference process in the eyes of its federation.

    Args:
        bundle: Identity and broker account.
        slots: The device's models, the follower's own from :meth:`start` to :meth:`stop`; None for a device that runs a
            model file of its owner's and follows nothing.
        options: Settings.
        install: Makes an engine that is warmed up label the next frame; None takes the running one away.
        health: How the installed model does.
        make_link: Makes the link to the broker.
        wall: Unix seconds by the device's clock.

    Raises:
        ConfigError: If the broker's address or certificates cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle,
        slots: Slots | None,
        options: FollowerOptions,
        *,
        install: Install,
        health: Callable[[], Health],
        make_link: MakeLink = Link,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._bundle, self._slots, self._options = bundle, slots, options
        self._install, self._health, self._wall = install, health, wall
        self._topics = Topics(bundle.federation)
        self._session = secrets.token_hex(8)
        current = None if slots is None else slots.current
        number = "" if current is None else str(current.release.number)
        state = ModelState(
            installed_version=number,
            latest_version=number,
            in_progress=False,
            title=TITLE,
            online=True,
            session=self._session,
            state="a model file of this device's owner" if slots is None else "",
        )
        self._inbox = Inbox(INBOX_BYTES)
        self._link = make_link(
            address(bundle),
            f"{bundle.federation}-{bundle.agent}-infer-{self._session}",
            on_event=self._inbox.put,
            will=Will(self._topics.model(bundle.agent), farewell(state)),
            max_rate=options.max_rate,
        )
        self._announcer = Announcer(bundle, options, state, self._link)
        self._following: _Following | None = None
        self._starts = 0
        self._events: deque[Event] = deque()
        self._refused: dict[Channel, ReleaseFault] = {}
        self._health_due = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Begin: the current model is loaded and installed, then releases are followed. Returns at once."""
        self._link.start()
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye and end. The slots are the caller's again."""
        self._stopping.set()
        self._inbox.wake()
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)
        if self._thread.is_alive():
            log.error("follower_not_ended", lost="nothing: what is on disk is whole at every moment")
        self._link.stop([self._announcer.farewell()])

    def publish_prediction(self, message: PredictionMessage) -> None:
        """Send a prediction soon, or not at all while there is no broker: a newer one follows. From any thread."""
        self._announcer.prediction(message)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = RESTART_S
        while not self._stopping.is_set():
            try:
                self._serve()
            except Exception:  # the loop over the frames must never find out
                log.exception(
                    "follower_failed",
                    lost="nothing: the current model goes on, new releases wait",
                    retry_s=pause_s,
                    remedy="if it stays, report it with this trace",
                )
                self._stopping.wait(pause_s)
                pause_s = min(RESTART_MAX_S, 2 * pause_s)

    def _serve(self) -> None:
        self._events.clear()
        if self._slots is not None:
            self._follow(self._slots)
        try:
            if self._link.connected:  # this thread began anew, the link did not
                self._announce()
            while not self._stopping.is_set():
                self._turn()
        finally:
            if self._following is not None:
                self._following.fetch.stop()
                self._following.installer.stop_test(TEST_END_S)
        if self._slots is not None:
            self._slots.count_stop()

    def _follow(self, slots: Slots) -> None:
        bundle, options = self._bundle, self._options
        cap = None if options.max_rate is None else TokenBucket(options.max_rate)
        memory = RolloutMemory(slots.folder / FILE, bundle.release_keys)
        installer = Installer(slots, options, self._install, self._events.append, self._inbox.post)
        known = memory.known(installer.quarantine())
        names = bundle.federation, bundle.agent, self._session
        self._following = _Following(
            Rollout(*names, options.settings, known, objection=_objection),
            ReleaseFetch(slots, self._link, self._topics, self._events.append, cap),
            installer,
            memory,
        )
        self._starts += 1
        installer.start(crashes=slots.count_start() if self._starts == 1 else False)
        self._handle(time.monotonic())

    def _turn(self) -> None:
        now = time.monotonic()
        due = [at for at in self._wakeups(now) if at is not None]
        item = self._inbox.get(max(0.0, min(due) - now) if due else None)
        now = time.monotonic()
        if item is not None:
            self._take(item, now)
        if item is None or (due and now >= min(due)):  # an inbox that is never empty must not stop the clock
            self._tick(now)
        self._handle(now)

    def _wakeups(self, now: float) -> tuple[float | None, ...]:
        following = self._following
        if following is None:
            return ()
        return (
            following.rollout.next_wakeup(),
            following.fetch.next_wakeup(),
            self._health_due if following.rollout.on_probation else None,
            None if following.rollout.target is None else now + LONGEST_TURN_S,
        )

    def _tick(self, now: float) -> None:
        following = self._following
        if following is None:
            return
        following.fetch.tick(now)
        if following.rollout.on_probation and now >= self._health_due:
            self._health_due = now + HEALTH_S
            self._events.append(HealthSeen(self._health()))
        self._events.append(Tick())

    # --- what comes in --------------------------------------------------------------------------------------------

    def _take(self, item: object, now: float) -> None:
        match item:
            case Message():
                self._message(item, now)
            case Passed() | Failed():
                self._events.append(item)
            case Connected():
                self._announce()
                if self._following is not None:
                    self._following.fetch.reconnected(now)
            case Overflow(dropped):
                log.warning("inbox_overflowed", dropped=dropped, remedy="what was lost is asked for again")
                self._announce()
            case LinkFailed(error):
                log.error("link_fault", error=error)
            case Disconnected():
                pass  # the link has said so, and goes on trying; the model needs no broker
            case _:
                raise AssertionError(f"nobody posts {type(item).__name__}")

    def _announce(self) -> None:
        self._announcer.everything()
        # Its own state too: the will of an earlier life may come after this one's birth.
        filters = [(self._topics.model(self._bundle.agent), 1)]
        if self._following is not None:
            filters += [(self._topics.release(channel.value), 1) for channel in Channel]
        self._link.subscribe(filters)

    def _message(self, message: Message, now: float) -> None:
        following = self._following
        chunk = self._topics.parse_object_chunk(message.topic)
        if message.topic == self._topics.model(self._bundle.agent):
            if is_farewell(message.payload):
                self._announcer.state()
        elif following is not None and chunk is not None:
            following.fetch.chunk(*chunk, message.payload, now)
        elif following is not None and message.payload:
            name = self._topics.parse_release(message.topic)
            if name in {channel.value for channel in Channel}:
                self._manifest(following.rollout, Channel(name), message.payload)

    def _manifest(self, rollout: Rollout, channel: Channel, envelope: bytes) -> None:
        try:
            signed = open_manifest(
                envelope,
                federation=self._bundle.federation,
                keys=[public_key(key) for key in rollout.keys],
                channel=channel,
            )
        except ReleaseError as error:
            if self._refused.get(channel) is not error.fault:  # a broker may repeat it for ever
                log.error(
                    "manifest_refused",
                    channel=channel.value,
                    fault=error.fault.value,
                    detail=error.detail,
                    lost="nothing: the current model goes on",
                    remedy="if the aggregator was set up anew, enrol this device again",
                )
            self._refused[channel] = error.fault
            self._events.append(ManifestRefused(channel, error.fault, error.detail))
        else:
            self._refused.pop(channel, None)
            self._events.append(ManifestArrived(signed, channel))

    # --- carrying out ---------------------------------------------------------------------------------------------

    def _handle(self, now: float) -> None:
        following = self._following
        while self._events and following is not None:
            for command in following.rollout.handle(self._events.popleft(), now, self._wall()):
                self._carry_out(following, command, now)

    def _carry_out(self, following: _Following, command: Command, now: float) -> None:
        installer = following.installer
        match command:
            case Pin(keys):
                self._pin(following.memory, keys)
            case Remember():
                self._remember(following.memory, command)
            case Fetch():
                following.fetch.begin(command, now)
            case StopWork(sha256):
                log.info("release_abandoned", model=sha256[:12], reason="the manifests say otherwise now")
                following.fetch.stop()
                installer.stop_test()
            case SelfTest(offer):
                installer.test(offer)
            case Activate(offer, trial):
                installer.activate(offer, trial=trial)
                self._health_due = now + HEALTH_S
            case Adopt(offer):
                installer.adopt(offer)
            case RollBack():
                installer.roll_back()
            case Quarantine(sha256, fault, detail):
                installer.condemn(sha256, fault, detail)
            case Confirm():
                target = following.rollout.target
                working = frozenset() if target is None else frozenset({target.sha256})
                installer.confirm(following.fetch.objects | working)
            case Report(report):
                self._announcer.report(report)
            case ShowState():
                self._announcer.show(command)

    def _pin(self, memory: RolloutMemory, keys: tuple[str, ...]) -> None:
        try:
            memory.pin(keys)
        except ConfigError as error:
            log.error(
                "keys_not_pinned",
                reason=str(error),
                lost="nothing: the release waits until they are",
                remedy="free some space on the disk; it is tried again by itself",
            )
            return
        log.warning("release_keys_rotated", reason="the aggregator signs with the successor now")
        self._events.append(Pinned(keys))

    def _remember(self, memory: RolloutMemory, command: Remember) -> None:
        try:
            memory.remember(command)
        except ConfigError as error:
            lost = "nothing, unless the power fails now"
            log.error("rollout_memory_not_saved", reason=str(error), lost=lost)


def _objection(requirements: Requirements) -> str:
    from edge_agent.releases.runtime import objection  # onnxruntime: not needed before the first release

    return objection(requirements)
