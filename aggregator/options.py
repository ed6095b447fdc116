"""Options that several of ``aggregator``'s commands share, and the settings that follow from them."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from aggregator.config import SECRETS, AggregatorConfig
from federation.config import load
from federation.errors import ConfigError

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; `aggregator init` writes one.")
]
StateOption = Annotated[str | None, typer.Option("--state", help="State folder (state_dir).")]
FederationOption = Annotated[str | None, typer.Option("--federation", help="Name of the federation.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, e.g. --set rounds.quorum=0.7"),
]


def parse_settings(settings: list[str] | None) -> dict[str, object]:
    """Read ``--set KEY=VALUE``: the value is TOML, or else a plain string.

    Raises:
        ConfigError: If there is no ``=``.
    """
    parsed: dict[str, object] = {}
    for setting in settings or []:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting!r}: write it as KEY=VALUE")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        parsed[key.strip()] = value
    return parsed


def without_secrets(effective: AggregatorConfig) -> AggregatorConfig:
    """The settings as they may be shown or written to a file: a password must come from the environment again."""
    return msgspec.structs.replace(effective, broker=msgspec.structs.replace(effective.broker, password=""))


def served_config(state_dir: str) -> Path:
    """Where ``serve`` leaves its settings, so that ``enroll`` in another terminal agrees with it without flags."""
    return Path(state_dir) / "served.toml"


def read_settings(file: Path | None, flags: Mapping[str, object]) -> AggregatorConfig:
    """The settings of a configuration file, the environment and flags.

    Raises:
        ConfigError: If the file is missing, or a setting is wrong.
    """
    return load(
        AggregatorConfig,
        file=file,
        secrets=SECRETS,
        flags=flags,
        missing=f"check --config, or let `aggregator init {file}` write it",
    )


def last_served(state_dir: str | None) -> Path | None:
    """The settings of the server that runs, or ran last, in a state folder; None if there are none."""
    path = served_config(state_dir or AggregatorConfig().state_dir)
    return path if path.exists() else None
