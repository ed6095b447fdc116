"""What the release store gives back: releases, channels, manifests, requests and what devices have said."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from federation.release import GOLDEN_FILE, MODEL_FILE
from federation.wire.messages import ObjectRef
from federation.wire.predictions import ModelState
from federation.wire.release import Channel, Manifest, Release, ReleaseReport

DELTA_FILE = "model.delta"
"""In a release's folder beside the model, where the release has a delta."""


REFUSED_KEY = "automatic_release_refused"
"""Under which the store remembers why the last run's model was not released by itself; empty when it was."""


class ReleaseState(StrEnum):
    """What has become of a release."""

    STORED = "stored"
    CANARY = "canary"
    STABLE = "stable"
    RETIRED = "retired"
    HALTED = "halted"
    WITHDRAWN = "withdrawn"


class RequestKind(StrEnum):
    """What an operator may ask of the server."""

    CANARY = "canary"
    STABLE = "stable"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class StoredRelease:
    """A release in the state folder.

    Attributes:
        release: As it was made.
        state: What has become of it: ``stored`` is announced nowhere yet, ``retired`` was replaced by another, ``halted`` was
            reverted because of what devices reported, ``withdrawn`` was taken back by the operator.
        reason: Why, for people.
        added_at: Unix seconds.
        changed_at: Unix seconds of the last change of ``state``.
        stable_at: Unix seconds at which it became stable for the first time; None if it never did.
        folder: ``STATE/releases/NUMBER``, in release-folder layout. The files of old releases are deleted one day.
    """

    release: Release
    state: ReleaseState
    reason: str
    added_at: float
    changed_at: float
    stable_at: float | None
    folder: Path

    @property
    def number(self) -> int:
        """Of the release."""
        return self.release.number

    @property
    def objects(self) -> tuple[tuple[Path, ObjectRef], ...]:
        """Its files and what they hold: what devices may ask for. The model comes first."""
        release = self.release
        objects = [(self.folder / MODEL_FILE, release.model), (self.folder / GOLDEN_FILE, release.golden)]
        if release.delta is not None:
            objects.append((self.folder / DELTA_FILE, release.delta.object))
        return tuple(objects)

    @property
    def on_disk(self) -> bool:
        """Whether all its files are (still) there."""
        return all(path.is_file() for path, _ in self.objects)


@dataclass(frozen=True, slots=True)
class StoredChannel:
    """What a channel is meant to say; the newest manifest may lag behind it for a moment.

    Attributes:
        channel: Which.
        number: Of its release; None while it has none.
        share: Of the devices; 1 on the stable channel, 0 on an empty canary channel.
        began_at: Unix seconds since which it has this release and this share.
        first_manifest: Reports that name an older manifest are about an earlier attempt with the release.
    """

    channel: Channel
    number: int | None
    share: float
    began_at: float
    first_manifest: int


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest that was signed.

    Attributes:
        manifest: What it says.
        envelope: What is published.
    """

    manifest: Manifest
    envelope: bytes


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """What an operator has asked for.

    Attributes:
        id: Rises.
        kind: Of what.
        number: Of the release; None lets the server choose (``rollback``).
        share: For a canary; None is the setting's.
        at: Unix seconds.
        outcome: What the server has answered; None while it has not.
    """

    id: int
    kind: RequestKind
    number: int | None
    share: float | None
    at: float
    outcome: str | None


@dataclass(frozen=True, slots=True)
class StoredReport:
    """What a device has said last about a release.

    Attributes:
        agent: Its name.
        report: What it said.
        at: Unix seconds at which that was heard.
    """

    agent: str
    report: ReleaseReport
    at: float


@dataclass(frozen=True, slots=True)
class StoredFollower:
    """A device that runs models: whoever has said once which one.

    Attributes:
        agent: Its name.
        model: Its last word about that; None if it has only reported.
        sessions: Of its processes that have reported, the newest last; a bounded number is kept.
        changed_at: Unix seconds.
    """

    agent: str
    model: ModelState | None
    sessions: tuple[str, ...]
    changed_at: float
