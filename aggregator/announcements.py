"""What the aggregator says to everybody: its state, and the plan. Both are retained, so latecomers hear them too."""

import secrets
import time
from math import inf

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federation.wire.link import LinkLike, Will
from federation.wire.messages import STATE_INTERVAL_S, AggregatorState, Plan, RoundPlan, encode_json
from federation.wire.signing import AGGREGATOR, Purpose, seal
from federation.wire.topics import Topics

PLAN_REPEAT_S = 1.0
"""A plan is published once more after this time. nats-server may deliver only the former one to an agent that subscribes
just as it is replaced; the repetition replaces it by itself, so nobody can miss it any more."""


class Announcements:
    """State and plan of one process life. Single-threaded.

    Args:
        topics: Of the federation.
        key: The aggregator's, for plans.
        run: Of the state folder.

    Attributes:
        session: Identifier of this process life.
    """

    def __init__(self, topics: Topics, key: Ed25519PrivateKey, run: str) -> None:
        self._topics, self._key, self._run = topics, key, run
        self.session = secrets.token_hex(8)
        self._state_due = 0.0
        self._plan_due = inf
        self._plan: bytes | None = None
        self._held: RoundPlan | None = None

    @property
    def will(self) -> Will:
        """The death that the broker announces if this process vanishes."""
        return Will(
            self._topics.aggregator, encode_json(AggregatorState(state="offline", session=self.session))
        )

    @property
    def due(self) -> float:
        """When :meth:`refresh` has something to do, monotonic seconds."""
        return min(self._state_due, self._plan_due)

    def refresh(self, link: LinkLike, now: float) -> None:
        """Publish again what is due: the state from time to time, a plan once."""
        if now >= self._state_due:
            self._publish_state(link, now)
        if now >= self._plan_due:
            self._plan_due = inf
            self._publish_plan(link)

    def _publish_state(self, link: LinkLike, now: float) -> None:
        state = AggregatorState(state="online", session=self.session, run=self._run, time=time.time())
        link.publish(self._topics.aggregator, encode_json(state), qos=1, retain=True)
        self._state_due = now + STATE_INTERVAL_S

    def _publish_plan(self, link: LinkLike) -> None:
        if self._plan is not None:
            link.publish(self._topics.plan, self._plan, qos=1, retain=True)

    def repeat(self, link: LinkLike, now: float) -> None:
        """Publish everything again, since the broker may have lost it."""
        self._publish_state(link, now)
        self._publish_plan(link)
        self._plan_due = now + PLAN_REPEAT_S

    def plan(self, plan: Plan, link: LinkLike, now: float) -> None:
        """Publish a plan now and once more, and forget the one that was held back."""
        self._held = None
        self._plan = seal(
            plan, purpose=Purpose.PLAN, federation=self._topics.federation, sender=AGGREGATOR, key=self._key
        )
        self._publish_plan(link)
        self._plan_due = now + PLAN_REPEAT_S

    def hold(self, plan: RoundPlan) -> None:
        """Publish a plan once the broker holds its model: an agent that asks too early waits for a retry."""
        self._held = plan

    def model_present(self, version: str, link: LinkLike, now: float) -> bool:
        """The broker holds all that leads to this version of the model. Returns whether that let a plan out."""
        if self._held is None or self._held.base != version:
            return False
        self.plan(self._held, link, now)
        return True

    def last_words(self) -> list[tuple[str, bytes, int, bool]]:
        """What to publish before the link is closed."""
        plan = [] if self._plan is None else [(self._topics.plan, self._plan, 1, True)]
        return [*plan, (self._topics.aggregator, self.will.payload, 1, True)]
