"""Bring a release to this device: what its slot still lacks, object by object, then the slot itself."""

from collections.abc import Callable
from typing import Final

import structlog

from edge_agent.pulling import Pull
from edge_agent.releases.rollout_events import Failed, Fetch, Fetched
from edge_agent.releases.slots import Slots
from federation.errors import FedgeError, ReleaseError, ReleaseFault
from federation.logs import Sparingly
from federation.wire.interface import LinkLike
from federation.wire.messages import ObjectRef
from federation.wire.objects import PartialObject
from federation.wire.rate import TokenBucket
from federation.wire.topics import Topics
from federation.wire.transfer import MAX_WINDOW

log = structlog.get_logger()

WINDOW_BYTES: Final = 2 * 2**20
"""Chunks on their way at once may take so much memory: a device that labels frames has little to spare."""


class ReleaseFetch:
    """Carries out :class:`Fetch`: one release at a time.

    Args:
        slots: Where it goes.
        link: To subscribe on.
        topics: Of the federation.
        tell: Takes the outcome.
        cap: Of this device's bandwidth down; None for none.
    """

    def __init__(
        self,
        slots: Slots,
        link: LinkLike,
        topics: Topics,
        tell: Callable[[Fetched | Failed], None],
        cap: TokenBucket | None,
    ) -> None:
        self._slots, self._link, self._topics, self._tell, self._cap = slots, link, topics, tell, cap
        self._fetch: Fetch | None = None
        self._waiting: list[ObjectRef] = []
        self._pull: Pull | None = None
        self._telling = Sparingly()

    def begin(self, fetch: Fetch, now: float) -> None:
        """Fetch a release, or go on where an earlier process stopped."""
        self.stop()
        self._fetch = fetch
        self._telling.restart()
        model = fetch.offer.release.model
        missing = self._slots.missing(fetch.offer.release)
        whole = fetch.delta is None or model not in missing
        self._waiting = [
            ref if whole or ref != model or fetch.delta is None else fetch.delta.object
            for ref in sorted(
                missing, key=lambda ref: ref.length
            )  # the golden set is small: first what fails soon
        ]
        self._guarded(lambda: self._next(now))

    def stop(self) -> None:
        """Stop; what has arrived stays on disk."""
        if self._pull is not None:
            self._pull.stop()
        self._fetch = self._pull = None

    def chunk(self, sha256: str, index: int, payload: bytes, now: float) -> None:
        """Take a chunk from the broker."""
        pull = self._pull
        if pull is not None and pull.partial.ref.sha256 == sha256:
            self._guarded(lambda: pull.chunk(index, payload, now))

    def tick(self, now: float) -> None:
        """Ask again for what has not come."""
        if self._pull is not None:
            self._pull.tick(now)

    def reconnected(self, now: float) -> None:
        """Subscribe again: sessions are clean."""
        if self._pull is not None:
            self._pull.reconnected(now)

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` is due, monotonic seconds."""
        return None if self._pull is None else self._pull.next_wakeup()

    @property
    def objects(self) -> frozenset[str]:
        """SHA-256 of what is being fetched: parts that must not be cleared away."""
        if self._fetch is None:
            return frozenset()
        release = self._fetch.offer.release
        return frozenset({release.model.sha256, *(ref.sha256 for ref in self._fetch.objects)})

    def _next(self, now: float) -> None:
        if not self._waiting:
            self._install()
            return
        part = self._slots.open_part(self._waiting[0])
        cap = self._cap
        window = max(2, min(MAX_WINDOW, WINDOW_BYTES // part.ref.chunk_bytes))
        self._pull = Pull(
            part,
            self._link,
            self._topics,
            self._whole,
            cap=cap,
            telling=self._telling,
            window_max=window,
        )
        self._pull.start(now)

    def _whole(self, part: PartialObject, now: float) -> None:
        self._pull = None
        part.close()
        self._waiting.remove(part.ref)
        log.info("object_fetched", object=part.ref.sha256[:12], bytes=part.ref.length)
        self._next(now)

    def _install(self) -> None:
        fetch = self._fetch
        assert fetch is not None
        offer = fetch.offer
        if fetch.delta is not None and offer.release.model in self._slots.missing(offer.release):
            self._make_from_delta(fetch)
        self._slots.install(offer.release, offer.envelope)
        self._fetch = None
        self._tell(Fetched(offer.sha256))

    def _make_from_delta(self, fetch: Fetch) -> None:
        try:
            self._slots.make_from_delta(fetch.offer.release)
        except ReleaseError as error:
            if error.fault is ReleaseFault.NO_SPACE:
                raise
            # Whatever is wrong with the short way, the long one may lead there.
            log.warning("delta_not_usable", reason=str(error), remedy="the whole model is fetched instead")
            raise ReleaseError(ReleaseFault.WRONG_HASH, error.detail) from error

    def _guarded(self, step: Callable[[], None]) -> None:
        fetch = self._fetch
        assert fetch is not None
        try:
            step()
        except ReleaseError as error:
            self.stop()
            self._tell(Failed(fetch.offer.sha256, error.fault, error.detail))
        except FedgeError as error:  # the disk cannot be written: not the release's fault
            self.stop()
            self._tell(Failed(fetch.offer.sha256, None, str(error)))
