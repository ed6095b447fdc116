"""What the world hears of a device's inference: reports for the aggregator, the model's state and predictions for people."""

import msgspec
import structlog

from edge_agent.releases.discovery import announcements
from edge_agent.releases.options import FollowerOptions
from edge_agent.releases.rollout_events import ShowState
from federation.bundle import Bundle
from federation.errors import TransportError
from federation.wire.interface import LinkLike
from federation.wire.messages import encode_json
from federation.wire.predictions import ModelState, PredictionMessage
from federation.wire.release import ReleaseReport, RolloutState
from federation.wire.signing import Purpose, private_key, seal
from federation.wire.topics import Topics

log = structlog.get_logger()

_EVENTS = {
    RolloutState.FETCHING: "release_fetching",
    RolloutState.TESTING: "release_testing",
    RolloutState.PROBATION: "release_activated",
    RolloutState.CONFIRMED: "release_confirmed",
    RolloutState.REFUSED: "release_refused",
    RolloutState.ROLLED_BACK: "release_rolled_back",
}


class Announcer:
    """Publishes, and says again after each connect what should be retained.

    Args:
        bundle: Identity of the device.
        options: Whether Home Assistant is told.
        state: At the start.
        link: To publish on.
    """

    def __init__(self, bundle: Bundle, options: FollowerOptions, state: ModelState, link: LinkLike) -> None:
        self._bundle, self._options, self._link = bundle, options, link
        self._topics = Topics(bundle.federation)
        self._key = private_key(bundle.private_key)
        self._state = state
        self._report: ReleaseReport | None = None

    def everything(self) -> None:
        """All that the broker should hold: it may have lost what it held."""
        self.state()
        if self._report is not None:
            self._publish_report(self._report)
        if self._options.publish and self._options.home_assistant:
            interval_s = self._options.publish_interval_s
            for topic, payload in announcements(
                self._topics, self._bundle.agent, publish_interval_s=interval_s
            ):
                self._publish(topic, payload)

    def state(self) -> None:
        """The model's state, as it is."""
        self._publish(self._topics.model(self._bundle.agent), encode_json(self._state))

    def show(self, command: ShowState) -> None:
        """The model's state, if it has changed."""
        state = msgspec.structs.replace(
            self._state,
            installed_version="" if command.installed is None else str(command.installed),
            latest_version="" if command.latest is None else str(command.latest),
            in_progress=command.busy,
            state=command.text,
        )
        if state != self._state:
            self._state = state
            self.state()

    def report(self, report: ReleaseReport) -> None:
        """Tell the aggregator, and the log in plain words."""
        self._report = report
        self._publish_report(report)
        event = _EVENTS[report.state]
        details = {"number": report.number, "model": report.sha256[:12], "running": report.running}
        if report.fault is None:
            log.info(event, **details)
            return
        lost = "nothing: the former model goes on"
        if report.running is None:
            lost = "labels, until the next release comes"
        log.error(event, **details, fault=report.fault.value, detail=report.detail, lost=lost)

    def prediction(self, message: PredictionMessage) -> None:
        """One prediction, if there is a broker. From any thread."""
        try:
            self._link.publish(self._topics.predictions(self._bundle.agent), encode_json(message), qos=0)
        except TransportError as error:
            log.error("prediction_not_sent", reason=str(error))

    def farewell(self) -> tuple[str, bytes, int, bool]:
        """The last word, for the link to say."""
        return self._topics.model(self._bundle.agent), farewell(self._state), 1, True

    def _publish_report(self, report: ReleaseReport) -> None:
        sealed = seal(
            report,
            purpose=Purpose.RELEASE_REPORT,
            federation=self._bundle.federation,
            sender=self._bundle.agent,
            key=self._key,
        )
        self._publish(self._topics.release_report(self._bundle.agent), sealed)

    def _publish(self, topic: str, payload: bytes) -> None:
        try:
            self._link.publish(
                topic, payload, qos=1, retain=True
            )  # unsent while offline: sent after the connect
        except TransportError as error:
            log.error("send_failed", topic=topic, reason=str(error))


def farewell(state: ModelState) -> bytes:
    """A state as it is left behind."""
    return encode_json(msgspec.structs.replace(state, online=False, in_progress=False))


def is_farewell(payload: bytes) -> bool:
    """Whether this is a last word; anything that is no state at all is to be replaced too."""
    try:
        return not msgspec.json.decode(payload, type=ModelState).online
    except (msgspec.DecodeError, UnicodeDecodeError):
        return True
