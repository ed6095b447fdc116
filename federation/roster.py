"""A federation's roster: which device has which identity, in a file that people can read and carry.

::

    [fleet]                         # the federation
    pi1 = "3b6a27bc…"               # Ed25519 public key, 64 hex digits
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from federation.errors import ConfigError
from federation.files import write_whole
from federation.wire.fields import Name

_KEY_BYTES = 32

_REMEDY = "let the operator write a new one with `aggregator roster FILE`"


def read_roster(path: Path, federation: str) -> dict[str, bytes]:
    """Read a roster.

    Args:
        path: Of the file.
        federation: Whose devices are wanted.

    Returns:
        Name to Ed25519 public key, 32 bytes.

    Raises:
        ConfigError: If the file is missing or damaged, or lacks the federation.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the roster {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the roster {path} is damaged ({error}): {_REMEDY}") from error
    if federation not in tables:
        raise ConfigError(
            f"the roster {path} is of {', '.join(tables) or 'nobody'}, not of {federation}: {_REMEDY}"
        )
    try:
        listed = msgspec.convert(tables[federation], dict[Name, str])
        keys = {name: bytes.fromhex(text) for name, text in listed.items()}
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"the roster {path} is damaged ({error}): {_REMEDY}") from error
    for name, key in keys.items():
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"the roster {path} is damaged (key of {name}): {_REMEDY}")
    return keys


def write_roster(path: Path, federation: str, keys: Mapping[str, bytes]) -> None:
    """Write a roster whole.

    Args:
        path: Of the file.
        federation: Whose devices they are.
        keys: Name to Ed25519 public key, 32 bytes.

    Raises:
        ConfigError: If it cannot be written.
    """
    lines = [f"[{federation}]", *(f'{name} = "{keys[name].hex()}"' for name in sorted(keys))]
    write_whole(path, ("\n".join(lines) + "\n").encode())
