"""What the NPU backends of all families share.

They call the operators that torch_npu registers, `torch.ops.npu.*`, and import nothing: where a
tensor is on an NPU, torch_npu is loaded already. The calls are the raw forward and backward
operators; autograd is ours, so that only what our formula needs is saved.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from .registry import Facts

PRIORITY = 10
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def available() -> str | None:
    """Return None when torch_npu is loaded, else the reason why its operators are not there."""
    return None if "torch_npu" in sys.modules else "torch_npu is not loaded"


def declines(facts: Facts, dtypes: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Verdict of a kernel that serves these dtypes on an NPU."""
    if facts.device != "npu":
        return f"tensors on {facts.device}, need npu"
    if facts.dtype not in dtypes:
        return f"torch_npu has no kernel for {facts.dtype}"
    return None


def op(name: str) -> Any:
    """Return one of torch_npu's operators, looked up at the call."""
    return getattr(torch.ops.npu, name)
