"""``model-export verify``: is this folder what the owner of a release key has signed, and does the model do what it did there?

The same checks as on a device, for whoever carries a release by hand or asks what runs there. Needs no torch.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from federation.bundle import read_bundle
from federation.errors import ConfigError, ReleaseError, VerificationError
from federation.release import GOLDEN_FILE, MODEL_FILE, check_files, open_manifest, read_manifest
from federation.task.engine import Engine
from federation.task.golden import check_answers, read_golden
from federation.wire.release import Release
from federation.wire.signing import public_key

_KEY_DIGITS = 64
_ROLES = ("the present release key", "the successor of the present release key")


@dataclass(frozen=True, slots=True)
class Trusted:
    """Whom a release must come from.

    Attributes:
        federation: Its name.
        keys: Release keys, the present one first.
        names: What the keys are called in messages.
    """

    federation: str
    keys: tuple[Ed25519PublicKey, ...]
    names: tuple[str, ...]


def verify(
    folder: Annotated[
        Path, typer.Argument(help="A signed release: STATE/releases/N of the aggregator, or a device's slot.")
    ],
    *,
    key: Annotated[
        list[str],
        typer.Option(
            "--key", help="A device's bundle, which pins the keys; or a key in hex, with --federation."
        ),
    ],
    federation: Annotated[str | None, typer.Option("--federation", help="Whose release it must be.")] = None,
) -> None:
    """Check signature, federation, expiry, hashes, and the model's answers to its golden set. Exit code 5 if one fails."""
    trusted = trust(key, federation)
    try:
        for line in checks(folder, trusted, now=time.time()):
            typer.echo(line)
    except ReleaseError as error:
        raise VerificationError(f"{folder}: {error}") from error
    typer.echo(f"{folder} is what it says")


def trust(keys: Sequence[str], federation: str | None) -> Trusted:
    """Read what was given for ``--key``.

    Args:
        keys: Each 64 hex digits, or the path of a bundle.
        federation: None takes it from the bundle.

    Raises:
        ConfigError: If one is neither, a bundle pins no keys, or nobody says which federation it is.
    """
    found: list[Ed25519PublicKey] = []
    names: list[str] = []
    for text in keys:
        if not Path(text).is_file():
            if len(text) != _KEY_DIGITS:
                raise ConfigError(f"--key {text!r} is neither a bundle nor a key of {_KEY_DIGITS} hex digits")
            found.append(public_key(text))
            names.append(f"key {text[:16]}...")
            continue
        bundle = read_bundle(Path(text))
        if not bundle.release_keys:
            raise ConfigError(
                f"{text} pins no release keys: make a new one with `aggregator enroll --replace`"
            )
        if federation not in (None, bundle.federation):
            raise ConfigError(
                f"{text} is of federation {bundle.federation!r}, not {federation!r}: name one of them"
            )
        federation = bundle.federation
        found += [public_key(each) for each in bundle.release_keys]
        names += _ROLES[: len(bundle.release_keys)]
    if federation is None:
        raise ConfigError(
            "a key says nothing of its federation: add --federation NAME, or give a bundle for --key"
        )
    return Trusted(federation, tuple(found), tuple(names))


def checks(folder: Path, trusted: Trusted, *, now: float) -> Iterator[str]:
    """Check one thing after the other, and say what was found.

    Args:
        folder: In release-folder layout.
        trusted: Whom it must come from.
        now: Unix seconds.

    Yields:
        A line for each check that passed.

    Raises:
        ReleaseError: At the first that failed (``federation.release``).
        VerificationError: If there is no manifest, it has expired, or the model is not the one that the release describes.
    """
    try:
        envelope = read_manifest(folder)
    except ConfigError as error:
        raise VerificationError(str(error)) from error
    signed = open_manifest(envelope, federation=trusted.federation, keys=trusted.keys)
    manifest, release = signed.manifest, signed.manifest.release
    yield f"signature   {trusted.names[signed.signer]}, for federation {trusted.federation!r}"
    if release is None:
        raise VerificationError(f"{folder}: manifest {manifest.version} names no release")
    yield (
        f"manifest    version {manifest.version} of {_day(manifest.issued_at)}, {manifest.channel.value}, "
        f"{manifest.share:.0%} of the devices"
    )
    if now >= manifest.expires_at:
        raise VerificationError(
            f"{folder}: the manifest has expired on {_day(manifest.expires_at)}: a device with a right clock refuses it; "
            "get the newest one"
        )
    yield f"expiry      {_day(manifest.expires_at)}"
    check_files(folder, release)
    yield f"hashes      model {release.model.sha256[:16]}..., golden set {release.golden.sha256[:16]}..."
    yield from _model(folder, release)


def _model(folder: Path, release: Release) -> Iterator[str]:
    try:
        engine = Engine(folder / MODEL_FILE)
    except ConfigError as error:
        raise VerificationError(str(error)) from error
    if engine.card.requirements != release.requirements:
        raise VerificationError(
            f"{folder}: the model needs {engine.card.requirements}, the manifest says {release.requirements}"
        )
    if engine.card.provenance.round != release.round:
        raise VerificationError(
            f"{folder}: the model is of round {engine.card.provenance.round}, the manifest says {release.round}"
        )
    metrics, privacy = release.metrics, release.privacy
    told = [
        f"release {release.number}, round {release.round}, {release.format.value}, {len(engine.card.labels)} labels"
    ]
    if metrics is not None:
        told.append(f"top-1 {metrics.accuracy:.2%}")
    if privacy is not None:
        told.append(f"epsilon {privacy.epsilon:.3g} at delta {privacy.delta:g} ({privacy.level} level)")
    yield f"model       {', '.join(told)}"
    golden = read_golden(folder / GOLDEN_FILE)
    check_answers(golden, [engine.predict(frame) for frame in golden.frames])
    yield f"golden set  {len(golden.frames)} pictures, answered as when it was exported"


def _day(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d")
