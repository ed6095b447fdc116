"""Uploads: offers at the door, credits out, chunks to disk, receipts back. Owns the open round's admission state."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregator.admission import Limits, OpenRound, check_offer, check_round, open_message
from aggregator.folding import keep_update
from aggregator.masked_sum import keep_masked
from aggregator.rounds import AgentOut, Event, UpdateStored
from aggregator.store import Store
from federation.errors import PeerError, Rejection, TransportError
from federation.wire.credit import CREDIT_BYTES, Progress
from federation.wire.link import LinkLike
from federation.wire.messages import Credit, Decline, Receipt, UpdateOffer, encode_msgpack
from federation.wire.objects import PartialObject
from federation.wire.signing import AGGREGATOR, Purpose, seal
from federation.wire.topics import Topics
from federation.wire.transfer import Complete, CreditCommand, CreditScheduler, Grant, check_chunk

log = structlog.get_logger()

REFUSAL_LOG_INTERVAL_S = 1.0
"""At most one refusal per agent and code is written to disk in this time: a flood must not wear the disk out."""

FINAL = frozenset(
    {
        Rejection.WRONG_BASE,
        Rejection.WRONG_ENCODING,
        Rejection.WRONG_LENGTH,
        Rejection.BAD_SAMPLE_COUNT,
        Rejection.MISSING_SPENT,
        Rejection.WRONG_SPENT,
    }
)
"""Refusals of an offer that mean that a member of the cohort has nothing better to offer in this round: it drops a
refused update, so waiting for it until the deadline would be in vain."""


@dataclass(slots=True)
class _Upload:
    offer: UpdateOffer
    partial: PartialObject


@dataclass(frozen=True, slots=True)
class Checked:
    """A complete upload was checked, away from the event loop.

    Attributes:
        agent: Whose it is.
        offer: What was promised.
        error: Why it is refused; None when it is on disk.
    """

    agent: str
    offer: UpdateOffer
    error: BaseException | None


class Reception:
    """Takes updates in. Single-threaded: all methods are called by the service's loop.

    Args:
        link: For credits and receipts.
        topics: Of the federation.
        store: Where updates go.
        key: The aggregator's, for receipts.
        key_of: Public keys of enrolled agents.
        limits: Bounds on an update.
        executor: Where complete uploads are checked.
        post: Hands a :class:`Checked` back to the loop, from any thread.
        members: Who may deliver in a masked round.
        credit_bytes: What all agents together are asked for at once.
    """

    def __init__(
        self,
        *,
        link: LinkLike,
        topics: Topics,
        store: Store,
        key: Ed25519PrivateKey,
        key_of: Callable[[str], Ed25519PublicKey | None],
        limits: Limits,
        executor: Executor,
        post: Callable[[Checked], None],
        members: Callable[[], frozenset[str]] = frozenset,
        credit_bytes: int = CREDIT_BYTES,
    ) -> None:
        self._link, self._topics, self._store = link, topics, store
        self._key, self._key_of, self._limits = key, key_of, limits
        self._executor, self._post, self._members = executor, post, members
        self._credits = CreditScheduler(credit_bytes=credit_bytes)
        self._uploads: dict[str, _Upload] = {}
        self._checking: dict[str, str] = {}
        self._last_refusal: dict[tuple[str, Rejection], float] = {}
        self._state: OpenRound | None = None

    def open(self, state: OpenRound) -> None:
        """Take updates for this round."""
        self._state = state

    def shut(self) -> None:
        """Take no further update for the round; uploads in progress are dropped."""
        if self._state is not None:
            self._state = replace(self._state, open=False)
        for agent in list(self._uploads):
            self._drop(agent)

    def progress(self) -> list[Progress]:
        """How far the uploads are."""
        return self._credits.progress()

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` is due, monotonic seconds."""
        return self._credits.next_wakeup()

    def tick(self, now: float) -> None:
        """Grant again what was lost."""
        self._carry_out(self._credits.tick(now))

    def gone(self, agent: str) -> None:
        """The agent is offline: give its place to another. What it has sent is kept."""
        self._carry_out(self._credits.gone(agent))
        upload = self._uploads.pop(agent, None)
        if upload is not None:
            upload.partial.close()

    def back(self, agent: str) -> None:
        """The agent's link was lost and is back: what was on its way is asked for anew."""
        self._credits.reconnected(agent)

    def message(self, agent: str, data: bytes, now: float) -> list[Event]:
        """Take a signed message from an agent's branch.

        Returns:
            What it means for the round.
        """
        try:
            message = open_message(data, agent=agent, federation=self._topics.federation, key_of=self._key_of)
        except PeerError as error:
            # No receipt: nobody has proved to be the agent, and a receipt would make it drop its update.
            self._log_refusal(agent, error, now)
            return []
        if isinstance(message, Decline):
            return self._decline(message, agent, now)
        return self._offer(message, agent, now)

    def _decline(self, decline: Decline, agent: str, now: float) -> list[Event]:
        if self._state is None:
            return []
        try:
            check_round(decline, agent, self._require_state())
        except PeerError as error:
            self._log_refusal(agent, error, now)
            return []
        log.warning(
            "round_declined",
            agent=agent,
            round=decline.round,
            code=decline.code.value,
            reason=decline.reason,
        )
        self._store.record_decline(agent, decline)
        return [AgentOut(agent)]

    def _offer(self, offer: UpdateOffer, agent: str, now: float) -> list[Event]:
        if self._state is None or self._checking.get(agent) == offer.object.sha256:
            return []  # nothing is known of it yet: the agent offers again
        if not self._counts(offer, agent):
            log.debug("offer_ignored", agent=agent, round=offer.round, attempt=offer.attempt)
            return []
        try:
            if check_offer(offer, agent, self._require_state(), self._limits):
                self._receipt(agent, offer)
                return []
            if agent in self._checking:
                raise PeerError(Rejection.DUPLICATE, f"another update of {agent!r} is being checked")
        except PeerError as error:
            self._refuse(agent, offer, error, now)
            return [AgentOut(agent)] if error.code in FINAL else []
        upload = self._uploads.get(agent)
        if upload is None or upload.offer.object != offer.object:
            self._drop(agent)
            path = self._store.incoming_path(agent, offer.object.sha256)
            upload = self._uploads[agent] = _Upload(offer, PartialObject(path, offer.object))
        self._carry_out(self._credits.offer(agent, offer.object, upload.partial.have, now))
        return []

    def _counts(self, offer: UpdateOffer, agent: str) -> bool:
        """Whether a masked update may count: one of another attempt is of no use, and no fault of who offers it."""
        state = self._require_state()
        if state.masking is None or (offer.run, offer.round) != (state.run, state.round) or not state.open:
            return True
        return offer.attempt == state.masking.attempt and (
            agent in self._members() or state.accepted.get(agent) == offer.object.sha256
        )

    def chunk(self, agent: str, sha256: str, index: int, payload: bytes, now: float) -> None:
        """Take a chunk; one that was not asked for is dropped unread."""
        upload = self._uploads.get(agent)
        if upload is None or not self._credits.wanted(agent, sha256, index):
            log.debug("chunk_unasked", agent=agent, object=sha256[:12], index=index)
            return
        try:
            check_chunk(upload.offer.object, index, payload)
        except PeerError as error:
            self._log_refusal(agent, error, now)
            self._carry_out(self._credits.bad_chunk(agent, sha256, index, now))
            return
        upload.partial.write(index, payload)
        self._carry_out(self._credits.chunk(agent, sha256, index, now))

    def checked(self, result: Checked, now: float) -> list[Event]:
        """Commit an update that passed, or refuse one that did not."""
        agent, offer = result.agent, result.offer
        self._checking.pop(agent, None)
        state = self._require_state()
        if isinstance(result.error, PeerError):
            self._refuse(agent, offer, result.error, now)
            return [AgentOut(agent)] if offer.round == state.round else []
        try:
            check_offer(offer, agent, state, self._limits)
        except (
            PeerError
        ) as error:  # the round was closed, or another one opened, while this was being checked
            self._refuse(agent, offer, error, now)
            return []
        if not self._counts(offer, agent):
            return []
        if result.error is not None:
            raise result.error
        self._store.record_update(offer.round, agent, offer)
        self._state = replace(state, accepted={**state.accepted, agent: offer.object.sha256})
        self._receipt(agent, offer)
        log.info(
            "update_accepted",
            agent=agent,
            round=offer.round,
            bytes=offer.object.length,
            samples=offer.samples,
            train_s=round(offer.metrics.train_s, 2),
        )
        return [UpdateStored(agent)]

    def _carry_out(self, commands: list[CreditCommand]) -> None:
        for command in commands:
            match command:
                case Grant(agent, sha256, indices):
                    credit = Credit(sha256=sha256, chunks=indices)
                    self._send(self._topics.credit(agent), encode_msgpack(credit))
                case Complete(agent):
                    self._check(agent)

    def _check(self, agent: str) -> None:
        upload = self._uploads.pop(agent)
        offer, state = upload.offer, self._require_state()
        self._checking[agent] = offer.object.sha256
        target = self._store.update_path(offer.round, agent)
        work = (
            partial(keep_update, upload.partial, target, state.schema, state.encoding, self._limits)
            if state.masking is None
            else partial(keep_masked, upload.partial, target, state.masking)
        )
        future = self._executor.submit(work)

        def hand_back(done: Future[None]) -> None:
            self._post(Checked(agent, offer, done.exception()))

        future.add_done_callback(hand_back)

    def _drop(self, agent: str) -> None:
        self._carry_out(self._credits.cancel(agent))
        upload = self._uploads.pop(agent, None)
        if upload is not None:
            upload.partial.discard()

    def _receipt(self, agent: str, offer: UpdateOffer, error: PeerError | None = None) -> None:
        receipt = Receipt(
            run=offer.run,
            round=offer.round,
            sha256=offer.object.sha256,
            accepted=error is None,
            code=error.code if error else None,
            detail=error.detail[:1000] if error else "",
        )
        sealed = seal(
            receipt,
            purpose=Purpose.RECEIPT,
            federation=self._topics.federation,
            sender=AGGREGATOR,
            key=self._key,
        )
        self._send(self._topics.receipt(agent), sealed)

    def _refuse(self, agent: str, offer: UpdateOffer, error: PeerError, now: float) -> None:
        self._log_refusal(agent, error, now)
        self._receipt(agent, offer, error)

    def _log_refusal(self, agent: str, error: PeerError, now: float) -> None:
        # Strangers share one entry: on a broker without access control, names are free to invent.
        who = "" if error.code is Rejection.UNKNOWN_AGENT else agent
        last = self._last_refusal.get((who, error.code))
        if last is not None and now < last + REFUSAL_LOG_INTERVAL_S:
            return
        self._last_refusal[who, error.code] = now
        log.warning("refused", agent=agent, code=error.code.value, detail=error.detail)
        self._store.record_refusal(self._state.round if self._state else 0, agent, error.code, error.detail)

    def _send(self, topic: str, payload: bytes) -> None:
        try:
            if not self._link.publish(topic, payload, qos=1):
                log.debug("send_skipped", topic=topic, reason="not connected; the agent will offer again")
        except TransportError as error:
            log.warning("send_failed", topic=topic, reason=str(error))

    def _require_state(self) -> OpenRound:
        if self._state is None:
            raise PeerError(Rejection.FUTURE_ROUND, "no round has been opened yet")
        return self._state
