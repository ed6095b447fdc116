"""The aggregator's side of secure aggregation."""

from collections.abc import Collection

from privacy.secagg.agreement import Terms
from privacy.secagg.server_messages import ServerCommand, ServerEvent, ServerPhase


class Server:
    """One context. Feed it with :meth:`handle`; carry out what it returns, in order.

    There is no randomness in it: whoever journals each event for which :meth:`changes` is true, before it is handled,
    can feed them to a new machine after a crash, then call :meth:`resume`.

    Args:
        context: ``agreement.context_of`` federation, run, round, attempt, base model...
        invited: Who may take part.
        terms: Of the signed plan.
        phase_s: Seconds that each phase may last; that of masked vectors lasts until CloseMasking.
    """

    phase: ServerPhase

    def __init__(self, context: bytes, invited: Collection[str], terms: Terms, *, phase_s: float) -> None:
        raise NotImplementedError

    def start(self, now: float) -> None:
        """Begin to wait for keys.

        Args:
            now: Monotonic seconds.
        """
        raise NotImplementedError

    def handle(self, event: ServerEvent, now: float) -> list[ServerCommand]:
        """Take one event.

        Args:
            event: What happened.
            now: Monotonic seconds.

        Raises:
            RefusedError: If the message is none that this device may send; nothing has changed.
        """
        raise NotImplementedError

    def changes(self, event: ServerEvent, now: float) -> bool:
        """Whether the event would change the state: then it belongs in the journal, together with ``now``, first.

        Repeats, refused messages and idle ticks do not.
        """
        raise NotImplementedError

    def resume(self, now: float) -> list[ServerCommand]:
        """After the journal was fed: give the current phase its full time again, and repeat what was said last.

        Args:
            now: Monotonic seconds.
        """
        raise NotImplementedError

    def next_wakeup(self) -> float | None:
        """When Tick can next matter, monotonic seconds; None when only an event can."""
        raise NotImplementedError
