"""A release on disk: a folder that holds a model, its golden set and, once it is released, its signed manifest.

``model-export onnx`` writes one, the aggregator keeps each of its releases in one, and every slot of a device is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from federation.errors import ConfigError, PeerError, Rejection, ReleaseError, ReleaseFault
from federation.wire.messages import ObjectRef
from federation.wire.release import Channel, Manifest, Release
from federation.wire.signing import AGGREGATOR, Purpose, unseal

MODEL_FILE = "model.onnx"
GOLDEN_FILE = "golden.safetensors"
MANIFEST_FILE = "manifest.signed"
"""The envelope as it came over the wire, or goes there."""

MAX_MANIFEST_BYTES = 1 << 20

_FAULTS = {
    Rejection.MALFORMED: ReleaseFault.MALFORMED,
    Rejection.WRONG_FEDERATION: ReleaseFault.WRONG_FEDERATION,
}


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest whose signature was verified.

    Attributes:
        manifest: What it says.
        signer: Index of the key that signed it among those that were given.
        envelope: The bytes that were verified.
    """

    manifest: Manifest
    signer: int
    envelope: bytes


def open_manifest(
    envelope: bytes, *, federation: str, keys: Sequence[Ed25519PublicKey], channel: Channel | None = None
) -> SignedManifest:
    """Verify a manifest against pinned keys.

    Its expiry and its version are judged by who knows the time and the versions seen before.

    Args:
        envelope: From anywhere.
        federation: Whose it must be.
        keys: The release keys, the present one first; a signature of any of them counts.
        channel: On which it came; None accepts any.

    Raises:
        ReleaseError: ``malformed``, ``wrong_federation`` or ``bad_signature``.
    """
    if len(envelope) > MAX_MANIFEST_BYTES:
        raise ReleaseError(
            ReleaseFault.MALFORMED, f"{len(envelope)} bytes, a manifest has at most {MAX_MANIFEST_BYTES}"
        )
    refused: PeerError | None = None
    for signer, key in enumerate(keys):
        try:
            manifest = unseal(
                envelope,
                Manifest,
                purpose=Purpose.RELEASE,
                federation=federation,
                sender=AGGREGATOR,
                key=key,
            )
        except PeerError as error:
            refused = error
            continue
        if channel is not None and manifest.channel is not channel:
            raise ReleaseError(
                ReleaseFault.MALFORMED,
                f"made for channel {manifest.channel.value!r}, came on {channel.value!r}",
            )
        return SignedManifest(manifest, signer, envelope)
    if refused is None:
        raise ReleaseError(
            ReleaseFault.BAD_SIGNATURE,
            "this device has no release keys: enrol it again (`aggregator enroll --replace`)",
        )
    raise ReleaseError(_FAULTS.get(refused.code, ReleaseFault.BAD_SIGNATURE), refused.detail)


def read_manifest(folder: Path) -> bytes:
    """The signed manifest of a release folder.

    Raises:
        ConfigError: If there is none, or it cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{folder} is not a signed release: cannot read {path}: {error.strerror or error}"
        ) from error


def check_files(folder: Path, release: Release) -> None:
    """Compare model and golden set with the hashes that were signed.

    Raises:
        ReleaseError: ``wrong_hash`` for the first file that differs or is missing.
    """
    for name, ref in ((MODEL_FILE, release.model), (GOLDEN_FILE, release.golden)):
        check_file(folder / name, ref)


def check_file(path: Path, ref: ObjectRef) -> None:
    """Compare a file with what was signed.

    Raises:
        ReleaseError: ``wrong_hash`` if it is another, cannot be read, or is missing.
    """
    try:
        with path.open("rb") as file:
            found = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ReleaseError(
            ReleaseFault.WRONG_HASH, f"cannot read {path}: {error.strerror or error}"
        ) from error
    if found != ref.sha256:
        raise ReleaseError(
            ReleaseFault.WRONG_HASH, f"{path} has SHA-256 {found[:12]}, the manifest says {ref.sha256[:12]}"
        )
