"""The base of all tables of the settings."""

from msgspec import Struct


class Table(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the TOML file."""
