"""The aggregator's side of secure aggregation: events and a clock in, commands out, no I/O and no randomness.

::

    KEYS --> SHARES --> MASKED --> AGREEMENTS --> REVEALS --> DONE
      each goes on as soon as all have answered that are not gone, or when its time is up, if that is enough;
      else --> ABORTED, and nobody has learned anything

Enough: at least ``min_agents`` devices, and for each secret at least t holders that can still reveal a share of it.
"""

from collections.abc import Collection, Iterable, Mapping

from privacy.secagg.agreement import DIGEST_BYTES, PublicKeys, Terms
from privacy.secagg.collected import Collected
from privacy.secagg.errors import RefusedError, UnrecoverableError
from privacy.secagg.masks import check_public_key
from privacy.secagg.sealing import SEALED_BYTES
from privacy.secagg.server_messages import (
    Abort,
    AgentGone,
    AgreementArrived,
    CloseMasking,
    KeysArrived,
    MaskedStored,
    RevealArrived,
    SendAgreements,
    SendRoster,
    SendShares,
    SendSurvivors,
    ServerCommand,
    ServerEvent,
    ServerPhase,
    SharesArrived,
    Tick,
    Unmask,
)

_OVER = (ServerPhase.DONE, ServerPhase.ABORTED)
_UNTIMED = (ServerPhase.MASKED, *_OVER)
_BEFORE_AGREEMENTS = (ServerPhase.KEYS, ServerPhase.SHARES, ServerPhase.MASKED)


