"""This device's part in a masked sum: between the link, the identities of its neighbours and the state machine.

What the aggregator and, through it, the neighbours send is verified here; what it means is decided by
:class:`privacy.secagg.client.Client`. Its secrets live in memory: a device that restarts takes no further part in the
attempt, and its neighbours' shares take its place.

::

    STATE/secagg/opened     the last round of which this device opened a sum; written before it does
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_agent.identities import Identities
from edge_agent.session import Event, MasksReady, WorkFailed
from federation.errors import ConfigError, FedgeError, PeerError, Rejection
from federation.files import write_whole
from federation.wire.fields import Attempt, RoundNumber, RunId
from federation.wire.masking import (
    Agreement,
    Agreements,
    DownMessage,
    MaskingKeys,
    MaskingMessage,
    Reveal,
    Roster,
    SealedShares,
    Survivors,
    masking_context,
)
from federation.wire.messages import DeclineCode, RoundPlan
from federation.wire.signing import AGGREGATOR, Purpose, seal, unseal
from federation.wire.terms import SecAggTerms
from privacy.distributed import least_survivors
from privacy.secagg import client_messages as machine
from privacy.secagg.agreement import PublicKeys, Terms, context_of
from privacy.secagg.client import Client
from privacy.secagg.masks import MaskPlan

M = TypeVar("M", bound=MaskingMessage)

log = structlog.get_logger()

REPEAT_S = 2.0
"""After so long without an answer a message is sent once more."""


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of which sum this device has let go of shares.

    Attributes:
        run: As in the plan.
        round: As in the plan.
        attempt: As in the plan.
    """

    run: RunId
    round: RoundNumber
    attempt: Attempt


