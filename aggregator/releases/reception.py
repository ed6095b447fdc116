"""What devices say about releases, at the door: verified, put in order, and no more than a device has to say."""

from collections.abc import Callable
from dataclasses import dataclass

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.releases.reports import SESSIONS_KEPT
from aggregator.releases.rollout_events import FollowerSeen, Reported
from aggregator.releases.rollouts import FAILED
from aggregator.releases.store import ReleaseStore
from aggregator.store import Store
from federation.errors import PeerError, Rejection
from federation.wire.messages import decode_json
from federation.wire.predictions import ModelState
from federation.wire.release import ReleaseReport, RolloutState
from federation.wire.signing import Purpose, unseal

log = structlog.get_logger()

BURST = 32
"""Messages that a device may send at once. A release takes six reports and as many states; each costs a write."""

REFILL_S = 2.0
"""After which it may send one more. What is over is kept back, the newest only, until its time has come."""


@dataclass(slots=True)
class _Allowance:
    left: float
    at: float
    held: dict[str, tuple[bytes, bool]]

    def take(self, now: float) -> bool:
        self.left = min(BURST, self.left + (now - self.at) / REFILL_S)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class ReleaseReception:
    """Turns reports and model states into events of the rollout; what it accepts is on disk. Single-threaded.

    Args:
        store: Counts what is refused.
        releases: Keeps the rest.
        federation: Name.
        key_of: The pinned key of an enrolled agent.
    """

    def __init__(
        self,
        store: Store,
        releases: ReleaseStore,
        federation: str,
        key_of: Callable[[str], Ed25519PublicKey | None],
    ) -> None:
        self._store, self._releases, self._federation, self._key_of = store, releases, federation, key_of
        self._allowances: dict[str, _Allowance] = {}
        # By agent: the last session whose death was heard over the present connection (as in aggregator.presence).
        self._died: dict[str, str] = {}
        followers = releases.followers()
        self._models = {agent: row.model for agent, row in followers.items()}
        self._lives: dict[str, str] = {}
        self._hashes: dict[int, str] = {}
        self._sessions = {agent: row.sessions for agent, row in followers.items()}

    def connected(self) -> None:
        """The link is up: what is retained now may be newer than what was heard before."""
        self._died.clear()

    def message(
        self, agent: str, kind: str, payload: bytes, now: float, *, retained: bool
    ) -> Reported | FollowerSeen | None:
        """Take a message of an agent.

        Args:
            agent: Whose topic it came on.
            kind: ``release`` for a signed :class:`ReleaseReport`, ``model`` for the JSON of a :class:`ModelState`.
            payload: From anywhere.
            now: Monotonic seconds.
            retained: Whether the broker had kept it.

        Returns:
            What it means for the rollout; None for a repeat, for what is refused, and for what is kept back.
        """
        if not payload:
            return None
        if self._key_of(agent) is None:
            log.debug("report_ignored", agent=agent, reason="not enrolled")
            return None
        allowance = self._allowances.setdefault(agent, _Allowance(BURST, now, {}))
        if not allowance.take(now):
            if not allowance.held:
                log.warning("reports_held", agent=agent, reason="too many at once", kept="the newest")
            allowance.held[kind] = payload, retained
            return None
        allowance.held.pop(kind, None)  # older than this one
        return self._take(agent, kind, payload, retained=retained)

    def tick(self, now: float) -> list[Reported | FollowerSeen]:
        """Take what was kept back and may come in now."""
        events = []
        for agent, allowance in self._allowances.items():
            for kind in list(allowance.held):
                if allowance.take(now):
                    payload, retained = allowance.held.pop(kind)
                    events.append(self._take(agent, kind, payload, retained=retained))
        return [event for event in events if event is not None]

    def forget(self, agent: str) -> None:
        """The agent is not enrolled any more."""
        for memory in (self._allowances, self._died, self._lives, self._models, self._sessions):
            memory.pop(agent, None)
        self._releases.forget_follower(agent)

    def _take(
        self, agent: str, kind: str, payload: bytes, *, retained: bool
    ) -> Reported | FollowerSeen | None:
        try:
            if kind == "model":
                return self._model(agent, decode_json(payload, ModelState), retained=retained)
            return self._report(agent, payload)
        except PeerError as error:
            log.warning("refused", agent=agent, code=error.code.value, detail=error.detail)
            self._store.record_refusal(0, agent, error.code, f"release: {error.detail}")
            return None

    # --- reports ----------------------------------------------------------------------------------------------------

    def _report(self, agent: str, payload: bytes) -> Reported | None:
        key = self._key_of(agent)
        if key is None:
            return None
        report = unseal(
            payload,
            ReleaseReport,
            purpose=Purpose.RELEASE_REPORT,
            federation=self._federation,
            sender=agent,
            key=key,
        )
        if self._sha256_of(report.number) != report.sha256:
            raise PeerError(
                Rejection.WRONG_HASH, f"release {report.number} is not a model {report.sha256[:12]} here"
            )
        known = self._releases.report(report.number, agent)
        if known == report:
            return None  # the retained one, once more
        self._check_order(agent, report, known)
        self._releases.record_report(agent, report)
        self._remember(agent, report.session)
        heard = log.bind(agent=agent, release=report.number, state=report.state.value)
        if report.state in FAILED:
            fault = report.fault.value if report.fault else "unknown"
            heard.warning("release_failed", fault=fault, detail=_printable(report.detail))
        elif report.state is RolloutState.CONFIRMED:
            heard.info("release_confirmed", frames=report.frames, p99_ms=report.p99_ms)
        else:
            heard.debug("release_reported")
        return Reported(agent, report.number, report.manifest, report.state, report.fault)

    def _sha256_of(self, number: int) -> str | None:
        """Of the model of a release, which never changes; None if there is no such release."""
        if number not in self._hashes:
            stored = self._releases.release(number)
            if stored is None:
                return None
            self._hashes[number] = stored.release.model.sha256
        return self._hashes[number]

    def _check_order(self, agent: str, report: ReleaseReport, known: ReleaseReport | None) -> None:
        """Refuse an older report than the one that is known: replayed, or delivered late.

        Clocks of devices are not compared across their restarts: one without a battery begins in the past each time. A
        failure is believed whatever its time: a clock that was set back must not hide one, and to halt is the safe side.
        """
        if report.session in self._sessions.get(agent, ())[:-1]:
            raise PeerError(Rejection.DUPLICATE, f"a report of an earlier life of {agent}, {report.session}")
        if known is None or report.session != known.session or report.state in FAILED:
            return
        if report.time < known.time:
            raise PeerError(
                Rejection.DUPLICATE, f"a report from {known.time - report.time:.3f} s before its last one"
            )

    def _remember(self, agent: str, session: str) -> None:
        sessions = self._sessions.get(agent, ())
        self._sessions[agent] = (*(one for one in sessions if one != session), session)[-SESSIONS_KEPT:]

    # --- model states -----------------------------------------------------------------------------------------------

    def _model(self, agent: str, model: ModelState, *, retained: bool) -> FollowerSeen | None:
        if not model.online:
            self._died[agent] = model.session
            if self._lives.get(agent, model.session) != model.session:
                return None  # the will of an earlier life
        elif retained and self._died.get(agent) == model.session:
            return None  # nats-server may deliver a retained birth after the death that has replaced it
        else:
            self._died.pop(agent, None)
            self._lives[agent] = model.session
        if model != self._models.get(agent):
            self._releases.record_model(agent, model)
            self._models[agent] = model
        return FollowerSeen(agent, model.online)


def _printable(text: str) -> str:
    """What a device wrote, without the terminal commands that it may hold."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
