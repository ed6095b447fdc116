"""Put objects on the broker as retained chunks, and take older ones away. A thread of its own: it waits for the link.

A broker may lose what it held (mosquitto does on kill -9), or may have kept everything (the link alone broke). After
each connect the last chunk of every object is asked for: chunks are published in order, so if that one is there all
are, and nothing is sent twice.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from aggregator.store import Store
from federation.errors import FedgeError, PeerError, TransportError
from federation.wire.link import LinkLike
from federation.wire.messages import ObjectRef
from federation.wire.objects import read_chunk
from federation.wire.topics import Topics
from federation.wire.transfer import check_chunk

log = structlog.get_logger()

OBJECTS_KEPT = 2
"""The open round's base model, and the one before for agents that are still fetching it."""

PROBE_S = 2.0
"""How long a broker may take to deliver a retained chunk before it counts as lost."""

PUBLISH_TIMEOUT_S = 60.0

RETRY_S = 10.0
"""After which a seeding that failed is tried again, if no connect comes first."""

_MEMORY_KEY = "seeded"


@dataclass(frozen=True, slots=True)
class _Seeded:
    ref: ObjectRef
    path: Path


class Seeder:
    """Keeps the newest objects on the broker.

    Args:
        link: To publish on.
        topics: Of the federation.
        store: Remembers what lies on the broker across restarts, so that it can be cleared one day.
        on_present: Called in the seeder's thread with the hash of an object that the broker now holds.
    """

    def __init__(
        self, link: LinkLike, topics: Topics, store: Store, on_present: Callable[[str], None]
    ) -> None:
        self._link, self._topics, self._store, self._on_present = link, topics, store, on_present
        self._wanted: deque[_Seeded] = deque(maxlen=OBJECTS_KEPT)
        self._stale: list[ObjectRef] = msgspec.json.decode(
            store.recall(_MEMORY_KEY) or "[]", type=list[ObjectRef]
        )
        self._present: set[str] = set()
        # Published over an earlier connection, perhaps by an earlier process: the broker may or may not hold it.
        self._doubtful = {ref.sha256 for ref in self._stale}
        self._probed: dict[str, tuple[ObjectRef, threading.Event]] = {}
        self._guard = threading.Lock()
        self._work: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="seeder", daemon=True)
        self._thread.start()

    def want(self, path: Path, ref: ObjectRef) -> None:
        """Make ``path`` the newest object; what falls out of the kept ones is cleared from the broker."""
        with self._guard:
            if any(seeded.ref == ref for seeded in self._wanted):
                if ref.sha256 in self._present:
                    self._on_present(ref.sha256)
                return
            # The same model cut into other chunks lies on the same topics: it takes the place of its former self.
            self._present.discard(ref.sha256)
            former = [seeded for seeded in self._wanted if seeded.ref.sha256 == ref.sha256]
            for seeded in former:
                self._wanted.remove(seeded)
                self._stale.append(seeded.ref)
            if len(self._wanted) == OBJECTS_KEPT:
                self._stale.append(self._wanted[0].ref)
            self._wanted.append(_Seeded(ref, path))
            self._stale = [
                stale for stale in self._stale if stale.sha256 != ref.sha256 or stale.chunks > ref.chunks
            ]
            memory = [*self._stale, *(seeded.ref for seeded in self._wanted)]
        self._store.remember(_MEMORY_KEY, msgspec.json.encode(memory).decode())
        self._work.put(True)

    def connected(self) -> None:
        """The link is up: find out what the broker still holds."""
        with self._guard:
            self._doubtful |= self._present
            self._present.clear()
        self._work.put(True)

    def arrived(self, sha256: str, payload: bytes) -> None:
        """A chunk that was asked for came from the broker."""
        probe = self._probed.get(sha256)
        if probe is None:
            return
        ref, there = probe
        try:
            check_chunk(ref, ref.chunks - 1, payload)
        except PeerError as error:  # cut into other chunks by an earlier process, cleared, or damaged
            log.info("retained_chunk_stale", object=sha256[:12], detail=error.detail)
        else:
            there.set()

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._work.put(False)
        self._thread.join(timeout=PROBE_S)

    def _run(self) -> None:
        done = True
        while self._next_job(done):
            try:
                self._bring_up_to_date()
            except TransportError as error:
                log.warning("seeding_interrupted", reason=str(error), remedy="tried again by itself")
                done = False
            except (FedgeError, OSError) as error:
                log.error("seeding_failed", reason=str(error), retry_s=RETRY_S)
                done = False
            else:
                done = True

    def _next_job(self, done: bool) -> bool:
        try:
            return self._work.get(timeout=None if done else RETRY_S)
        except queue.Empty:
            return True

    def _bring_up_to_date(self) -> None:
        with self._guard:
            missing = [seeded for seeded in reversed(self._wanted) if seeded.ref.sha256 not in self._present]
            stale = list(self._stale)
            kept = {seeded.ref.sha256: seeded.ref.chunks for seeded in self._wanted}
        for seeded in missing:
            if seeded.ref.sha256 not in self._doubtful or not self._probe(seeded.ref):
                self._publish(seeded)
            with self._guard:
                self._doubtful.discard(seeded.ref.sha256)
                self._present.add(seeded.ref.sha256)
            self._on_present(seeded.ref.sha256)
        for ref in stale:
            for index in range(kept.get(ref.sha256, 0), ref.chunks):
                self._link.publish_bulk(
                    self._topics.object_chunk(ref.sha256, index),
                    b"",
                    qos=1,
                    retain=True,
                    timeout_s=PUBLISH_TIMEOUT_S,
                )
            with self._guard:
                self._stale.remove(ref)
                memory = [*self._stale, *(seeded.ref for seeded in self._wanted)]
            self._store.remember(_MEMORY_KEY, msgspec.json.encode(memory).decode())

    def _probe(self, ref: ObjectRef) -> bool:
        arrived = threading.Event()
        self._probed[ref.sha256] = ref, arrived
        topic = self._topics.object_chunk(ref.sha256, ref.chunks - 1)
        self._link.subscribe([(topic, 0)])
        try:
            return arrived.wait(PROBE_S)
        finally:
            del self._probed[ref.sha256]
            self._link.unsubscribe([topic])

    def _publish(self, seeded: _Seeded) -> None:
        for index in range(seeded.ref.chunks):
            self._link.publish_bulk(
                self._topics.object_chunk(seeded.ref.sha256, index),
                read_chunk(seeded.path, seeded.ref, index),
                qos=1,
                retain=True,
                timeout_s=PUBLISH_TIMEOUT_S,
            )
        self._link.flush(PUBLISH_TIMEOUT_S)  # every chunk acknowledged: none was refused on the way
        log.info(
            "model_seeded", object=seeded.ref.sha256[:12], bytes=seeded.ref.length, chunks=seeded.ref.chunks
        )
