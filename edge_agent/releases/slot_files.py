"""What lies in a device's folder of models, how it is read, also by commands that only look, and how links change.

slots/SHA256/            a release folder, named after its model (``federation.release``); in it probation.json:
                         since when it has been on probation, until it is confirmed
parts/SHA256.part        what is being fetched
current, previous        symbolic links to the slot that runs and the one to go back to
quarantine/SHA256.json   a model that failed here, and how
lock                     held by the process that owns all this
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from federation.errors import ConfigError, PeerError, ReleaseError, ReleaseFault
from federation.files import sync_folder
from federation.release import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, read_manifest
from federation.wire.messages import decode_msgpack
from federation.wire.release import Manifest, Release
from federation.wire.signing import Envelope

SLOTS, PARTS, QUARANTINE = "slots", "parts", "quarantine"
CURRENT, PREVIOUS = "current", "previous"
PROBATION_FILE = "probation.json"
LOCK_FILE = "lock"

DAMAGED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for JSON that is none."""


@dataclass(frozen=True, slots=True)
class Slot:
    """An installed release.

    Attributes:
        sha256: Of its model; names the folder.
        folder: Where it is.
        release: What the manifest says of it.
        manifest_version: Version of the manifest that brought it.
    """

    sha256: str
    folder: Path
    release: Release
    manifest_version: int

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL_FILE

    @property
    def golden(self) -> Path:
        """Inputs and what the model must answer."""
        return self.folder / GOLDEN_FILE


def read_slot(folder: Path) -> Slot:
    """Read what a slot holds. Neither hashes nor the signature are checked: both were when it was installed.

    Raises:
        ReleaseError: ``malformed`` if it was not installed to the end, or is damaged.
    """
    try:
        envelope = decode_msgpack(read_manifest(folder), Envelope)
        manifest = decode_msgpack(envelope.body, Manifest)
    except (ConfigError, PeerError) as error:
        raise ReleaseError(ReleaseFault.MALFORMED, f"{folder / MANIFEST_FILE}: {error}") from error
    release = manifest.release
    if release is None or release.model.sha256 != folder.name:
        raise ReleaseError(
            ReleaseFault.MALFORMED, f"{folder / MANIFEST_FILE} is not about the model beside it"
        )
    return Slot(folder.name, folder, release, manifest.version)


def installed(root: Path) -> Iterator[Slot]:
    """All slots that can be read, in no order."""
    for folder in entries(root / SLOTS):
        try:
            yield read_slot(folder)
        except ReleaseError:  # a leftover of an installation: not a slot yet, or not any more
            continue


def linked(root: Path, name: str) -> Path | None:
    """The slot's folder that ``current`` or ``previous`` names, whether it is there or not; None without the link."""
    try:
        target = (root / name).readlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{root / name} is not a link to a slot: delete it") from error
    return root / SLOTS / target.name


def link(root: Path, name: str, slot: Slot) -> None:
    """Have ``current`` or ``previous`` name a slot, atomically and durably.

    Raises:
        OSError: If the disk is full or not writable; the link is as it was.
    """
    temporary = root / f".{name}.new"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path(SLOTS) / slot.sha256)
    temporary.replace(root / name)
    sync_folder(root)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, but for what a power cut left of a write; nothing if there is no such folder."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return []