class SecureUpdate:
    """One device's dealings with its neighbours. All methods are called by the agent's loop.

    Args:
        folder: ``STATE/secagg``; must exist.
        federation: Its name.
        agent: This device's.
        key: Its identity.
        aggregator_key: Pinned.
        identities: Of its neighbours.
        publish: Sends a signed message to the aggregator.
    """

    def __init__(
        self,
        folder: Path,
        *,
        federation: str,
        agent: str,
        key: Ed25519PrivateKey,
        aggregator_key: Ed25519PublicKey,
        identities: Identities,
        publish: Callable[[bytes], None],
    ) -> None:
        self._path = folder / "opened"
        self._federation, self._agent, self._key = federation, agent, key
        self._aggregator_key, self._identities, self._publish = aggregator_key, identities, publish
        self._opened = _read_opened(self._path)
        self._plan: RoundPlan | None = None
        self._client: Client | None = None
        self._masks: MaskPlan | None = None
        self._neighbours: dict[str, Ed25519PublicKey] = {}

    def join(self, plan: RoundPlan, now: float) -> list[Event]:
        """Begin an attempt with fresh secrets; those of an earlier one are forgotten.

        Returns:
            Why this device cannot take part, if so.
        """
        self.leave()
        opened = self._opened
        if opened is not None and (opened.run, opened.round) == (plan.run, plan.round):
            if opened.attempt == plan.attempt:  # restarted since: others hold what is needed of it
                return []
            return [
                self._unfit(
                    plan,
                    f"this device has opened the sum of attempt {opened.attempt}, and opens no second one of a round",
                )
            ]
        terms = plan.privacy.secagg
        assert terms is not None
        self._plan = plan
        self._client = Client(
            self._agent,
            context_of(*masking_context(self._federation, plan)),
            machine_terms(terms, len(plan.cohort)),
            repeat_s=REPEAT_S,
        )
        return self._carry_out(self._client.start(now))

    def leave(self) -> None:
        """Forget all secrets: the round is over, or another attempt begins."""
        if self._client is not None:
            self._client.handle(machine.Cancelled("the round is over"), 0.0)
        self._plan, self._client, self._masks = None, None, None
        self._neighbours = {}

    def take_masks(self) -> MaskPlan:
        """The masks of the attempt, for one use, after :class:`MasksReady`."""
        masks, self._masks = self._masks, None
        assert masks is not None
        return masks

    def masked(self, attempt: int, now: float) -> None:
        """The update of this attempt is masked and on disk."""
        if self._client is not None and self._plan is not None and self._plan.attempt == attempt:
            self._client.handle(machine.VectorMasked(), now)

    def message(self, data: bytes, now: float) -> list[Event]:
        """Take the aggregator's envelope.

        Returns:
            What it means for the round.

        Raises:
            PeerError: If nobody whom this device believes has signed it. It is as if it had not come.
        """
        message: DownMessage = unseal(
            data,
            Roster | SealedShares | Survivors | Agreements,  # type: ignore[arg-type]  # msgspec takes a union of tagged structs
            purpose=Purpose.MASKING_DOWN,
            federation=self._federation,
            sender=AGGREGATOR,
            key=self._aggregator_key,
        )
        client, plan = self._client, self._plan
        if client is None or plan is None or not message.is_of(plan):
            log.debug("masking_ignored", round=message.round, attempt=message.attempt)
            return []
        try:
            event = self._event(message, plan)
        except FedgeError as error:  # signed by the aggregator: it is deceived, or lies
            client.handle(machine.Cancelled(str(error)), now)
            return [self._unfit(plan, str(error))]
        return self._carry_out(client.handle(event, now))

    def tick(self, now: float) -> list[Event]:
        """Time has passed: repeat what has no answer."""
        return [] if self._client is None else self._carry_out(self._client.handle(machine.Tick(), now))

    def reconnected(self, now: float) -> list[Event]:
        """The link is back: what had no answer may have been lost with it."""
        wakeup = self.next_wakeup()
        return [] if wakeup is None else self.tick(max(now, wakeup))

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` is due, monotonic seconds."""
        return None if self._client is None else self._client.next_wakeup()

    # --- what came ------------------------------------------------------------------------------------------------

    def _event(self, message: DownMessage, plan: RoundPlan) -> machine.ClientEvent:
        match message:
            case Roster():
                return self._roster(message, plan)
            case SealedShares(sealed=sealed):
                return machine.SharesArrived(sealed)
            case Survivors(names=names):
                return machine.SurvivorsArrived(names)
            case Agreements(signed=signed):
                return machine.AgreementsArrived(self._agreed(signed, plan))

    def _roster(self, roster: Roster, plan: RoundPlan) -> machine.RosterArrived:
        """Check that every device of the roster is one that this device knows, and that its neighbours' keys are theirs."""
        self._identities.check_names(roster.names)
        strangers = sorted(set(roster.names) - set(plan.cohort))
        if strangers:
            raise PeerError(
                Rejection.NOT_IN_COHORT, f"{strangers[0]!r} is in the roster, and not in the plan"
            )
        identities = {name: member.identity for name, member in roster.members.items()}
        if identities.get(self._agent) != self._key.public_key().public_bytes_raw():
            raise PeerError(Rejection.BAD_SIGNATURE, "the roster has another identity of this device")
        keys, neighbours = {}, {}
        for name, member in roster.members.items():
            identity = Ed25519PublicKey.from_public_bytes(member.identity)
            theirs = self._verified(member.keys, MaskingKeys, Purpose.MASKING_KEYS, name, identity)
            if not theirs.is_of(plan) or theirs.base != plan.base:
                raise PeerError(
                    Rejection.STALE_ROUND,
                    f"the keys of {name!r} are of round {theirs.round}, attempt {theirs.attempt}",
                )
            keys[name] = PublicKeys(theirs.mask, theirs.seal, theirs.seed_commitment)
            neighbours[name] = identity
        self._identities.check(identities)
        self._neighbours = neighbours
        return machine.RosterArrived(roster.names, keys)

    def _agreed(self, signed: Mapping[str, bytes], plan: RoundPlan) -> dict[str, bytes]:
        """The digests that neighbours have signed; what is not theirs does not count."""
        digests = {}
        for name, data in signed.items():
            identity = self._neighbours.get(name)
            try:
                if identity is None:
                    raise PeerError(Rejection.WRONG_SENDER, f"{name!r} is no neighbour")
                theirs = self._verified(data, Agreement, Purpose.MASKING_AGREEMENT, name, identity)
                if not theirs.is_of(plan):
                    raise PeerError(
                        Rejection.STALE_ROUND,
                        f"{name!r} agreed in round {theirs.round}, attempt {theirs.attempt}",
                    )
            except PeerError as error:
                log.warning("agreement_refused", agent=name, code=error.code.value, detail=error.detail)
            else:
                digests[name] = theirs.digest
        return digests

    def _verified(
        self, data: bytes, kind: type[M], purpose: Purpose, name: str, identity: Ed25519PublicKey
    ) -> M:
        return unseal(data, kind, purpose=purpose, federation=self._federation, sender=name, key=identity)

    # --- carrying out ---------------------------------------------------------------------------------------------

    def _carry_out(self, commands: list[machine.ClientCommand]) -> list[Event]:
        plan = self._plan
        assert plan is not None
        here = {"run": plan.run, "round": plan.round, "attempt": plan.attempt}
        events: list[Event] = []
        for command in commands:
            match command:
                case machine.SendKeys(keys):
                    message = MaskingKeys(
                        **here,  # type: ignore[arg-type]
                        base=plan.base,
                        mask=keys.mask,
                        seal=keys.seal,
                        seed_commitment=keys.seed_commitment,
                    )
                    self._send(message, Purpose.MASKING_KEYS)
                case machine.SendShares(sealed):
                    self._send(SealedShares(**here, sealed=dict(sealed)), Purpose.MASKING)  # type: ignore[arg-type]
                case machine.ApplyMasks(masks):
                    self._masks = masks
                    log.info("masks_agreed", **here, neighbours=len(masks) - 1)
                    events.append(MasksReady(plan.attempt))
                case machine.SendAgreement(digest):
                    self._send(Agreement(**here, digest=digest), Purpose.MASKING_AGREEMENT)  # type: ignore[arg-type]
                case machine.SendReveal(seeds, keys):
                    events += self._reveal(plan, Reveal(**here, seeds=dict(seeds), keys=dict(keys)))  # type: ignore[arg-type]
                case machine.Ignored(reason):
                    log.warning("masking_ignored", round=plan.round, reason=reason)
                case machine.Abort(reason):
                    events.append(self._unfit(plan, reason))
        return events

    def _reveal(self, plan: RoundPlan, reveal: Reveal) -> list[Event]:
        """Let go of shares, once it is on the disk that this was the round's only sum."""
        opened = Opened(run=plan.run, round=plan.round, attempt=plan.attempt)
        if self._opened != opened:
            try:
                write_whole(self._path, msgspec.json.encode(opened))
            except ConfigError as error:
                return [WorkFailed(plan.run, plan.round, str(error))]
            self._opened = opened
            log.info(
                "sum_opened",
                round=plan.round,
                attempt=plan.attempt,
                survivors=len(reveal.seeds),
                vanished=len(reveal.keys),
            )
        self._send(reveal, Purpose.MASKING)
        return []

    def _send(self, message: MaskingMessage, purpose: Purpose) -> None:
        self._publish(
            seal(message, purpose=purpose, federation=self._federation, sender=self._agent, key=self._key)
        )

    def _unfit(self, plan: RoundPlan, reason: str) -> WorkFailed:
        return WorkFailed(plan.run, plan.round, reason, DeclineCode.TERMS)


def machine_terms(terms: SecAggTerms, cohort: int) -> Terms:
    """What a plan promises, in the words of :mod:`privacy.secagg`; both sides take the same.

    Args:
        terms: Of the plan.
        cohort: Its size.
    """
    least = least_survivors(
        terms.min_agents, agents=cohort, dropouts=terms.dropouts, noise_multiplier=terms.noise_multiplier
    )
    return Terms(min_agents=least, dropouts=terms.dropouts)


def _read_opened(path: Path) -> Opened | None:
    """Read it.

    Raises:
        ConfigError: If it is damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Opened)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path} is damaged ({error}): delete it when the round that was open is closed"
        ) from error
