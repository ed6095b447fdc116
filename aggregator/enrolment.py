"""Identities and broker accounts of a federation, and the bundles that devices get.

Everything lies in the state folder, guarded by a file lock: ``aggregator enroll`` in one process and the server in
another never lose each other's writes, and the server sees a new device without a restart.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct

from aggregator import mosquitto, nats
from aggregator.accounts import Account, new_account
from aggregator.releases.keys import ReleaseKeys
from federation.bundle import Bundle, address
from federation.errors import ConfigError
from federation.files import disk_error, write_whole
from federation.wire.fields import Name
from federation.wire.signing import (
    AGGREGATOR,
    load_private_key,
    private_key_bytes,
    public_key,
    public_key_hex,
)
from federation.wire.topics import Topics, is_name

FORMAT = 1
"""The layout of the accounts file."""

MOSQUITTO_FOLDER = Path("broker") / "mosquitto"
NATS_FOLDER = Path("broker") / "nats"
NATS_ACCOUNTS = "accounts.conf"

_PRIVATE = 0o600
_PRIVATE_FOLDER = 0o700
_GROUP = 0o640
_GROUP_FOLDER = 0o2750
"""The set-group-id bit hands the folder's group on to rewritten files, so one chgrp lets mosquitto read them."""

_log = structlog.get_logger()


class _Accounts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: int = FORMAT
    federation: Name
    accounts: dict[Name, Account]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    stamp: tuple[int, int, int]
    accounts: Mapping[str, Account]
    keys: Mapping[str, Ed25519PublicKey]


