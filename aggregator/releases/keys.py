"""The keys that sign releases: the present one, and its successor, which devices pin already.

A device obeys a release only if one of two keys signed it. When the successor signs, the device forgets the present key
and pins the one that comes after (``Manifest.next_key``), so the present key can be replaced without touching a device, also
after it was stolen: a manifest of the present key never changes what is pinned. Against a thief who reads the whole state
folder this helps only if the successor's private key is kept elsewhere; signing needs its public half alone.

::

    STATE/identity/release.key        private key that signs
    STATE/identity/release-next.key   private key of its successor; may be taken away until it is needed
    STATE/identity/release-next.pub   public half of the successor; the last file to be written, so it says that all are there
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from federation.errors import ConfigError
from federation.files import disk_error, write_whole
from federation.wire.signing import (
    load_private_key,
    private_key_bytes,
    public_key,
    public_key_hex,
)

PRESENT_FILE = "release.key"
SUCCESSOR_FILE = "release-next.key"
SUCCESSOR_PUBLIC_FILE = "release-next.pub"

_FOLDER = "identity"
_LOCK_FILE = "release.lock"
_PRIVATE = 0o600
_PRIVATE_FOLDER = 0o700

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ReleaseKeyPair:
    """Both keys at one moment: what a manifest is signed with, and what it announces.

    Attributes:
        present: Signs.
        successor: Comes after it (``Manifest.next_key``).
    """

    present: Ed25519PrivateKey
    successor: Ed25519PublicKey

    @property
    def pinned(self) -> tuple[str, str]:
        """As they stand in a device's bundle: hex."""
        return public_key_hex(self.present), public_key_hex(self.successor)

    def __repr__(self) -> str:
        present, successor = self.pinned
        return f"ReleaseKeyPair(present={present[:12]}, successor={successor[:12]})"


class ReleaseKeys:
    """The release keys of one federation, made on first use. Safe in several processes at once.

    Nothing is kept in memory: a rotation by another process counts at the next call.

    Args:
        state_dir: The aggregator's state folder.

    Raises:
        ConfigError: If a key is missing that devices have pinned, one is damaged, or the folder cannot be written.
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir.resolve() / _FOLDER
        try:
            self._folder.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self._folder) from error
        self._present_file = self._folder / PRESENT_FILE
        self._successor_file = self._folder / SUCCESSOR_FILE
        self._public_file = self._folder / SUCCESSOR_PUBLIC_FILE
        self.pair()

    @property
    def present(self) -> Ed25519PrivateKey:
        """The key that signs releases."""
        return self.pair().present

    @property
    def successor(self) -> Ed25519PublicKey:
        """The key that will sign after the next rotation."""
        return self.pair().successor

    @property
    def successor_file(self) -> Path:
        """Where the successor's private key lies, or must be brought back to for a rotation."""
        return self._successor_file

    def pair(self) -> ReleaseKeyPair:
        """Both, of the same moment.

        Raises:
            ConfigError: As the class.
        """
        with self._exclusive():
            return self._settled()

    def rotate(self) -> ReleaseKeyPair:
        """Let the successor take over, and make the one that comes after it. The former key is gone for good.

        Devices follow when they see a manifest of the new key. One that sees none before the next rotation must be
        enrolled again.

        Returns:
            The new keys.

        Raises:
            ConfigError: If the successor's private key is not there, or as the class.
        """
        with self._exclusive():
            before = self._settled()
            if not self._successor_file.exists():
                raise ConfigError(
                    f"the successor's private key is not at {self._successor_file}: bring it back from where you keep "
                    f"it (its public half is {public_key_hex(before.successor)[:16]}...), then rotate again"
                )
            _write_key(self._present_file, _load(self._successor_file))
            after = self._settled()
        _log.info(
            "release_key_rotated",
            former=before.pinned[0][:16],
            present=after.pinned[0][:16],
            successor=after.pinned[1][:16],
        )
        return after

    def _settled(self) -> ReleaseKeyPair:
        """Finish what a crash has cut off, or begin, and read the keys."""
        if not self._public_file.exists():
            self._create()
        present, successor = self._load_present(), self._load_public()
        if public_key_hex(present) == public_key_hex(successor):
            present, successor = self._finish_rotation(present)
        elif self._successor_file.exists():
            found = public_key_hex(_load(self._successor_file))
            if found != public_key_hex(successor):
                raise ConfigError(
                    f"{self._successor_file} (public half {found[:16]}...) is not the successor that devices have pinned "
                    f"({public_key_hex(successor)[:16]}...): bring the right one back"
                )
        return ReleaseKeyPair(present, successor)

    def _create(self) -> None:
        if not self._successor_file.exists():
            if self._present_file.exists():
                raise ConfigError(
                    f"{self._present_file} has no successor beside it, neither {SUCCESSOR_FILE} nor "
                    f"{SUCCESSOR_PUBLIC_FILE}: restore {self._folder} from a backup"
                )
            _write_key(self._successor_file, Ed25519PrivateKey.generate())
        if not self._present_file.exists():
            _write_key(self._present_file, Ed25519PrivateKey.generate())
        self._write_public(_load(self._successor_file))

    def _finish_rotation(self, present: Ed25519PrivateKey) -> tuple[Ed25519PrivateKey, Ed25519PublicKey]:
        """The present key is the announced successor: nobody has seen yet which one comes after it."""
        after = _load(self._successor_file) if self._successor_file.exists() else present
        if public_key_hex(after) == public_key_hex(present):
            after = Ed25519PrivateKey.generate()
            _write_key(self._successor_file, after)
        self._write_public(after)
        return present, after.public_key()

    def _load_present(self) -> Ed25519PrivateKey:
        if not self._present_file.exists():
            raise ConfigError(
                f"the release key {self._present_file} is gone, and devices have pinned it: restore it from a backup, or "
                f"copy {SUCCESSOR_FILE} to {PRESENT_FILE}, which rotates to the successor"
            )
        return _load(self._present_file)

    def _load_public(self) -> Ed25519PublicKey:
        try:
            return public_key(self._public_file.read_text().strip())
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(
                f"cannot read the public key {self._public_file} ({error}): restore it from a backup"
            ) from error

    def _write_public(self, key: Ed25519PrivateKey) -> None:
        write_whole(self._public_file, public_key_hex(key).encode() + b"\n", mode=_PRIVATE)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        path = self._folder / _LOCK_FILE
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, _PRIVATE)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _write_key(path: Path, key: Ed25519PrivateKey) -> None:
    write_whole(path, private_key_bytes(key).hex().encode() + b"\n", mode=_PRIVATE)


def _load(path: Path) -> Ed25519PrivateKey:
    try:
        return load_private_key(path)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the release key {path} cannot be read or is damaged: restore it from a backup"
        ) from error
