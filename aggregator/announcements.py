"""What the aggregator says to everybody: its state, and the plan. Both are retained, so latecomers hear them too."""

import secrets
import time

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federation.wire.link import LinkLike, Will
from federation.wire.messages import STATE_INTERVAL_S, AggregatorState, Plan, RoundPlan, encode_json
from federation.wire.signing import AGGREGATOR, Purpose, seal
from federation.wire.topics import Topics


class Announcements:
    """State and plan of one process life. Single-threaded.

    Args:
        topics: Of the federation.
        key: The aggregator's, for plans.
        run: Of the state folder.

    Attributes:
        session: Identifier of this process life.
        due: When :meth:`refresh` is due, monotonic seconds.
    """

    def __init__(self, topics: Topics, key: Ed25519PrivateKey, run: str) -> None:
        self._topics, self._key, self._run = topics, key, run
        self.session = secrets.token_hex(8)
        self.due = 0.0
        self._plan: bytes | None = None
        self._held: RoundPlan | None = None

    @property
    def will(self) -> Will:
        """The death that the broker announces if this process vanishes."""
        return Will(
            self._topics.aggregator, encode_json(AggregatorState(state="offline", session=self.session))
        )

    def refresh(self, link: LinkLike, now: float) -> None:
        """Publish the state, with the time by this machine's clock."""
        state = AggregatorState(state="online", session=self.session, run=self._run, time=time.time())
        link.publish(self._topics.aggregator, encode_json(state), qos=1, retain=True)
        self.due = now + STATE_INTERVAL_S

    def repeat(self, link: LinkLike, now: float) -> None:
        """Publish everything again, since the broker may have lost it."""
        self.refresh(link, now)
        if self._plan is not None:
            link.publish(self._topics.plan, self._plan, qos=1, retain=True)

    def plan(self, plan: Plan, link: LinkLike) -> None:
        """Publish a plan now, and forget the one that was held back."""
        self._held = None
        self._plan = seal(
            plan, purpose=Purpose.PLAN, federation=self._topics.federation, sender=AGGREGATOR, key=self._key
        )
        link.publish(self._topics.plan, self._plan, qos=1, retain=True)

    def hold(self, plan: RoundPlan) -> None:
        """Publish a plan once the broker holds its model: an agent that asks too early waits for a retry."""
        self._held = plan

    def model_present(self, sha256: str, link: LinkLike) -> None:
        """The broker holds this model."""
        if self._held is not None and self._held.base.sha256 == sha256:
            self.plan(self._held, link)

    def last_words(self) -> list[tuple[str, bytes, int, bool]]:
        """What to publish before the link is closed."""
        plan = [] if self._plan is None else [(self._topics.plan, self._plan, 1, True)]
        return [*plan, (self._topics.aggregator, self.will.payload, 1, True)]
