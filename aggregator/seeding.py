"""Put objects on the broker as retained chunks, and take older ones away. A thread of its own: it waits for the link.

A broker may lose what it held (mosquitto does on kill -9), or may have kept everything (the link alone broke). After
each connect the last chunk of every object is asked for: chunks are published in order, so if that one is there all
are, and nothing is sent twice.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, slots=True)
class _Probe:
    ref: ObjectRef
    there: threading.Event


@dataclass(slots=True)
class _Shelf:
    """Objects that are wanted together.

    Attributes:
        tell: Called with ``name`` once the broker holds them all.
        name: Of what they are wanted for.
        wanted: In the order in which they are brought.
    """

    tell: Callable[[str], None]
    name: str = ""
    wanted: tuple[_Seeded, ...] = ()


class Seeder:
    """Keeps on the broker what the releases in force name and the last two plans: agents may still fetch for the former.

    Args:
        link: To publish on.
        topics: Of the federation.
        store: Remembers what lies on the broker across restarts, so that it can be cleared one day.
        on_present: Called with the name of the last plan's objects once the broker holds them all; in the seeder's
            thread, or at once.
        on_kept: The same for the releases' objects.
    """

    def __init__(
        self,
        link: LinkLike,
        topics: Topics,
        store: Store,
        on_present: Callable[[str], None],
        on_kept: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._link, self._topics, self._store = link, topics, store
        self._plan = _Shelf(on_present)
        self._releases = _Shelf(on_kept)
        self._former: tuple[_Seeded, ...] = ()
        self._stale: list[ObjectRef] = msgspec.json.decode(
            store.recall(_MEMORY_KEY) or "[]", type=list[ObjectRef]
        )
        # Before the first plan nobody knows what of an earlier process's objects it will name again.
        self._inherited = set(self._stale)
        self._present: set[str] = set()
        # Published over an earlier connection, perhaps by an earlier process: the broker may or may not hold it.
        self._doubtful = {ref.sha256 for ref in self._stale}
        self._probed: dict[str, _Probe] = {}
        self._guard = threading.Lock()
        self._work: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="seeder", daemon=True)
        self._thread.start()

    def want(self, name: str, objects: Sequence[tuple[Path, ObjectRef]]) -> None:
        """Bring the objects of a new plan to the broker; what only older ones named is cleared from it.

        Args:
            name: Given to ``on_present``.
            objects: Files and what they hold; the first is brought first.
        """
        self._fill(self._plan, name, objects)

    def keep(self, name: str, objects: Sequence[tuple[Path, ObjectRef]]) -> None:
        """Bring the objects of the releases in force to the broker; those that are not among them any more are cleared.

        To be called before the first plan, be it with nothing: what an earlier process has left is cleared after both.

        Args:
            name: Given to ``on_kept``.
            objects: Files and what they hold; the first is brought first.
        """
        self._fill(self._releases, name, objects)

    def _fill(self, shelf: _Shelf, name: str, objects: Sequence[tuple[Path, ObjectRef]]) -> None:
        # Two releases may have the same golden set.
        wanted = tuple({ref.sha256: _Seeded(ref, path) for path, ref in objects}.values())
        with self._guard:
            shelf.name = name
            if wanted != shelf.wanted:
                self._replace(shelf, wanted)
            complete = self._complete(shelf)
            memory = self._memory()
        self._store.remember(_MEMORY_KEY, memory)
        if complete:
            shelf.tell(name)
        if not complete or self._stale:
            self._work.put(True)

    def _replace(self, shelf: _Shelf, wanted: tuple[_Seeded, ...]) -> None:
        before = self._shelved()
        cut = {seeded.ref.sha256: seeded.ref for seeded in wanted}
        if shelf is self._plan:
            # The same object cut into other chunks lies on the same topics: it takes the place of its former self.
            self._former = tuple(seeded for seeded in shelf.wanted if seeded.ref.sha256 not in cut)
        shelf.wanted = wanted
        kept = {seeded.ref.sha256: seeded.ref for seeded in self._shelved()} | cut
        for seeded in before:
            if kept.get(seeded.ref.sha256) != seeded.ref and seeded.ref not in self._stale:
                self._present.discard(seeded.ref.sha256)
                self._stale.append(seeded.ref)
                self._inherited.discard(seeded.ref)
        self._stale = [
            stale
            for stale in self._stale
            if stale.sha256 not in kept or stale.chunks > kept[stale.sha256].chunks
        ]

    def _shelved(self) -> tuple[_Seeded, ...]:
        return (*self._plan.wanted, *self._former, *self._releases.wanted)

    def _complete(self, shelf: _Shelf) -> bool:
        return all(seeded.ref.sha256 in self._present for seeded in shelf.wanted)

    def _memory(self) -> str:
        """What may lie on the broker, to be cleared one day, perhaps by a later process."""
        kept = (seeded.ref for seeded in self._shelved())
        return msgspec.json.encode([*self._stale, *kept]).decode()

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
        try:
            check_chunk(probe.ref, probe.ref.chunks - 1, payload)
        except PeerError as error:  # cut into other chunks by an earlier process, cleared, or damaged
            log.info("retained_chunk_stale", object=sha256[:12], detail=error.detail)
        else:
            probe.there.set()

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
        for shelf in (self._plan, self._releases):
            self._bring(shelf)
        with self._guard:
            stale = [ref for ref in self._stale if self._plan.wanted or ref not in self._inherited]
            kept = {seeded.ref.sha256: seeded.ref.chunks for seeded in self._shelved()}
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
                if ref in self._stale:
                    self._stale.remove(ref)
                memory = self._memory()
            self._store.remember(_MEMORY_KEY, memory)

    def _bring(self, shelf: _Shelf) -> None:
        with self._guard:
            name = shelf.name
            # The former plan's only while they are known to be there: nobody new will ask for them.
            missing = [seeded for seeded in shelf.wanted if seeded.ref.sha256 not in self._present]
        there = self._probe([seeded.ref for seeded in missing if seeded.ref.sha256 in self._doubtful])
        for seeded in missing:
            if seeded.ref.sha256 not in there:
                self._publish(seeded)
            with self._guard:
                self._doubtful.discard(seeded.ref.sha256)
                self._present.add(seeded.ref.sha256)
        with self._guard:
            up_to_date = bool(name) and name == shelf.name and self._complete(shelf)
        if up_to_date:
            shelf.tell(name)

    def _probe(self, refs: Sequence[ObjectRef]) -> set[str]:
        """Which of these objects the broker still holds."""
        probes = [_Probe(ref, threading.Event()) for ref in refs]
        if not probes:
            return set()
        self._probed = {probe.ref.sha256: probe for probe in probes}
        topics = [self._topics.object_chunk(ref.sha256, ref.chunks - 1) for ref in refs]
        self._link.subscribe([(topic, 0) for topic in topics])
        deadline = time.monotonic() + PROBE_S
        try:
            there = [probe for probe in probes if probe.there.wait(max(0.0, deadline - time.monotonic()))]
            return {probe.ref.sha256 for probe in there}
        finally:
            self._probed = {}
            self._link.unsubscribe(topics)

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
            "object_seeded", object=seeded.ref.sha256[:12], bytes=seeded.ref.length, chunks=seeded.ref.chunks
        )
