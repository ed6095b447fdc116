"""Settings: defaults < TOML file < environment (secrets) < flags, decoded once into a frozen struct.

The struct's docstring is the documentation of its keys: ``describe`` reads it, the commented TOML file and
``docs/configuration.md`` are made from it.
"""

import difflib
import inspect
import os
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from federation.errors import ConfigError

T = TypeVar("T", bound=Struct)


class Table(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all settings: a table of the TOML file."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a configuration.

    Attributes:
        key: Dotted path, e.g. ``rounds.deadline_s``.
        default: Its default.
        text: What it does, in one sentence or two.
    """

    key: str
    default: Any
    text: str


def load(
    kind: type[T],
    *,
    file: Path | None = None,
    secrets: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    missing: str = "check --config",
) -> T:
    """Read the effective settings.

    Args:
        kind: Frozen struct; nested structs are TOML tables.
        file: A TOML file, or None.
        secrets: Environment variable -> dotted key, for what must not stand in a file.
        flags: Dotted key -> value; a value of None means "not given".
        missing: What to do where there is no such file.

    Returns:
        The decoded settings.

    Raises:
        ConfigError: For a missing or broken file, an unknown key (suggesting the nearest), or a bad value.
    """
    raw = _read(file, missing) if file else {}
    _refuse_unknown(kind, raw, "", str(file))
    for variable, key in (secrets or {}).items():
        if variable in os.environ:
            _put(raw, key, os.environ[variable])
    given: dict[str, Any] = {}
    for key, value in (flags or {}).items():
        if value is not None:
            _put(given, key, value)
            _put(raw, key, value)
    _refuse_unknown(kind, given, "", "the flags")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        where = f" in {file}" if file else ""
        raise ConfigError(f"setting{where}: {_plain(str(error))}") from error


def describe(kind: type[Struct], prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of ``kind``, depth first, top-level keys before tables (as TOML needs it)."""
    texts = _attribute_texts(kind)
    tables: list[tuple[str, type[Struct]]] = []
    for field in msgspec.structs.fields(kind):
        nested = _struct_of(field.type)
        if nested is not None:
            tables.append((field.name, nested))
            continue
        default = field.default if field.default is not msgspec.NODEFAULT else None
        yield Setting(prefix + field.name, default, texts.get(field.name, ""))
    for name, nested in tables:
        yield from describe(nested, f"{prefix}{name}.")


def to_toml(settings: Struct) -> str:
    """Write settings as commented TOML; what equals its default is commented out."""
    values = msgspec.to_builtins(settings)
    lines: list[str] = []
    table = ""
    for setting in describe(type(settings)):
        head, _, name = setting.key.rpartition(".")
        if head != table:
            table = head
            lines += ["", f"[{table}]"]
        value: Any = values
        for part in setting.key.split("."):
            value = value[part]
        comment = "" if value != msgspec.to_builtins(setting.default) else "# "
        lines += [f"# {line}" for line in _wrap(setting.text)]
        lines.append(f"{comment}{name} = {_toml_value(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _read(file: Path, missing: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"configuration file {file} does not exist: {missing}") from None
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not valid TOML: {error}") from error


def _refuse_unknown(kind: type[Struct], raw: Mapping[str, Any], prefix: str, file: str) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name, value in raw.items():
        if name not in fields:
            known = [setting.key for setting in describe(kind, prefix)] + [prefix + field for field in fields]
            near = difflib.get_close_matches(prefix + name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(fields)}"
            raise ConfigError(f"unknown setting {prefix + name!r} in {file}{hint}")
        nested = _struct_of(fields[name].type)
        if nested is not None and isinstance(value, Mapping):
            _refuse_unknown(nested, value, f"{prefix}{name}.", file)


def _put(raw: dict[str, Any], key: str, value: object) -> None:
    *path, name = key.split(".")
    for part in path:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"setting {part!r} must be a table")
    raw[name] = value


def _struct_of(kind: Any) -> type[Struct] | None:
    return kind if inspect.isclass(kind) and issubclass(kind, Struct) else None


def _attribute_texts(kind: type[Struct]) -> dict[str, str]:
    """Read the ``Attributes:`` section of a Google-style docstring."""
    doc = inspect.getdoc(kind) or ""
    _, _, section = doc.partition("Attributes:\n")
    texts: dict[str, str] = {}
    for block in re.split(r"\n(?= {4}\w)", "\n" + section.split("\n\n")[0]):
        name, _, text = block.strip().partition(": ")
        if text:
            texts[name] = " ".join(text.split())
    return texts


def _plain(message: str) -> str:
    """Turn msgspec's ``... - at `$.rounds.count` `` into an operator's words."""
    return re.sub(r" - at `\$\.?([^`]*)`", lambda found: f" (key {found[1]!r})" if found[1] else "", message)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 96)


def _toml_value(value: Any) -> str:
    # Basic strings, numbers, booleans and arrays have the same form in JSON and TOML, but for the one control character.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
