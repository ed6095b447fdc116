"""The one file that a device needs to join: its identity, the pinned aggregator, the broker and the account there."""

import os
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta, Struct

from federation.errors import ConfigError
from federation.files import write_whole
from federation.wire.address import BrokerAddress
from federation.wire.fields import Name

FORMAT = 1
"""The layout of the file; raised when an older fedge could not read a newer bundle."""

_MAX_BYTES = 1 << 20
"""A bundle with a long CA chain stays below 100 KB; a larger file is something else."""

_PRIVATE = 0o600
_OTHERS = 0o077

KeyHex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]

_log = structlog.get_logger()


class Bundle(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device is given at its enrolment. Secret: whoever holds the file is the device.

    Attributes:
        format: Always :data:`FORMAT`.
        federation: The federation that the device joins.
        agent: Its name, which is also its user name on the broker.
        private_key: Hex seed of its Ed25519 key.
        aggregator_key: Hex Ed25519 public key of the aggregator: what it signs is obeyed, nothing else is.
        broker: A URL as :meth:`BrokerAddress.parse` reads it, without credentials.
        username: Account on the broker.
        password: Its password.
        release_keys: Hex Ed25519 public keys of which one must have signed a release: the present one and its successor.
        ca_pem: PEM certificates that the broker's must descend from; empty trusts the system's.
    """

    format: int = FORMAT
    federation: Name
    agent: Name
    private_key: KeyHex
    aggregator_key: KeyHex
    broker: Annotated[str, Meta(max_length=500)]
    username: Annotated[str, Meta(min_length=1, max_length=200)]
    password: Annotated[str, Meta(min_length=1, max_length=200)]
    release_keys: Annotated[tuple[KeyHex, ...], Meta(max_length=2)] = ()
    ca_pem: str = ""

    def __repr__(self) -> str:
        return f"Bundle(federation={self.federation!r}, agent={self.agent!r}, broker={self.broker!r})"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        """What ``rich`` prints: as little as ``repr``."""
        return [("federation", self.federation), ("agent", self.agent), ("broker", self.broker)]


def address(bundle: Bundle) -> BrokerAddress:
    """Where and as whom the device connects.

    Raises:
        ConfigError: If the bundle's broker URL is wrong, carries credentials, or does not go with its certificates.
    """
    check_broker_url(bundle.broker)
    return BrokerAddress.parse(
        bundle.broker, username=bundle.username, password=bundle.password, ca_pem=bundle.ca_pem or None
    )


def check_broker_url(url: str) -> None:
    """Refuse a broker URL that a device could not use, or that carries credentials.

    Raises:
        ConfigError: Unless it is ``mqtt://HOST[:PORT]`` or ``mqtts://HOST[:PORT]``, optionally with options.
    """
    if BrokerAddress.parse(url).username is not None:
        raise ConfigError("the broker URL carries a user name: leave it out, each device has its own account")


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write ``bundle`` as JSON, readable by its owner only.

    Raises:
        ConfigError: If the folder is missing or not writable, or the disk is full.
    """
    write_whole(path, msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n", mode=_PRIVATE)


def read_bundle(path: Path) -> Bundle:
    """Read a device's bundle; warns when other users of the device could read it too.

    Raises:
        ConfigError: If the file is missing, unreadable, not a bundle, or of a format that this version does not know.
    """
    remedy = "copy it again, or make a new one with `aggregator enroll NAME --replace`"
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ConfigError(
            f"no bundle at {path}: make one with `aggregator enroll NAME` and copy it here"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the bundle {path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes, so it is no bundle; {remedy}")
    try:
        version = msgspec.json.decode(data, type=_Format).format
        if version != FORMAT:
            raise ConfigError(
                f"{path} is a bundle of format {version}, this fedge reads {FORMAT}: update the older one"
            )
        bundle = msgspec.json.decode(data, type=Bundle)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a bundle ({error}); {remedy}") from error
    address(bundle)
    if mode & _OTHERS and not _handed_over(path):
        _log.warning("bundle_exposed", path=str(path), mode=oct(mode & 0o777), remedy=f"chmod 600 {path}")
    return bundle


def _handed_over(path: Path) -> bool:
    """Whether systemd has put it there for this process alone (LoadCredential=); its access list looks like group rights."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return bool(folder) and path.parent == Path(str(folder))


class _Format(Struct):
    format: int
