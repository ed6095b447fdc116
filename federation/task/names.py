"""Names that people type for models and data sets: plug-ins (``package.module:factory``) and nearest spellings."""

import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from federation.errors import ConfigError

_PLUGIN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_plugin(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:factory``."""
    return _PLUGIN.fullmatch(name) is not None


def load_plugin(name: str) -> Callable[..., Any]:
    """Import the factory that ``package.module:factory`` names. Only code that is installed here can be named.

    Raises:
        ConfigError: If the module cannot be imported, or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a plug-in's own top-level code may raise anything
        raise ConfigError(
            f"cannot import {module_name!r} for {name!r}: {error}. "
            "Install it into this environment, or put its folder on PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        callables = (key for key, value in vars(module).items() if callable(value))
        raise ConfigError(
            f"module {module_name!r} has no function {attribute!r}{did_you_mean(attribute, callables)}"
        )
    return factory  # type: ignore[no-any-return]  # getattr gives Any, checked to be callable above


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``: the known one nearest to it, where one is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
