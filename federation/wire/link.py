"""A link to the broker that keeps itself up: connect, reconnect, subscribe, publish, back-pressure.

One thread per link talks to the broker (:mod:`federation.wire.connection`). The owner hands work over from any
thread and hears of what happens through ``on_event``, which is called in that thread and must only enqueue: pass
:meth:`Inbox.put <federation.wire.inbox.Inbox.put>`.
"""

import secrets
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final, Literal

import structlog

from federation.errors import BrokerRefusedError, TransportError
from federation.wire.address import BrokerAddress
from federation.wire.connection import (
    CONNECT_TIMEOUT_S,
    FAREWELL_S,
    FILTERS_PER_PACKET,
    Connection,
    Meter,
    Outcome,
    Will,
)
from federation.wire.inbox import (
    Connected,
    Disconnected,
    Inbox,
    Limits,
    LinkEvent,
    LinkFailed,
    Message,
    Overflow,
)
from federation.wire.interface import LinkLike, MakeLink
from federation.wire.messages import Traffic
from federation.wire.rate import TokenBucket
from federation.wire.rate import keepalive_s as default_keepalive_s
from federation.wire.reasons import Failure
from federation.wire.sending import SendQueue, Subscribe, Unsubscribe, Wake, publish_job

RETRY_MIN_S: Final = 0.2
RETRY_MAX_S: Final = 30.0

STEADY_S: Final = 10.0
"""A connection that lived this long was a good one: the next back-off starts anew. A shorter one may be one of two
clients that throw each other out, or a packet that the broker answers by hanging up."""

_log = structlog.get_logger()
_random = secrets.SystemRandom()