class Enrolment:
    """The identities of one federation. Safe to use from several threads and several processes at once.

    Args:
        state_dir: The aggregator's state folder; created, with the aggregator's identity, on first use.
        federation: Name of the federation.

    Raises:
        ConfigError: If the folder belongs to another federation, is damaged, or cannot be written.
    """

    def __init__(self, state_dir: Path, federation: str) -> None:
        if not is_name(federation):
            raise ConfigError(f"federation name {federation!r}: {_NAME_RULE}")
        self.state_dir = state_dir.resolve()
        self.topics = Topics(federation)
        identity = self.state_dir / "identity"
        self._key_file = identity / "aggregator.key"
        self._accounts_file = identity / "accounts.json"
        self._lock_file = identity / "lock"
        _make_folder(identity, _PRIVATE_FOLDER)
        _make_folder(self.state_dir / NATS_FOLDER, _PRIVATE_FOLDER)
        _make_folder(self.state_dir / MOSQUITTO_FOLDER, _GROUP_FOLDER)
        with self._exclusive():
            accounts = self._create() if not self._accounts_file.exists() else self._read()
            # A crash between the two writes of an enrolment leaves the brokers' files behind the accounts.
            self._write_broker_files(accounts)
        self._key = load_private_key(self._key_file)
        self._snapshot = self._load()

    def aggregator_key(self) -> Ed25519PrivateKey:
        """The key with which the aggregator signs."""
        return self._key

    def aggregator_account(self) -> tuple[str, str]:
        """User name and password of the aggregator on the broker."""
        account = self._accounts()[AGGREGATOR]
        return account.name, account.password

    def agents(self) -> Mapping[str, str]:
        """Name -> hex public key of all enrolled agents, as of now."""
        accounts = self._accounts().values()
        return {account.name: account.public_key for account in accounts if account.role == "agent"}

    def key_of(self, agent: str) -> Ed25519PublicKey | None:
        """The pinned key of an agent; None for one that is not (or no longer) enrolled.

        Looks at the file's stamp each time, some microseconds, so enrolments by other processes count at once.
        """
        return self._current().keys.get(agent)

    def enroll(self, name: str, *, broker_url: str, ca_pem: str = "", replace: bool = False) -> Bundle:
        """Give an agent an identity and a broker account.

        A running broker must still be told (``aggregator.broker.reload_running``, or SIGHUP for mosquitto).

        Args:
            name: Of the new agent.
            broker_url: Where the device reaches the broker, without credentials.
            ca_pem: PEM certificates that the broker's must descend from.
            replace: Make a new key and password for an agent that is enrolled already; its old bundle is void.

        Returns:
            What the device needs. The private key and the password are kept nowhere else.

        Raises:
            ConfigError: For a bad, reserved or taken name, or a broker URL that a device could not use.
        """
        check_agent_name(name)
        key = Ed25519PrivateKey.generate()
        account, password = new_account(name, public_key_hex(key))
        bundle = Bundle(
            federation=self.topics.federation,
            agent=name,
            private_key=private_key_bytes(key).hex(),
            aggregator_key=public_key_hex(self._key),
            broker=broker_url,
            username=name,
            password=password,
            release_keys=ReleaseKeys(self.state_dir).pair().pinned,
            ca_pem=ca_pem,
        )
        address(bundle)

        def add(accounts: dict[str, Account]) -> None:
            if name in accounts and not replace:
                raise ConfigError(
                    f"agent {name!r} is enrolled already: replace it (its old bundle becomes void) or choose another name"
                )
            accounts[name] = account

        self._change(add)
        _log.info("agent_enrolled", agent=name, replace=replace)
        return bundle

    def revoke(self, name: str) -> None:
        """Take an agent's identity and account away. A running broker must still be told, as for ``enroll``.

        Raises:
            ConfigError: If no such agent is enrolled.
        """

        def remove(accounts: dict[str, Account]) -> None:
            if name == AGGREGATOR or name not in accounts:
                known = ", ".join(sorted(accounts.keys() - {AGGREGATOR})) or "none"
                raise ConfigError(f"no agent {name!r} is enrolled; enrolled: {known}")
            del accounts[name]

        self._change(remove)
        _log.info("agent_revoked", agent=name)

    def _create(self) -> dict[str, Account]:
        if not self._key_file.exists():
            key = Ed25519PrivateKey.generate()
            write_whole(self._key_file, private_key_bytes(key).hex().encode() + b"\n", mode=_PRIVATE)
        account, _ = new_account(AGGREGATOR, public_key_hex(load_private_key(self._key_file)))
        accounts = {AGGREGATOR: account}
        self._write(accounts)
        return accounts

    def _change(self, apply: Callable[[dict[str, Account]], None]) -> None:
        with self._exclusive():
            accounts = self._read()
            apply(accounts)
            self._write(accounts)
            self._write_broker_files(accounts)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            handle = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, _PRIVATE)
        except OSError as error:
            raise disk_error(error, self._lock_file) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _read(self) -> dict[str, Account]:
        path = self._accounts_file
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=_Accounts)
        except OSError as error:
            raise ConfigError(f"cannot read the accounts {path}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the accounts {path} are damaged ({error}): restore them from a backup"
            ) from error
        if stored.format != FORMAT:
            raise ConfigError(f"{path} has format {stored.format}, this fedge reads {FORMAT}: update fedge")
        if stored.federation != self.topics.federation:
            raise ConfigError(
                f"the state folder {self.state_dir} belongs to federation {stored.federation!r}, "
                f"not {self.topics.federation!r}: name that one, or another folder"
            )
        if AGGREGATOR not in stored.accounts:
            raise ConfigError(f"the accounts {path} lack the aggregator's own: restore them from a backup")
        return stored.accounts

    def _write(self, accounts: dict[str, Account]) -> None:
        stored = _Accounts(federation=self.topics.federation, accounts=accounts)
        data = msgspec.json.format(msgspec.json.encode(stored), indent=1)
        write_whole(self._accounts_file, data + b"\n", mode=_PRIVATE)

    def _write_broker_files(self, accounts: Mapping[str, Account]) -> None:
        everyone = [accounts[name] for name in sorted(accounts)]
        folder = self.state_dir / MOSQUITTO_FOLDER
        _write_changed(folder / "passwd", mosquitto.password_file(everyone), _GROUP)
        _write_changed(folder / "acl", mosquitto.access_list(everyone, self.topics), _GROUP)
        conf = nats.accounts_conf(everyone, self.topics)
        _write_changed(self.state_dir / NATS_FOLDER / NATS_ACCOUNTS, conf, _PRIVATE)

    def _accounts(self) -> Mapping[str, Account]:
        return self._current().accounts

    def _current(self) -> _Snapshot:
        if self._stamp() != self._snapshot.stamp:
            self._snapshot = self._load()
        return self._snapshot

    def _load(self) -> _Snapshot:
        # The stamp is taken first: a write in between makes the next call read again, never miss one.
        stamp = self._stamp()
        accounts = self._read()
        if accounts[AGGREGATOR].public_key != public_key_hex(self._key):
            raise ConfigError(
                f"{self._key_file} is not the key that devices were enrolled with: restore it from a backup"
            )
        keys = {
            name: public_key(account.public_key) for name, account in accounts.items() if name != AGGREGATOR
        }
        return _Snapshot(stamp, MappingProxyType(accounts), MappingProxyType(keys))

    def _stamp(self) -> tuple[int, int, int]:
        try:
            status = self._accounts_file.stat()
        except OSError as error:
            raise ConfigError(f"cannot read the accounts {self._accounts_file}: {error.strerror}") from error
        return status.st_mtime_ns, status.st_ino, status.st_size


_NAME_RULE = "use 1-63 of a-z, 0-9, _ and -, starting with a letter or digit"


def check_agent_name(name: str) -> None:
    """Refuse a name that no agent can have.

    Raises:
        ConfigError: If it has other signs than topics and file names take, or is the server's.
    """
    if not is_name(name):
        raise ConfigError(f"agent name {name!r}: {_NAME_RULE}")
    if name == AGGREGATOR:
        raise ConfigError(f"agent name {name!r} is reserved for the server: choose another")


def _make_folder(folder: Path, mode: int) -> None:
    if folder.is_dir():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(mode)
    except OSError as error:
        raise disk_error(error, folder) from error


def _write_changed(path: Path, data: bytes, mode: int) -> None:
    if not path.exists() or path.read_bytes() != data:
        write_whole(path, data, mode=mode)


__all__ = ["MOSQUITTO_FOLDER", "NATS_ACCOUNTS", "NATS_FOLDER", "Enrolment"]
