"""What the aggregator and the agents need of a link to a broker: the real one, or in tests one that needs no broker."""

from collections.abc import Callable, Sequence
from typing import Protocol

from federation.wire.address import BrokerAddress
from federation.wire.connection import Will
from federation.wire.inbox import Limits, LinkEvent
from federation.wire.messages import Traffic


class LinkLike(Protocol):
    """What is asked of a link; :class:`~federation.wire.link.Link` documents it and is the one for brokers."""

    @property
    def connected(self) -> bool:
        """As :attr:`Link.connected`."""
        ...

    @property
    def limits(self) -> Limits:
        """As :attr:`Link.limits`."""
        ...

    @property
    def traffic(self) -> Traffic:
        """As :attr:`Link.traffic`."""
        ...

    @property
    def waiting(self) -> int:
        """As :attr:`Link.waiting`."""
        ...

    def start(self) -> None:
        """As :meth:`Link.start`."""
        ...

    def wait_connected(self, timeout_s: float) -> None:
        """As :meth:`Link.wait_connected`."""
        ...

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, yielding: bool = False
    ) -> bool:
        """As :meth:`Link.publish`."""
        ...

    def drop_waiting(self) -> None:
        """As :meth:`Link.drop_waiting`."""
        ...

    def publish_bulk(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, timeout_s: float
    ) -> None:
        """As :meth:`Link.publish_bulk`."""
        ...

    def flush(self, timeout_s: float) -> None:
        """As :meth:`Link.flush`."""
        ...

    def subscribe(self, filters: Sequence[tuple[str, int]]) -> bool:
        """As :meth:`Link.subscribe`."""
        ...

    def unsubscribe(self, filters: Sequence[str]) -> bool:
        """As :meth:`Link.unsubscribe`."""
        ...

    def stop(self, last: Sequence[tuple[str, bytes, int, bool]] = ()) -> None:
        """As :meth:`Link.stop`."""
        ...


class MakeLink(Protocol):
    """How a link is made: :class:`Link` itself, or in tests one that needs no broker."""

    def __call__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        on_event: Callable[[LinkEvent], None],
        will: Will | None = None,
        max_rate: float | None = None,
    ) -> LinkLike:
        """Make a link that is not started yet."""
        ...
