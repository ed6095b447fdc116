"""privacy.lean_opacus: Opacus comes without torch's parts for many accelerators, and they stay as they were."""

import subprocess
import sys

LEAN = """
import sys
from privacy.lean_opacus import import_opacus
hooks = import_opacus("opacus.grad_sample").GradSampleHooks
assert hooks.__module__.startswith("opacus.")
assert "torch.distributed.fsdp" not in sys.modules and "sympy" not in sys.modules
from torch.distributed.fsdp import fully_shard
assert callable(fully_shard) and not isinstance(fully_shard, type)
import torch
from torch.distributed.tensor import DTensor
assert torch.distributed.tensor.DTensor is DTensor and issubclass(DTensor, torch.Tensor)
assert import_opacus("opacus.validators").ModuleValidator
"""

WANTS_MORE = """
import sys
from privacy import lean_opacus
lean_opacus._ASKED = {"torch.distributed.tensor": ()}  # as if a later Opacus asked for another name
assert lean_opacus.import_opacus("opacus.grad_sample").GradSampleHooks
assert "torch.distributed.fsdp" in sys.modules
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_opacus_is_imported_without_what_sharded_models_need() -> None:
    run(LEAN)


def test_an_opacus_that_wants_more_gets_the_real_modules() -> None:
    run(WANTS_MORE)
