"""torchvision without torch's compiler.

``import torchvision`` reaches ``torchvision.ops.roi_align``, which asks ``torch._dynamo.utils`` one question that only
detection models on accelerators have, and so loads the whole compiler, with sympy and triton: 145 MB of resident
memory and seconds of a small device's time. A stand-in answers until the question is really asked.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import structlog

_COMPILER_PART = "torch._dynamo.utils"

log = structlog.get_logger()


def import_torchvision() -> Any:
    """The package ``torchvision``; ``torch._dynamo`` is not imported for it.

    A torchvision that wants more of the compiler than the stand-in has gets the real one. Afterwards ``import
    torch._dynamo`` works as ever.
    """
    if "torchvision" not in sys.modules and _COMPILER_PART not in sys.modules:
        stand_in = ModuleType(_COMPILER_PART)
        stand_in.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
        sys.modules[_COMPILER_PART] = stand_in
        try:
            return importlib.import_module("torchvision")
        except (AttributeError, ImportError) as error:
            log.debug("stand_in_rejected", reason=str(error))
        finally:
            del sys.modules[_COMPILER_PART]
    return importlib.import_module("torchvision")


def _is_compile_supported(device: str) -> bool:
    supported: bool = importlib.import_module(_COMPILER_PART).is_compile_supported(device)
    return supported
