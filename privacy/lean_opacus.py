"""Opacus without what only training on several accelerators needs.

``import opacus`` reaches ``torch.distributed.fsdp`` and ``torch.distributed.tensor``, and with them sympy: 50 MB of resident memory
and seconds of a small device's time. Stand-ins answer for the four names that are asked for, while it is imported.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import structlog

_ASKED = {
    "torch.distributed._composable.fsdp": ("FSDPModule",),
    "torch.distributed._tensor.experimental": ("implicit_replication",),
    "torch.distributed.fsdp": ("MixedPrecisionPolicy", "fully_shard"),
    "torch.distributed.tensor": ("DTensor",),
}
"""Classes and functions that Opacus 1.6 takes from parts of torch which it uses for sharded models alone."""

_PARENTS = ("torch.distributed._composable", "torch.distributed._tensor")

log = structlog.get_logger()


def import_opacus(part: str) -> Any:
    """A module of Opacus, such as ``opacus.grad_sample``.

    An Opacus that wants more than the stand-ins have gets the real modules. Afterwards ``import torch.distributed.fsdp`` works
    as ever.

    Raises:
        ImportError: If Opacus is not installed, or cannot be imported.
    """
    names = (*_PARENTS, *_ASKED)
    if "opacus" not in sys.modules and not any(name in sys.modules for name in names):
        importlib.import_module("torch.distributed")  # the real one: it is their parent
        stand_ins = {name: _stand_in(name) for name in names}
        sys.modules.update(stand_ins)
        try:
            importlib.import_module("opacus")
        except (AttributeError, ImportError) as error:
            log.debug("stand_in_rejected", reason=str(error))
            for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
                del sys.modules[name]
        finally:
            for name, module in stand_ins.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
        parent = sys.modules["torch.distributed"]
        if not hasattr(parent, "tensor") and "opacus" in sys.modules:
            # Opacus' hooks compare types with torch.distributed.tensor.DTensor. The real module's import takes this place.
            parent.tensor = stand_ins["torch.distributed.tensor"]  # type: ignore[attr-defined]
    return importlib.import_module(part)


def _stand_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    for asked in _ASKED.get(name, ()):
        setattr(module, asked, type(asked, (), {}))
    return module
