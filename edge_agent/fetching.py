"""Bring the base model to this device: the download's commands carried out on the link and on the disk."""

from collections.abc import Callable
from pathlib import Path

import structlog

from federation.logs import Sparingly
from federation.wire.link import LinkLike
from federation.wire.messages import ObjectRef
from federation.wire.objects import PartialObject, ref_of_file
from federation.wire.rate import TokenBucket
from federation.wire.topics import Topics
from federation.wire.transfer import Download, DownloadCommand, Finished, Subscribe, Unsubscribe, Write

log = structlog.get_logger()


class ModelCache:
    """Holds the newest base model, and fetches the next.

    Args:
        folder: ``STATE/objects``; created.
        link: To subscribe on.
        topics: Of the federation.
        on_ready: Called with the hash when a model is on disk.
        cap: Of this device's bandwidth down; None for none.
    """

    def __init__(
        self,
        folder: Path,
        link: LinkLike,
        topics: Topics,
        on_ready: Callable[[str], None],
        cap: TokenBucket | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._link, self._topics, self._on_ready = folder, link, topics, on_ready
        self._cap = cap
        self._download: Download | None = None
        self._partial: PartialObject | None = None
        self._telling = Sparingly()

    def path(self, sha256: str) -> Path:
        """Where a model lies once it is complete."""
        return self._folder / f"{sha256}.safetensors"

    def fetch(self, ref: ObjectRef, now: float) -> None:
        """Start to fetch a model, or go on where an earlier process stopped. Others are deleted.

        Raises:
            ConfigError: If the disk is full.
            PeerError: As :meth:`chunk`.
        """
        self.abandon()
        keep = {self.path(ref.sha256), self._part(ref)}
        for file in self._folder.iterdir():
            if file not in keep:
                file.unlink()
        if self._holds(ref):
            self._on_ready(ref.sha256)
            return
        self._partial = PartialObject(self._part(ref), ref)
        self._download = Download(ref, self._partial.have, cap=self._cap)
        self._telling.restart()
        self._carry_out(self._download.start(now))

    def abandon(self) -> None:
        """Stop fetching; what has arrived stays on disk."""
        if self._partial is None or self._download is None:
            return
        self._carry_out(self._download.stop())
        self._partial.close()
        self._download = self._partial = None

    def chunk(self, sha256: str, index: int, payload: bytes, now: float) -> None:
        """Take a chunk from the broker.

        Raises:
            ConfigError: If the disk is full.
            PeerError: ``wrong_hash`` if the model is complete and is not what the plan promised.
        """
        if self._download is not None and self._partial is not None and self._partial.ref.sha256 == sha256:
            download = self._download
            self._carry_out(download.chunk(index, payload, now))
            if self._telling.due(now) and not download.finished:
                log.info(
                    "model_fetching", object=sha256[:12], received=download.received, total=download.total
                )

    def tick(self, now: float) -> None:
        """Ask again for what has not come."""
        if self._download is not None:
            self._carry_out(self._download.tick(now))

    def reconnected(self, now: float) -> None:
        """Subscribe again: sessions are clean."""
        if self._download is not None:
            self._carry_out(self._download.reconnected(now))

    def next_wakeup(self) -> float | None:
        """When :meth:`tick` is due, monotonic seconds."""
        return None if self._download is None else self._download.next_wakeup()

    @property
    def share(self) -> float | None:
        """How much of the model is here, 0-1; None when none is being fetched."""
        return None if self._download is None else self._download.received / self._download.total

    def _part(self, ref: ObjectRef) -> Path:
        return self._folder / f"{ref.sha256}.part"

    def _holds(self, ref: ObjectRef) -> bool:
        path = self.path(ref.sha256)
        return path.exists() and ref_of_file(path, ref.chunk_bytes) == ref

    def _carry_out(self, commands: list[DownloadCommand]) -> None:
        partial = self._partial
        assert partial is not None
        sha256 = partial.ref.sha256
        for command in commands:
            match command:
                case Subscribe(indices):
                    self._link.subscribe([(self._topics.object_chunk(sha256, index), 0) for index in indices])
                case Unsubscribe(indices):
                    self._link.unsubscribe([self._topics.object_chunk(sha256, index) for index in indices])
                case Write(index, payload):
                    partial.write(index, payload)
                case Finished():
                    self._finish(partial)

    def _finish(self, partial: PartialObject) -> None:
        self._download = self._partial = None
        # Digests that match every chunk but not the whole are refused for good: the signed plan itself is wrong.
        partial.finish(self.path(partial.ref.sha256))
        log.info("model_fetched", object=partial.ref.sha256[:12], bytes=partial.ref.length)
        self._on_ready(partial.ref.sha256)
