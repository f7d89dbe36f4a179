"""Megatron's fused SwiGLU entries on ms_ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
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
    if cpu_offload_input:
        for kept in (input,) if bias is None else (input, bias):
            kept.activation_offloading = True  # type: ignore[attr-defined]
    with _stored_in_fp8(input, fp8_input_store):
        return ms_ops.swiglu(input) if bias is None else ms_ops.bias_swiglu(input, bias)


def weighted_bias_swiglu_impl(
    input: Tensor, bias: Tensor | None, weights: Tensor, fp8_input_store: bool = False
) -> Tensor:
    """Return silu(a) * b for the halves of `input + bias`, each row times its weight.

    Args:
        input: [..., 2h].
        bias: [2h] or None.
        weights: [..., 1], as the router gives them.
        fp8_input_store: keep the input in fp8 for the backward.

    Returns:
        [..., h] in the dtype of the input.
    """
    input = input if bias is None else input + bias
    with _stored_in_fp8(input, fp8_input_store):
        return ms_ops.weighted_swiglu(input, weights)


def wrap_grouped_experts(original: Callable[..., None]) -> Callable[..., None]:
    """Give Megatron's grouped experts the weighted activation, where they have a SwiGLU."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if self.config.gated_linear_unit and self.config.activation_func is F.silu:
            self.activation_func_with_probs = ms_ops.weighted_swiglu

    return init


@contextmanager
def _stored_in_fp8(input: Tensor, wanted: bool) -> Iterator[None]:
    """Keep `input`, and only it, in fp8 for the backward of what runs inside."""
    if not wanted:
        yield
        return
    place = (input.data_ptr(), input.shape)

    def pack(saved: Tensor) -> Tensor | tuple[torch.dtype, Tensor]:
        if (saved.data_ptr(), saved.shape) != place:
            return saved
        return saved.dtype, saved.to(torch.float8_e4m3fn)

    def unpack(packed: Tensor | tuple[torch.dtype, Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