class Link:
    """A connection to one broker, kept up for ever once started. All methods are safe from any thread.

    Sessions are clean: after :class:`Connected` nothing is subscribed and nothing is queued. (Over MQTT 5 with a
    will, the session outlives the connection by ``will_delay_s``, so that a short loss does not publish the will;
    its subscriptions are dropped on return, but messages that came meanwhile may still be delivered.)

    Args:
        address: The broker.
        client_id: MQTT client id; must differ between any two links.
        on_event: Called in the network thread with every event. Must only enqueue. What it raises is logged and
            reported as :class:`LinkFailed`, and the link goes on.
        will: Published by the broker if this link vanishes without :meth:`stop`.
        max_rate: Cap on what is sent, bytes a second, over all that MQTT writes; None for none. Messages go one at
            a time and whole, control first. Acknowledgements, pings and last words never wait, but are paid for.
        keepalive_s: Seconds between pings; a broker that is silent for twice as long counts as gone. None is 30, or
            more under a cap that needs it.
        max_inflight: Bulk messages on their way at once.
        will_delay_s: Seconds by which the will is delayed (MQTT 5 only).
        retry_min_s: First back-off, seconds. It doubles, with jitter.
        retry_max_s: Longest back-off, seconds; used at once when the broker refuses.

    Raises:
        ConfigError: If a certificate cannot be used.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        on_event: Callable[[LinkEvent], None],
        will: Will | None = None,
        max_rate: float | None = None,
        keepalive_s: int | None = None,
        max_inflight: int = 16,
        will_delay_s: int = 10,
        retry_min_s: float = RETRY_MIN_S,
        retry_max_s: float = RETRY_MAX_S,
    ) -> None:
        self._address = address
        self._context = address.tls_context()
        self._client_id = client_id
        self._on_event = on_event
        self._will = will
        self._keepalive_s = default_keepalive_s(max_rate) if keepalive_s is None else keepalive_s
        self._will_delay_s = will_delay_s if will is not None else 0
        self._retry_min_s = retry_min_s
        self._retry_max_s = retry_max_s
        self._wake = Wake()
        self._queue = SendQueue(max_inflight, self._wake)
        self._meter = Meter(None if max_rate is None else TokenBucket(max_rate))
        self._filters: set[str] = set()
        self._known_version: Literal[3, 5] | None = None
        self._told = ""
        self._changed = threading.Condition()
        self._failure: Failure | None = None
        self._stop_asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"link-{client_id}", daemon=True)

    @property
    def connected(self) -> bool:
        """Whether messages can be sent now: the broker has let us in and the network thread lives."""
        return self._queue.is_open and self._thread.is_alive()

    @property
    def limits(self) -> Limits:
        """What the broker accepts; before the first connection, what the protocol does."""
        return self._queue.limits

    @property
    def traffic(self) -> Traffic:
        """What was moved since the link was made, over all its connections. No counter ever falls."""
        return self._meter.traffic

    @property
    def waiting(self) -> int:
        """Yielding messages (see :meth:`publish`) that have not been handed to the network yet."""
        return self._queue.waiting

    def start(self) -> None:
        """Begin to connect, in the background. Call it once.

        Raises:
            RuntimeError: If it was started before.
        """
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> None:
        """Wait until the broker has let us in. The link goes on trying after an error too, until :meth:`stop`.

        Raises:
            BrokerRefusedError: As soon as the broker says no.
            TransportError: At the timeout, or at once where waiting cannot help, with the reason.
        """
        deadline = monotonic() + timeout_s
        with self._changed:
            while not self.connected:
                failure = self._failure
                if failure is not None and failure.refused:
                    raise BrokerRefusedError(failure.reason)
                if failure is not None and failure.hopeless:
                    raise TransportError(failure.reason)
                if not self._thread.is_alive():
                    raise TransportError(
                        f"the link to {self._address} is not running: it was never started, or stopped"
                    )
                remaining = deadline - monotonic()
                if remaining <= 0:
                    why = failure.reason if failure else f"timeout: {self._address} has not answered yet"
                    raise TransportError(f"not connected after {timeout_s:g} s: {why}")
                self._changed.wait(min(remaining, 1.0))

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, yielding: bool = False
    ) -> bool:
        """Send a message soon, without waiting for anything. Messages keep their order.

        Args:
            topic: Where to.
            payload: At most the broker's packet limit, less topic and header.
            qos: 0 or 1.
            retain: Whether the broker keeps it.
            yielding: Let messages without this mark overtake it, and send it once only if it is published again, to
                the same topic, while it waits: for chunks, which may be asked for twice.

        Returns:
            False if not connected (or 64 MiB already wait unsent): nothing was queued. True is no promise either:
            a disconnect forgets what was not sent, so publish again on :class:`Connected` what must stand.

        Raises:
            TransportError: If the packet is over the broker's limit. The link stays up.
            ValueError: If the topic has a wildcard or ``qos`` is not 0 or 1.
        """
        return self._queue.put(publish_job(topic, payload, qos=qos, retain=retain, bulk=yielding))

    def drop_waiting(self) -> None:
        """Take back the yielding messages that have not been handed to the network yet: nobody wants them now."""
        self._queue.drop_waiting()

    def publish_bulk(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, timeout_s: float
    ) -> None:
        """Send one of many large messages: waits until fewer than ``max_inflight`` are unsent or un-acknowledged.

        Control messages overtake bulk.

        Args:
            topic: Where to.
            payload: At most the broker's packet limit, less topic and header.
            qos: 0 counts as done when written to the socket, 1 when the broker has acknowledged it.
            retain: Whether the broker keeps it.
            timeout_s: Longest wait for room, seconds.

        Raises:
            TransportError: If not connected, disconnected or timed out while waiting, or over the size limit.
            RuntimeError: If called in the network thread, which would wait for itself.
        """
        self._refuse_network_thread("publish_bulk")
        self._queue.put_bulk(publish_job(topic, payload, qos=qos, retain=retain, bulk=True), timeout_s)

    def flush(self, timeout_s: float) -> None:
        """Wait until all bulk is through.

        Raises:
            TransportError: At the timeout, or if any bulk since the last flush was lost or refused.
            RuntimeError: If called in the network thread.
        """
        self._refuse_network_thread("flush")
        self._queue.flush(timeout_s)

    def subscribe(self, filters: Sequence[tuple[str, int]]) -> bool:
        """Subscribe to ``(filter, qos)`` pairs, in the order given. A refused one comes back as :class:`LinkFailed`.

        Note that nats-server delivers nothing past 63 filters at QoS 1 in one session; QoS 0 has no such limit.

        Returns:
            False if not connected: subscribe again on :class:`Connected`.
        """
        return all(
            self._queue.put(Subscribe(tuple(filters[start : start + FILTERS_PER_PACKET])))
            for start in range(0, len(filters), FILTERS_PER_PACKET)
        )

    def unsubscribe(self, filters: Sequence[str]) -> bool:
        """Take filters back.

        Returns:
            False if not connected: then there is nothing to take back.
        """
        return all(
            self._queue.put(Unsubscribe(tuple(filters[start : start + FILTERS_PER_PACKET])))
            for start in range(0, len(filters), FILTERS_PER_PACKET)
        )

    def stop(self, last: Sequence[tuple[str, bytes, int, bool]] = ()) -> None:
        """Say the last words, disconnect cleanly (no will) and end the thread. Bulk that waits is dropped.

        Where the last words cannot be said, the connection is cut instead, so that the will is published.

        Args:
            last: ``(topic, payload, qos, retain)``, such as the state "offline"; given up to two seconds.

        Raises:
            RuntimeError: If called in the network thread.
        """
        self._refuse_network_thread("stop")
        self._queue.end(
            [publish_job(topic, payload, qos=qos, retain=retain) for topic, payload, qos, retain in last]
        )
        self._stop_asked.set()
        self._wake()
        if self._thread.ident is None:
            self._wake.close()
            return
        self._thread.join(CONNECT_TIMEOUT_S + FAREWELL_S)
        if self._thread.is_alive():
            # Only the resolver of the operating system can hold it that long; the thread is a daemon.
            _log.warning("link_thread_not_joined", broker=str(self._address))

    def _run(self) -> None:
        tries = 0
        try:
            while not self._stop_asked.is_set():
                try:
                    outcome = self._connect_either()
                except Exception as error:  # noqa: BLE001 -- a defect here or in paho must not end the link
                    _log.exception("link_loop_failed", broker=str(self._address))
                    outcome = Outcome(0.0, Failure(f"internal error: {error!r}"))
                    self._emit(LinkFailed(f"the network loop failed and is restarted: {error!r}"))
                if outcome.failure is None:
                    break
                tries = 0 if outcome.up_s > STEADY_S else tries + 1
                self._report(outcome.failure)
                self._stop_asked.wait(self._pause_s(outcome.failure, tries))
        finally:
            self._queue.close()
            self._wake.close()
            with self._changed:
                self._changed.notify_all()

    def _connect_either(self) -> Outcome:
        """One connection, over MQTT 5 or, to a broker that does not know it, over 3.1.1 without any delay."""
        asked, known = self._address.version, self._known_version
        outcome = self._connect(asked or known or 5)
        failure = outcome.failure
        # A broker that was known to answer and now hangs up is restarting; only a new one may be too old.
        if not asked and failure is not None and failure.try_older and (known is None or failure.refused):
            _log.debug("mqtt_version_lowered", broker=str(self._address))
            outcome = self._connect(3)
        return outcome

    def _connect(self, version: Literal[3, 5]) -> Outcome:
        def opened(limits: Limits) -> None:
            self._known_version = version
            self._told = ""
            self._queue.open(limits)
            with self._changed:
                self._failure = None
                self._changed.notify_all()
            _log.info("broker_connected", broker=str(self._address), protocol=version)
            self._emit(Connected(limits))

        connection = Connection(
            self._address,
            self._context,
            self._client_id,
            version=version,
            keepalive_s=self._keepalive_s,
            will=self._will,
            will_delay_s=self._will_delay_s,
            resume=bool(self._will_delay_s) and self._known_version == version,
            filters=self._filters,
            queue=self._queue,
            meter=self._meter,
            wake=self._wake,
            emit=self._emit,
            opened=opened,
        )
        try:
            return connection.run(self._stop_asked.is_set)
        finally:
            self._queue.close()

    def _report(self, failure: Failure) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
        if failure.reason == self._told:
            return
        self._told = failure.reason
        _log.warning("broker_disconnected", broker=str(self._address), reason=failure.reason)
        self._emit(Disconnected(failure.reason, failure.refused))

    def _pause_s(self, failure: Failure, tries: int) -> float:
        longest = self._retry_max_s
        if not failure.hopeless:
            longest = min(longest, self._retry_min_s * 2.0 ** min(tries, 30))
        return longest * _random.uniform(0.5, 1.0)  # jitter: a fleet must not come back in step

    def _emit(self, event: LinkEvent) -> None:
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001 -- the owner's code; it must not end the link
            _log.exception("link_callback_failed", event_kind=type(event).__name__)
            if not isinstance(event, LinkFailed):
                self._emit(
                    LinkFailed(f"on_event raised {error!r} on {type(event).__name__}; the event is lost")
                )

    def _refuse_network_thread(self, what: str) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                f"{what}() waits for the network thread and was called in it: call it in another one"
            )


__all__ = [
    "BrokerAddress",
    "Connected",
    "Disconnected",
    "Inbox",
    "Limits",
    "Link",
    "LinkEvent",
    "LinkFailed",
    "LinkLike",
    "MakeLink",
    "Message",
    "Overflow",
    "Will",
]
