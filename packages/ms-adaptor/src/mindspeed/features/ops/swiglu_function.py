"""Megatron's fused SwiGLU entry on ms_ops."""

from __future__ import annotations

import torch
from torch import Tensor

import ms_ops


def bias_swiglu_impl(
    input: Tensor,
    bias: Tensor | None,
    fp8_input_store: bool = False,
    cpu_offload_input: bool = False,
) -> Tensor:
    """Return silu(a) * b for the halves of `input + bias`.

    Args:
        input: [..., 2h].
        bias: [2h] or None.
        fp8_input_store: keep the input in fp8 for the backward.
        cpu_offload_input: mark what is kept for Megatron's activation offloading.

    Returns:
        [..., h].
    """
    x = input if bias is None else input + bias
    if cpu_offload_input:
        x.activation_offloading = True  # type: ignore[attr-defined]
    if fp8_input_store:
        return _swiglu_with_fp8_input(x)
    return ms_ops.swiglu(x)


def _swiglu_with_fp8_input(x: Tensor) -> Tensor:
    def pack(saved: Tensor) -> tuple[torch.dtype, Tensor]:
        return saved.dtype, saved.to(torch.float8_e4m3fn)

    def unpack(packed: tuple[torch.dtype, Tensor]) -> Tensor:
        return packed[1].to(packed[0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return ms_ops.swiglu(x)
