"""What the vendor's kernels refuse."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def need(op: str, holds: bool, what: str) -> None:
    """Raise RuntimeError, as torch_npu does, unless the requirement holds."""
    if not holds:
        raise RuntimeError(f"{op} (emulated): need {what}")


def need_dtypes(op: str, *tensors: Tensor | None) -> None:
    """Require fp16, bf16 or fp32, the same in all tensors."""
    kinds = {t.dtype for t in tensors if t is not None}
    need(op, len(kinds) == 1 and kinds <= set(FLOATS), f"one dtype of fp16, bf16, fp32: {kinds}")


def need_contiguous(op: str, *tensors: Tensor) -> None:
    """Require contiguous tensors."""
    need(op, all(t.is_contiguous() for t in tensors), "contiguous tensors")