class Server:
    """One context. Feed it with :meth:`handle`; carry out what it returns, in order.

    Whoever journals each event for which :meth:`changes` is true, before it is handled, can feed them to a new machine
    after a crash with :meth:`replay`, then call :meth:`resume`.

    Args:
        context: ``agreement.context_of`` federation, run, round, attempt, base model...
        invited: Who may take part.
        terms: Of the signed plan.
        phase_s: Seconds that each phase may last; that of masked vectors lasts until CloseMasking.

    Attributes:
        phase: What it collects.
    """

    def __init__(self, context: bytes, invited: Collection[str], terms: Terms, *, phase_s: float) -> None:
        self.phase = ServerPhase.KEYS
        self._all, self._phase_s = Collected(context, invited, terms), phase_s
        self._deadline = 0.0
        self._tried = False
        self._end: list[ServerCommand] = []

    def start(self, now: float) -> None:
        """Begin to wait for keys.

        Args:
            now: Monotonic seconds.
        """
        self._deadline = now + self._phase_s

    def handle(self, event: ServerEvent, now: float) -> list[ServerCommand]:
        """Take one event.

        Args:
            event: What happened.
            now: Monotonic seconds.

        Returns:
            What to do, in order. A repeat is answered as the first one was.

        Raises:
            RefusedError: If the message is none that this device may send, or comes too late; nothing has changed.
        """
        if not self.changes(event, now):
            return self._answer(event)
        return self._apply(event, now)

    def replay(self, event: ServerEvent) -> list[ServerCommand]:
        """Take an event from the journal. It needs no clock: a Tick stands there only if it ended a phase.

        Args:
            event: As it was handled.

        Returns:
            What it led to, for those who keep track of it; it has been carried out.
        """
        return self._apply(event, now=0.0)

    def resume(self, now: float) -> list[ServerCommand]:
        """After the journal was replayed: give the current phase its full time again, and repeat what was said last.

        Args:
            now: Monotonic seconds.

        Returns:
            What may not have reached the devices, or the end.
        """
        self._deadline = now + self._phase_s
        if self.phase in _OVER:
            return list(self._end)
        return self._opening(sorted(self._all.missing(self.phase)))

    @property
    def missing(self) -> frozenset[str]:
        """Whose message the present phase has not got."""
        return self._all.missing(self.phase)

    def next_wakeup(self) -> float | None:
        """When Tick can next matter, monotonic seconds; None when only an event can."""
        return self._deadline if self.phase not in _UNTIMED else None

    # --- what counts ----------------------------------------------------------------------------------------------

    def changes(self, event: ServerEvent, now: float) -> bool:
        """Whether the event would change the state: then it belongs in the journal first.

        Repeats and idle ticks do not.

        Args:
            event: What happened.
            now: Monotonic seconds.

        Raises:
            RefusedError: As :meth:`handle`.
        """
        match event:
            case Tick():
                return self.phase not in _UNTIMED and now >= self._deadline
            case CloseMasking():
                return self.phase in _BEFORE_AGREEMENTS
            case AgentGone(agent):
                return self.phase not in _OVER and agent in self._all.invited - self._all.gone
            case _ if self.phase is ServerPhase.ABORTED:
                raise RefusedError("this context was aborted")
            case KeysArrived(agent, keys):
                return self._new_keys(agent, keys)
            case SharesArrived(agent, sealed):
                return self._new_shares(agent, sealed)
            case MaskedStored(agent):
                return self._new_vector(agent)
            case AgreementArrived(agent, digest):
                return self._new_agreement(agent, digest)
            case RevealArrived(agent, seeds, keys):
                return self._new_reveal(agent, seeds, keys)

    def _new_keys(self, agent: str, keys: PublicKeys) -> bool:
        if agent not in self._all.invited:
            raise RefusedError(f"{agent!r} is not invited")
        check_public_key(keys.mask)
        check_public_key(keys.seal)
        if len(keys.seed_commitment) != DIGEST_BYTES:
            raise RefusedError(
                f"the commitment of {agent!r} has {len(keys.seed_commitment)} bytes, not {DIGEST_BYTES}"
            )
        if self.phase is ServerPhase.KEYS:
            return self._all.keys.get(agent) != keys or agent in self._all.gone
        if agent not in self._all.members:
            raise RefusedError(f"the keys of {agent!r} came too late: the roster is closed")
        # A device with other keys has restarted and lost its secrets: it is gone for this context.
        return self._all.keys[agent] != keys and agent not in self._all.gone

    def _new_shares(self, agent: str, sealed: Mapping[str, bytes]) -> bool:
        graph = self._all.graph
        if graph is None or agent not in self._all.members:
            raise RefusedError(f"{agent!r} is not in the roster")
        if agent in self._all.sealed:
            if self._all.sealed[agent] != sealed:
                raise RefusedError(f"{agent!r} has sent other shares before")
            return False
        if self.phase is not ServerPhase.SHARES:
            raise RefusedError(f"the shares of {agent!r} came too late")
        if sealed.keys() != graph.neighbours(agent):
            raise RefusedError(f"{agent!r} has shared with others than its neighbours")
        if any(len(ciphertext) != SEALED_BYTES for ciphertext in sealed.values()):
            raise RefusedError(f"{agent!r} has sealed shares of another length than {SEALED_BYTES}")
        return True

    def _new_vector(self, agent: str) -> bool:
        if agent in self._all.stored:
            return False
        if self.phase is not ServerPhase.MASKED or agent not in self._all.sharing:
            raise RefusedError(f"no masked vector is expected of {agent!r} now")
        return True

    def _new_agreement(self, agent: str, digest: bytes) -> bool:
        if agent not in self._all.survivors:
            raise RefusedError(f"{agent!r} is not a survivor")
        if digest != self._all.agreement:
            raise RefusedError(f"{agent!r} has signed other survivors than it was told")
        return agent not in self._all.agreed and self.phase not in _OVER

    def _new_reveal(self, agent: str, seeds: Mapping[str, bytes], keys: Mapping[str, bytes]) -> bool:
        if self._all.recovery is None or agent not in self._all.agreed:
            raise RefusedError(f"{agent!r} was not asked to reveal")
        self._all.recovery.check(agent, seeds, keys)
        return agent not in self._all.revealed and self.phase is ServerPhase.REVEALS

    # --- what follows ---------------------------------------------------------------------------------------------

    def _apply(self, event: ServerEvent, now: float) -> list[ServerCommand]:
        match event:
            case CloseMasking() if self.phase is not ServerPhase.MASKED:
                return self._abort("the time for masked vectors is over, and no shares were exchanged")
            case Tick() | CloseMasking():
                return self._settle(now, over=True)
            case AgentGone(agent):
                self._all.gone.add(agent)
                return self._settle(now)
            case KeysArrived(agent, keys) if self.phase is not ServerPhase.KEYS:
                self._all.gone.add(agent)
                return self._settle(now)
            case KeysArrived(agent, keys):
                self._all.keys[agent] = keys
            case SharesArrived(agent, sealed):
                self._all.sealed[agent] = dict(sealed)
            case MaskedStored(agent):
                self._all.stored.add(agent)
            case AgreementArrived(agent, _):
                self._all.agreed.add(agent)
            case RevealArrived(agent, seeds, keys):
                assert self._all.recovery is not None
                self._all.revealed.add(agent)
                self._all.recovery.add(agent, seeds, keys)
        self._all.gone.discard(event.agent)
        late = self._answer(event) if self.phase is ServerPhase.REVEALS else []
        return [*late, *self._settle(now)]

    def _settle(self, now: float, *, over: bool = False) -> list[ServerCommand]:
        """Go on if all have answered, or the time is up; abort if it is up and they are too few."""
        if self.phase in _OVER:
            return []
        if self.phase is ServerPhase.REVEALS:
            return self._unmask(over=over)
        if not over and self._all.missing(self.phase) - self._all.gone:
            return []
        lacking = self._all.lacking(self.phase)
        if lacking:
            # Some that are gone may come back before the time is up.
            return self._abort(lacking) if over else []
        self._deadline = now + self._phase_s
        return self._opening(self._advance())

    def _advance(self) -> list[str]:
        """Close the phase; returns to whom the opening of the next one is addressed."""
        match self.phase:
            case ServerPhase.KEYS:
                self._all.close_roster()
                self.phase = ServerPhase.SHARES
                return sorted(self._all.members)
            case ServerPhase.SHARES:
                self._all.close_shares()
                self.phase = ServerPhase.MASKED
                return sorted(self._all.sharing)
            case ServerPhase.MASKED:
                self._all.close_masking()
                self.phase = ServerPhase.AGREEMENTS
                return list(self._all.survivors)
            case _:
                self._all.close_agreements()
                self.phase = ServerPhase.REVEALS
                return sorted(self._all.agreed)

    def _unmask(self, *, over: bool) -> list[ServerCommand]:
        recovery = self._all.recovery
        assert recovery is not None
        waiting = not over and self._all.missing(self.phase) - self._all.gone
        # One early try; if a share proves false, those that are still to come may replace it.
        if waiting and (self._tried or not recovery.enough):
            return []
        self._tried = True
        try:
            self._end = [Unmask(recovery.plan())]
        except UnrecoverableError as error:
            return self._abort(str(error)) if over else []
        self.phase = ServerPhase.DONE
        return list(self._end)

    def _abort(self, reason: str) -> list[ServerCommand]:
        self._end = [Abort(reason, tuple(sorted(self._all.missing(self.phase))))]
        self.phase = ServerPhase.ABORTED
        return list(self._end)

    # --- what is said ---------------------------------------------------------------------------------------------

    def _opening(self, audience: Iterable[str]) -> list[ServerCommand]:
        """What begins the present phase, for these devices."""
        return [command for name in audience for command in self._told(self.phase, name)]

    def _answer(self, event: ServerEvent) -> list[ServerCommand]:
        """What the sender of a repeat is waiting for, if it is there."""
        match event:
            case KeysArrived(agent) if agent in self._all.members - self._all.gone:
                return self._told(ServerPhase.SHARES, agent)
            case SharesArrived(agent) if agent in self._all.sharing:
                return self._told(ServerPhase.MASKED, agent)
            case MaskedStored(agent) if agent in self._all.survivors:
                return self._told(ServerPhase.AGREEMENTS, agent)
            case AgreementArrived(agent) if self._all.recovery is not None:
                return self._told(ServerPhase.REVEALS, agent)
            case _:
                return []

    def _told(self, phase: ServerPhase, name: str) -> list[ServerCommand]:
        """What a device is told when a phase begins."""
        graph = self._all.graph
        if graph is None:
            return []
        match phase:
            case ServerPhase.SHARES:
                return [SendRoster(name, graph.names, tuple(sorted(graph.holders(name))))]
            case ServerPhase.MASKED:
                senders = sorted(graph.neighbours(name) & self._all.sharing)
                return [SendShares(name, {sender: self._all.sealed[sender][name] for sender in senders})]
            case ServerPhase.AGREEMENTS:
                return [SendSurvivors(name, self._all.survivors)]
            case _:
                holders = self._all.holders_agreed(name)
                return [SendAgreements(name, tuple(sorted(holders - {name})))] if holders else []
