"""Bring to this device what leads to the base model: the downloads' commands carried out on the link and on the disk.

::

    STATE/objects/<version>.safetensors   a version of the global model: the one of the last round, or fetched whole
    STATE/objects/<sha256>.object         a delta, fetched whole by this process and not applied yet
    STATE/objects/<sha256>.part           a full model or a delta that is being fetched
"""

from collections.abc import Callable
from pathlib import Path

import structlog

from edge_agent.base_model import Recipe
from edge_agent.pulling import Pull
from federation.logs import Sparingly
from federation.wire.link import LinkLike
from federation.wire.messages import FullModel, ObjectRef, RoundPlan
from federation.wire.objects import PartialObject
from federation.wire.rate import TokenBucket
from federation.wire.topics import Topics
from federation.wire.versions import Built, Held, Route, cheapest_route

log = structlog.get_logger()

_MODEL = ".safetensors"


class ModelCache:
    """Holds the newest base model, and fetches what leads to the next.

    Args:
        folder: ``STATE/objects``; created.
        link: To subscribe on.
        topics: Of the federation.
        on_ready: Called with the version when all that leads to it is on disk.
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
        for file in folder.glob("*.object"):  # not synced: after a power cut its chunks are checked anew
            file.replace(file.with_suffix(".part"))
        self._folder, self._link, self._topics, self._on_ready = folder, link, topics, on_ready
        self._cap = cap
        self._pull: Pull | None = None
        self._route: Route | None = None
        self._waiting: list[ObjectRef] = []
        self._built_differently: set[str] = set()
        self._telling = Sparingly()

    def fetch(self, plan: RoundPlan, now: float) -> None:
        """Fetch what leads to a plan's base model, or go on where an earlier process stopped.

        What leads nowhere any more is deleted.

        Raises:
            ConfigError: If the disk is full.
            PeerError: As :meth:`chunk`.
        """
        self.abandon()
        held = {file.stem for file in self._folder.glob(f"*{_MODEL}")}
        self._route = route = cheapest_route(
            plan, held, may_build=plan.full.version not in self._built_differently
        )
        full = (route.start.object,) if isinstance(route.start, FullModel) else ()
        objects = (*full, *(delta.object for delta in route.deltas))
        keep = {self._model(route.version), self._model(route.start.version)}
        for ref in objects:
            keep |= {self._object(ref), self._part(ref)}
        for file in self._folder.iterdir():
            if file not in keep:
                # Missing: the worker, which may still be busy with an older round, has just renamed what it wrote.
                file.unlink(missing_ok=True)
        self._waiting = [ref for ref in objects if not self._object(ref).exists()]
        self._telling.restart()
        self._next(now)

    def recipe(self) -> Recipe:
        """How to make the base model from what was fetched; ask once ``on_ready`` was called."""
        route = self._route
        assert route is not None
        match route.start:
            case FullModel(version) | Held(version):
                start: Path | None = self._model(version)
            case Built():
                start = None
        frames = tuple(self._object(delta.object) for delta in route.deltas)
        return Recipe(route, start, frames, self._model(route.version))

    def reject(self) -> bool:
        """Forget what the last recipe was made of: it did not give the base model.

        Returns:
            Whether there is another way to it; none if it began with the full model.
        """
        recipe = self.recipe()
        if recipe.start is None:
            self._built_differently.add(recipe.route.start.version)
        else:
            recipe.start.unlink(missing_ok=True)
        for file in recipe.frames:
            file.unlink(missing_ok=True)
        return not isinstance(recipe.route.start, FullModel)

    def _next(self, now: float) -> None:
        if not self._waiting:
            assert self._route is not None
            self._on_ready(self._route.version)
            return
        ref = self._waiting[0]
        partial = PartialObject(self._part(ref), ref)
        self._pull = Pull(
            partial, self._link, self._topics, self._finish, cap=self._cap, telling=self._telling
        )
        self._pull.start(now)

    def abandon(self) -> None:
        """Stop fetching; what has arrived stays on disk."""
        if self._pull is not None:
            self._pull.stop()
            self._pull = None

    def chunk(self, sha256: str, index: int, payload: bytes, now: float) -> None:
        """Take a chunk from the broker.

        Raises:
            ConfigError: If the disk is full.
        """
        if self._pull is not None and self._pull.partial.ref.sha256 == sha256:
            self._pull.chunk(index, payload, now)

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
    def share(self) -> float | None:
        """How much of the object is here, 0-1; None when none is being fetched."""
        return None if self._pull is None else self._pull.share

    def _model(self, version: str) -> Path:
        return self._folder / f"{version}{_MODEL}"

    def _object(self, ref: ObjectRef) -> Path:
        return self._folder / f"{ref.sha256}.object"

    def _target(self, ref: ObjectRef) -> Path:
        """Where it goes once it is whole."""
        assert self._route is not None
        match self._route.start:
            case FullModel(version, object=full) if full == ref:
                return self._model(version)
        return self._object(ref)

    def _part(self, ref: ObjectRef) -> Path:
        return self._folder / f"{ref.sha256}.part"

    def _finish(self, partial: PartialObject, now: float) -> None:
        self._pull = None
        # Neither hashed again nor synced: the model that is made of it must have the digest of its version.
        partial.set_aside(self._target(partial.ref))
        log.info("object_fetched", object=partial.ref.sha256[:12], bytes=partial.ref.length)
        self._waiting.remove(partial.ref)
        self._next(now)
