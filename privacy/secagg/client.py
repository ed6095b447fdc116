"""A device's side of secure aggregation."""

from privacy.secagg.agreement import Terms
from privacy.secagg.client_messages import ClientCommand, ClientEvent, ClientPhase


class Client:
    """One device in one context. Feed it with :meth:`handle`; carry out what it returns, in order.

    Its secrets live in memory only: a device that restarts takes no further part in this context.

    Args:
        name: Of this device.
        context: ``agreement.context_of`` federation, run, round, attempt, base model...
        terms: Of the signed plan.
        repeat_s: Seconds after which a message that got no answer is repeated.
    """

    phase: ClientPhase

    def __init__(self, name: str, context: bytes, terms: Terms, *, repeat_s: float = 10.0) -> None:
        raise NotImplementedError

    def start(self, now: float) -> list[ClientCommand]:
        """Begin: returns SendKeys.

        Args:
            now: Monotonic seconds.
        """
        raise NotImplementedError

    def handle(self, event: ClientEvent, now: float) -> list[ClientCommand]:
        """Take one event. Never raises for what a peer sent: the answer is Ignored or Abort.

        Args:
            event: What happened.
            now: Monotonic seconds.
        """
        raise NotImplementedError

    def next_wakeup(self) -> float | None:
        """When Tick can next matter, monotonic seconds; None when only an event can."""
        raise NotImplementedError
