"""Masked sums: the aggregator's side of secure aggregation, between the link, the journal and the state machine.

One attempt of one round at a time. What a device sends is verified here; what it means is decided by
:class:`privacy.secagg.server.Server`; what came of it for the round is returned as events of :mod:`aggregator.rounds`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregator.masking_journal import Journal, Record, What, journal_path, sweep
from aggregator.masking_machine import event_of, server_of
from aggregator.rounds import AgentOut, Event, SumFailed, Unmasked
from aggregator.store import Store
from federation.errors import PeerError, Rejection, TransportError
from federation.wire.link import LinkLike
from federation.wire.masking import (
    Agreement,
    Agreements,
    DownMessage,
    MaskingKeys,
    Member,
    Reveal,
    Roster,
    SealedShares,
    Survivors,
    UpMessage,
    body_up,
    unseal_up,
)
from federation.wire.messages import RoundPlan
from federation.wire.signing import AGGREGATOR, Purpose, seal
from federation.wire.topics import Topics
from privacy.secagg import server_messages as machine
from privacy.secagg.errors import RefusedError
from privacy.secagg.server import Server
from privacy.secagg.unmask import UnmaskPlan

log = structlog.get_logger()

REPEAT_S = 2.0
"""After so long without an answer a device is told once more what its sum is to be."""


@dataclass(slots=True)
class _Attempt:
    """What is known of one attempt besides the machine's own state.

    Attributes:
        keys: As the devices have signed them.
        agreements: As the devices have signed them.
        said: What each device was told last.
        unanswered: Devices that were told of the survivors, or of agreements, and have not answered.
        gone: Devices that are offline.
        restarted: Devices that have lost their secrets since the roster was closed.
        roster: Whose keys came in time; None as long as it is not decided.
        members: Who has got its neighbours' shares, and so may deliver; None as long as it is not decided.
        begun: Whether its clock runs.
        delivered: Whose sum is wanted; None as long as the round takes updates.
        asked: Whether a device was asked to open the sum.
        repeat_at: When those that have not answered are told again, monotonic seconds.
        unmask: What takes the masks off.
        outcome: The end, if it has come.
    """

    plan: RoundPlan
    server: Server
    journal: Journal
    keys: dict[str, bytes] = field(default_factory=dict)
    agreements: dict[str, bytes] = field(default_factory=dict)
    said: dict[str, bytes] = field(default_factory=dict)
    unanswered: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    restarted: set[str] = field(default_factory=set)
    roster: frozenset[str] | None = None
    members: frozenset[str] | None = None
    begun: bool = False
    delivered: tuple[str, ...] | None = None
    asked: bool = False
    repeat_at: float = 0.0
    unmask: UnmaskPlan | None = None
    outcome: Event | None = None


class SecureRounds:
    """Single-threaded: all methods are called by the service's loop.

    Args:
        link: For what devices are told.
        topics: Of the federation.
        store: In whose folder the journals lie; keeps refusals.
        key: The aggregator's.
        key_of: Public keys of enrolled agents.
        phase_s: Seconds that each step may last.
    """

    def __init__(
        self,
        *,
        link: LinkLike,
        topics: Topics,
        store: Store,
        key: Ed25519PrivateKey,
        key_of: Callable[[str], Ed25519PublicKey | None],
        phase_s: float,
    ) -> None:
        self._link, self._topics, self._store = link, topics, store
        self._key, self._key_of, self._phase_s = key, key_of, phase_s
        self._attempt: _Attempt | None = None
        self._refused: set[tuple[str, Rejection]] = set()

    # --- the attempt --------------------------------------------------------------------------------------------

    def recall(self, number: int, attempt: int) -> RoundPlan | None:
        """The plan of an attempt that an earlier process had begun."""
        journal = Journal(journal_path(self._store.folder, number, attempt))
        journal.close()
        return journal.plan

    def open(self, plan: RoundPlan) -> None:
        """Begin an attempt, or go on with it; what was left of others is deleted. :meth:`announced` starts its clock."""
        self.close()
        path = journal_path(self._store.folder, plan.round, plan.attempt)
        sweep(self._store.folder, keep=path)
        journal = Journal(path)
        server = server_of(plan, self._topics.federation, self._phase_s)
        self._attempt = _Attempt(plan, server, journal)
        self._refused.clear()

    def announced(self, now: float) -> list[Event]:
        """The plan is out: the clock starts. Called again, it changes nothing.

        Args:
            now: Monotonic seconds.

        Returns:
            What it means for the round, where an earlier process had come further.
        """
        attempt = self._attempt
        if attempt is None or attempt.begun:
            return []
        attempt.begun = True
        records = attempt.journal.records
        attempt.server.start(now)
        if attempt.journal.plan is None:
            attempt.journal.begin(attempt.plan)
            return []
        for record in records:
            self._replay(attempt, record)
        log.info(
            "masking_resumed",
            round=attempt.plan.round,
            attempt=attempt.plan.attempt,
            phase=attempt.server.phase.value,
            events=len(records),
        )
        events = [*self._outs(attempt), *self._carry_out(attempt, attempt.server.resume(now), now)]
        if attempt.delivered is not None and attempt.outcome is None:
            events += self.unmask(attempt.delivered, now)
        return events

    def close(self) -> None:
        """Forget the attempt: its round is closed, or another one begins. Its journal stays until then."""
        if self._attempt is not None:
            self._attempt.journal.close()
            self._attempt = None

    def discard(self) -> None:
        """Forget the attempt and delete what was kept of it."""
        self.close()
        sweep(self._store.folder)

    @property
    def members(self) -> frozenset[str]:
        """Who may deliver a masked update: none before the shares are exchanged."""
        return frozenset() if self._attempt is None else self._attempt.members or frozenset()

    @property
    def unmask_plan(self) -> UnmaskPlan | None:
        """What takes the masks off the sum, once it is known."""
        return None if self._attempt is None else self._attempt.unmask

    # --- what happens -------------------------------------------------------------------------------------------

    def message(self, agent: str, data: bytes, now: float) -> list[Event]:
        """Take an envelope from an agent's branch."""
        attempt = self._attempt
        if attempt is None or not attempt.begun:
            return []  # it will be repeated
        attempt.gone.discard(agent)
        try:
            key = self._key_of(agent)
            if key is None:
                raise PeerError(Rejection.UNKNOWN_AGENT, f"{agent!r} is not enrolled here")
            message = unseal_up(data, federation=self._topics.federation, sender=agent, key=key)
            if not message.is_of(attempt.plan):
                log.debug("masking_ignored", agent=agent, round=message.round, attempt=message.attempt)
                return []
            if isinstance(message, MaskingKeys) and agent not in (attempt.roster or {agent}):
                log.debug("masking_late", agent=agent, round=message.round, attempt=message.attempt)
                return []  # it waits for the next attempt, or the next round
            if isinstance(message, MaskingKeys) and message.base != attempt.plan.base:
                raise PeerError(
                    Rejection.WRONG_BASE, f"keys for a round that starts from {message.base[:12]}"
                )
            return self._feed(
                attempt, Record(what=What.MESSAGE, agent=agent, data=data, at=now), message, now
            )
        except PeerError as error:
            self._refuse(agent, error)
            return []

    def gone(self, agent: str, now: float) -> list[Event]:
        """An agent vanished or declined: nobody waits for it."""
        attempt = self._attempt
        if attempt is None:
            return []
        attempt.gone.add(agent)
        # As long as updates are taken, the round decides how long it waits for whom.
        return (
            []
            if attempt.server.phase is machine.ServerPhase.MASKED
            else self._happened(What.GONE, agent, now)
        )

    def back(self, agent: str) -> None:
        """An agent's link is back: what it was told last may have been lost."""
        attempt = self._attempt
        if attempt is not None and agent in attempt.said:
            self._send(agent, attempt.said[agent])

    def unmask(self, delivered: tuple[str, ...], now: float) -> list[Event]:
        """No further update is taken: have the sum opened.

        Args:
            delivered: Whose updates are on disk.
            now: Monotonic seconds.
        """
        attempt = self._attempt
        assert attempt is not None, "a round is unmasked that was not opened"
        attempt.delivered = delivered
        if not attempt.begun:
            return []  # as soon as it is known how far an earlier process had come
        if attempt.outcome is not None:
            return [attempt.outcome]
        events: list[Event] = []
        if attempt.server.phase is machine.ServerPhase.MASKED:
            # Those that are gone first, so that the machine does not take them for missing and go on without them.
            away = attempt.gone | attempt.restarted
            for agent in sorted(delivered, key=lambda name: (name not in away, name)):
                events += self._happened(What.STORED, agent, now)
            events += self._happened(What.CLOSE, "", now)
            for agent in sorted(away):
                events += self._happened(What.GONE, agent, now)
        return events

    def tick(self, now: float) -> list[Event]:
        """Time has passed."""
        attempt = self._running()
        if attempt is None:
            return []
        events = self._happened(What.TICK, "", now)
        if attempt.unanswered and now >= attempt.repeat_at:
            attempt.repeat_at = now + REPEAT_S
            for agent in sorted(attempt.unanswered):
                self._send(agent, attempt.said[agent])
        return events

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` is due, monotonic seconds."""
        attempt = self._running()
        if attempt is None:
            return None
        repeat = attempt.repeat_at if attempt.unanswered else None
        return min((at for at in (attempt.server.next_wakeup(), repeat) if at is not None), default=None)

    def connected(self, now: float) -> list[Event]:
        """The aggregator's link is back. Nobody could answer without it: the present step gets its full time again."""
        attempt = self._running()
        return [] if attempt is None else self._carry_out(attempt, attempt.server.resume(now), now)

    def _running(self) -> _Attempt | None:
        """The attempt, while its clock runs: it stands still while nobody can be heard."""
        attempt = self._attempt
        ready = attempt is not None and attempt.begun and attempt.outcome is None and self._link.connected
        return attempt if ready else None

    # --- the machine --------------------------------------------------------------------------------------------

    def _happened(self, what: What, agent: str, now: float) -> list[Event]:
        attempt = self._attempt
        if attempt is None or not attempt.begun or attempt.outcome is not None:
            return []
        try:
            return self._feed(attempt, Record(what=what, agent=agent, at=now), None, now)
        except PeerError as error:
            self._refuse(agent, error)
            return []

    def _feed(self, attempt: _Attempt, record: Record, message: UpMessage | None, now: float) -> list[Event]:
        event = event_of(record, message)
        try:
            counts = attempt.server.changes(event, now)
            if counts:
                attempt.journal.append(record)
            commands = attempt.server.handle(event, now)
        except RefusedError as error:
            raise PeerError(Rejection.MALFORMED, str(error)) from error
        if counts:
            _note(attempt, record, message)
        if commands:
            attempt.journal.sync()
        events = self._carry_out(attempt, commands, now)
        if record.agent in attempt.restarted and isinstance(message, MaskingKeys) and counts:
            log.warning(
                "agent_lost_its_masks", agent=record.agent, round=message.round, attempt=message.attempt
            )
            events.append(AgentOut(record.agent))  # it has nothing to deliver before the next attempt
        return events

    def _replay(self, attempt: _Attempt, record: Record) -> None:
        message = body_up(record.data) if record.what is What.MESSAGE else None
        commands = attempt.server.replay(event_of(record, message))
        _note(attempt, record, message)
        for command in commands:
            self._take(attempt, command, record.at)

    def _carry_out(self, attempt: _Attempt, commands: list[machine.ServerCommand], now: float) -> list[Event]:
        roster, members = attempt.roster, attempt.members
        for command in commands:
            agent = self._take(attempt, command, now)
            if agent:
                self._send(agent, attempt.said[agent])
        events = [] if (roster, members) == (attempt.roster, attempt.members) else self._outs(attempt)
        if attempt.outcome is not None and commands:
            attempt.unanswered.clear()
            events.append(attempt.outcome)
        return events

    def _take(self, attempt: _Attempt, command: machine.ServerCommand, now: float) -> str:
        """Note what a command means; returns whom to send ``said``, if anybody."""
        plan = attempt.plan
        here = {"run": plan.run, "round": plan.round, "attempt": plan.attempt}
        message: DownMessage
        match command:
            case machine.SendRoster(agent, names, neighbours):
                attempt.roster = frozenset(names)
                members = {name: self._member(attempt, name) for name in neighbours}
                message = Roster(**here, names=names, members=members)  # type: ignore[arg-type]
            case machine.SendShares(agent, sealed):
                attempt.members = (attempt.members or frozenset()) | {agent}
                message = SealedShares(**here, sealed=dict(sealed))  # type: ignore[arg-type]
            case machine.SendSurvivors(agent, names):
                message = Survivors(**here, names=names)  # type: ignore[arg-type]
            case machine.SendAgreements(agent, signers):
                attempt.asked = True
                signed = {name: attempt.agreements[name] for name in signers}
                message = Agreements(**here, signed=signed)  # type: ignore[arg-type]
            case machine.Unmask(unmask):
                attempt.unmask, attempt.outcome = unmask, Unmasked()
                log.info("masks_known", round=plan.round, survivors=len(unmask.survivors))
                return ""
            case machine.Abort(reason, missing):
                attempt.outcome = SumFailed(asked=attempt.asked)
                log.warning(
                    "masked_sum_failed",
                    round=plan.round,
                    attempt=plan.attempt,
                    reason=reason,
                    missing=list(missing),
                    lost="nothing is learned of any update",
                )
                return ""
        if isinstance(message, Survivors | Agreements):
            attempt.unanswered.add(agent)
            attempt.repeat_at = now + REPEAT_S
        attempt.said[agent] = seal(
            message,
            purpose=Purpose.MASKING_DOWN,
            federation=self._topics.federation,
            sender=AGGREGATOR,
            key=self._key,
        )
        return agent

    def _member(self, attempt: _Attempt, name: str) -> Member:
        key = self._key_of(name)
        # Revoked meanwhile: nobody accepts it as a neighbour then, and the attempt does without it.
        identity = bytes(32) if key is None else key.public_bytes_raw()
        return Member(identity=identity, keys=attempt.keys[name])

    def _outs(self, attempt: _Attempt) -> list[Event]:
        """Nobody waits for the update of one that has no part in this attempt."""
        taking_part = attempt.members if attempt.members is not None else attempt.roster
        if taking_part is None:
            return []
        out = sorted(set(attempt.plan.cohort) - taking_part)
        if out:
            log.info("masking_without", round=attempt.plan.round, attempt=attempt.plan.attempt, agents=out)
        return [AgentOut(agent) for agent in sorted({*out, *attempt.restarted})]

    def _refuse(self, agent: str, error: PeerError) -> None:
        # Strangers share one entry: on a broker without access control, names are free to invent.
        who = "" if error.code is Rejection.UNKNOWN_AGENT else agent
        if (who, error.code) in self._refused:
            return
        self._refused.add((who, error.code))
        log.warning("masking_refused", agent=agent, code=error.code.value, detail=error.detail)
        number = 0 if self._attempt is None else self._attempt.plan.round
        self._store.record_refusal(number, agent, error.code, error.detail)

    def _send(self, agent: str, payload: bytes) -> None:
        try:
            if not self._link.publish(self._topics.masking_down(agent), payload, qos=1):
                log.debug("send_skipped", agent=agent, reason="not connected; it is repeated")
        except TransportError as error:
            log.warning("send_failed", agent=agent, reason=str(error))


def _note(attempt: _Attempt, record: Record, message: UpMessage | None) -> None:
    """Keep what others are to get as it was signed, and who has answered."""
    match message:
        case MaskingKeys() if attempt.roster is None:
            attempt.keys[record.agent] = record.data
        case MaskingKeys() if attempt.keys.get(record.agent) != record.data:
            attempt.restarted.add(record.agent)
        case Agreement():
            attempt.agreements[record.agent] = record.data
            attempt.unanswered.discard(record.agent)
        case Reveal():
            attempt.unanswered.discard(record.agent)
        case _:
            pass
    if record.what is What.GONE:
        attempt.unanswered.discard(record.agent)
