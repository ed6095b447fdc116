"""One object on its way from the broker's retained chunks to a file: a download's commands carried out."""

from collections.abc import Callable

import structlog

from federation.logs import Sparingly
from federation.wire.interface import LinkLike
from federation.wire.objects import PartialObject
from federation.wire.rate import TokenBucket
from federation.wire.topics import Topics
from federation.wire.transfer import (
    MAX_WINDOW,
    Download,
    DownloadCommand,
    Finished,
    Subscribe,
    Unsubscribe,
    Write,
)

log = structlog.get_logger()


class Pull:
    """Pulls one object, and says when it is whole.

    Args:
        partial: Where it goes; what it has already is not asked for.
        link: To subscribe on.
        topics: Of the federation.
        on_whole: Called once with the partial object, open still, and the time, when every chunk is there.
        cap: Of this device's bandwidth down; None for none.
        telling: When to log how far it is.
        window_max: Chunks on their way at once, at most.
    """

    def __init__(
        self,
        partial: PartialObject,
        link: LinkLike,
        topics: Topics,
        on_whole: Callable[[PartialObject, float], None],
        *,
        cap: TokenBucket | None = None,
        telling: Sparingly | None = None,
        window_max: int = MAX_WINDOW,
    ) -> None:
        self.partial = partial
        self._link, self._topics, self._on_whole = link, topics, on_whole
        self._telling = telling or Sparingly()
        self._download = Download(
            partial.ref, partial.have, cap=cap, window_min=min(8, window_max), window_max=window_max
        )

    def start(self, now: float) -> None:
        """Begin.

        Raises:
            ConfigError: As :meth:`chunk`.
        """
        self._carry_out(self._download.start(now), now)

    def stop(self) -> None:
        """Stop and close the file; what has arrived stays on disk."""
        self._carry_out(self._download.stop(), 0.0)
        self.partial.close()

    def chunk(self, index: int, payload: bytes, now: float) -> None:
        """Take a chunk from the broker.

        Raises:
            ConfigError: If the disk is full or not writable; or what ``partial.write`` raises instead.
        """
        self._carry_out(self._download.chunk(index, payload, now), now)
        if self._telling.due(now) and not self._download.finished:
            log.info(
                "object_fetching",
                object=self.partial.ref.sha256[:12],
                received=self._download.received,
                total=self._download.total,
            )

    def tick(self, now: float) -> None:
        """Ask again for what has not come."""
        self._carry_out(self._download.tick(now), now)

    def reconnected(self, now: float) -> None:
        """Subscribe again: sessions are clean."""
        self._carry_out(self._download.reconnected(now), now)

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` is due, monotonic seconds."""
        return self._download.next_wakeup()

    @property
    def share(self) -> float:
        """How much of the object is here, 0-1."""
        return self._download.received / self._download.total

    def _carry_out(self, commands: list[DownloadCommand], now: float) -> None:
        sha256 = self.partial.ref.sha256
        # Topics are left first: a disk that refuses a chunk must not leave one subscribed for ever.
        for command in sorted(commands, key=lambda command: not isinstance(command, Unsubscribe)):
            match command:
                case Subscribe(indices):
                    self._link.subscribe([(self._topics.object_chunk(sha256, index), 0) for index in indices])
                case Unsubscribe(indices):
                    self._link.unsubscribe([self._topics.object_chunk(sha256, index) for index in indices])
                case Write(index, payload):
                    self.partial.write(index, payload)
                case Finished():
                    self._on_whole(self.partial, now)
