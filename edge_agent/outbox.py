"""The update on its way out: encoded, signed, on disk until the aggregator's receipt says that it is safe there.

::

    STATE/outbox/update    the encoded delta
    STATE/outbox/offer     the signed offer; written last: without it the update is a leftover
    STATE/outbox/feedback  what encodings left out (:mod:`edge_agent.feedback`)
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from edge_agent.feedback import Feedback, FeedbackKey
from federation.errors import PeerError
from federation.files import write_whole
from federation.wire.codec import decode, encode, schema_of
from federation.wire.encodings import encoding_named
from federation.wire.messages import Receipt, RoundPlan, TrainMetrics, UpdateOffer
from federation.wire.noise import noise_bounds
from federation.wire.objects import read_chunk
from federation.wire.signing import Purpose, seal, unseal
from federation.wire.terms import Spent
from federation.wire.transfer import cut_size, make_ref


class Outbox:
    """Holds at most one update.

    Args:
        folder: ``STATE/outbox``; created.
        federation: Goes into the signature.
        agent: Who signs.
        key: With which.
        preferred_chunk_bytes: Chunks that suit a slow link; None for as large as may be.
    """

    def __init__(
        self,
        folder: Path,
        *,
        federation: str,
        agent: str,
        key: Ed25519PrivateKey,
        preferred_chunk_bytes: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._update, self._offer = folder / "update", folder / "offer"
        for leftover in folder.glob(".*"):  # power loss in the middle of a write
            leftover.unlink()
        self._feedback = Feedback(folder / "feedback")
        self._federation, self._agent, self._key = federation, agent, key
        self._preferred_chunk_bytes = preferred_chunk_bytes
        self._sent: set[tuple[str, int]] = set()

    def put(
        self,
        plan: RoundPlan,
        base: Mapping[str, NDArray[np.float32]],
        delta: Mapping[str, NDArray[np.float32]],
        *,
        samples: int,
        metrics: TrainMetrics,
        rng: np.random.Generator,
        chunk_bytes: int,
        private: bool = False,
        spent: Spent | None = None,
    ) -> UpdateOffer:
        """Encode, sign and store an update.

        Args:
            plan: The round that it is for.
            base: The model that the round starts from.
            delta: New minus base model, float32.
            samples: Its weight.
            metrics: Of the training.
            rng: Drives stochastic rounding.
            chunk_bytes: The largest into which it may be cut.
            private: Whether the training was private: what an encoding leaves out stays on its side.
            spent: What the ledger says, under sample-level terms.

        Returns:
            The offer that was signed.

        Raises:
            ConfigError: If the disk is full, or the delta cannot be encoded.
        """
        self.clear()
        kept = FeedbackKey(run=plan.run, model=plan.task.model, encoding=plan.up_encoding, private=private)
        stateful = encoding_named(plan.up_encoding).stateful
        if stateful:
            delta = self._feedback.corrected(delta, kept)
        else:
            self._feedback.drop("the encoding needs none")
        data = encode(delta, plan.up_encoding, rng, noise_bounds(base, delta, plan.max_noise))
        offer = UpdateOffer(
            run=plan.run,
            round=plan.round,
            base=plan.base,
            object=make_ref(data, cut_size(len(data), chunk_bytes, self._preferred_chunk_bytes)),
            encoding=plan.up_encoding,
            samples=samples,
            metrics=metrics,
            attempt=plan.attempt,
            spent=spent,
        )
        if stateful:
            sent = decode(data, schema_of(delta), plan.up_encoding)
            self._feedback.stage(
                offer.object.sha256, kept, {name: array - sent[name] for name, array in delta.items()}
            )
        return self._keep(offer, data)

    def put_masked(
        self, plan: RoundPlan, data: bytes, *, metrics: TrainMetrics, spent: Spent | None, chunk_bytes: int
    ) -> UpdateOffer:
        """Sign and store a masked update.

        Args:
            plan: The attempt that it is for.
            data: Its integers.
            metrics: Of the training.
            spent: What the ledger says, under sample-level terms.
            chunk_bytes: The largest into which it may be cut.

        Returns:
            The offer that was signed.

        Raises:
            ConfigError: If the disk is full.
        """
        self.clear()
        self._feedback.drop("masked updates need none")
        offer = UpdateOffer(
            run=plan.run,
            round=plan.round,
            base=plan.base,
            object=make_ref(data, cut_size(len(data), chunk_bytes, self._preferred_chunk_bytes)),
            encoding=plan.up_encoding,
            samples=1,
            metrics=metrics,
            attempt=plan.attempt,
            spent=spent,
        )
        return self._keep(offer, data)

    def _keep(self, offer: UpdateOffer, data: bytes) -> UpdateOffer:
        sealed = seal(
            offer, purpose=Purpose.AGENT, federation=self._federation, sender=self._agent, key=self._key
        )
        write_whole(self._update, data)
        write_whole(self._offer, sealed)
        return offer

    def pending(self) -> UpdateOffer | None:
        """The update that an earlier process left here, if it is whole; a damaged one is deleted."""
        if not self._offer.exists():
            return None
        try:
            return unseal(
                self.sealed_offer(),
                UpdateOffer,
                purpose=Purpose.AGENT,
                federation=self._federation,
                sender=self._agent,
                key=self._key.public_key(),
            )
        except PeerError:  # written by an earlier identity of this device, or by another version
            self.clear()
            return None

    def sealed_offer(self) -> bytes:
        """The signed offer, ready to publish."""
        return self._offer.read_bytes()

    def chunk(self, offer: UpdateOffer, index: int) -> bytes:
        """One chunk of the update.

        It is compared with its digest when it is asked for again: the aggregator does so with every chunk, and asks
        again for one that is damaged.

        Raises:
            VerificationError: If the disk has lost or changed it.
            ConfigError: If it cannot be read.
        """
        again = (offer.object.sha256, index) in self._sent
        self._sent.add((offer.object.sha256, index))
        return read_chunk(self._update, offer.object, index, check=again)

    def settle(self, receipt: Receipt) -> None:
        """Take note of what a receipt says, before the update is forgotten: what it left out comes into effect or not."""
        self._feedback.settle(receipt.sha256, accepted=receipt.accepted)

    def clear(self) -> None:
        """Forget the update."""
        self._sent.clear()
        self._offer.unlink(missing_ok=True)
        self._update.unlink(missing_ok=True)
        self._feedback.abandon()
