"""Permutation of tokens by expert, from the experts' indices.

slot j = t * k + i is choice i of token t; p = stable order of the slots by expert
permuted[r] = tokens[p[r] // k]         sorted_indices[p[r]] = r
out[t] = sum over i of probs[t, i] * permuted[sorted_indices[t * k + i]]
dpermuted[r] = probs[p[r]] * dout[p[r] // k]        dprobs[t, i] = <dout[t], its row>
A row beyond the last one that is kept counts as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, check_tensor, fail
from ..device import common_device
from ..opdef import OpDef, define_op
from ..registry import Facts

PERMUTE = "moe_permute"
UNPERMUTE = "moe_unpermute"
_INTS = (torch.int32, torch.int64)


def moe_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Repeat each token for every expert it goes to, in the order of the experts.

    Args:
        tokens: [T, H], fp16, bf16, fp32 or fp64, any strides.
        indices: [T, k] or [T], int32 or int64, not negative: the experts of each token. A token
            may name one expert twice.
        num_out_tokens: how many rows to keep, at most T * k; None or 0 keeps all, a negative
            number leaves out that many.

    Returns:
        permuted: [rows, H]; rows of one expert keep the order of their tokens.
        sorted_indices: [T * k] int32, the row of each choice, also of those that are not kept;
            what `moe_unpermute` takes.
        Backward saves sorted_indices only and sums in fp32 (fp64 for fp64), rounded once.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, T * k of 2^31 and more.
        RuntimeError: tensors on different devices.
    """
    permuted, sorted_indices = PERMUTE_OPERATOR(*prepare(tokens, indices, num_out_tokens))
    return permuted, sorted_indices


def moe_unpermute(permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None = None) -> Tensor:
    """Sum the rows of each token, weighted by `probs`, in the tokens' order.

    Args:
        permuted: [rows, H], fp16, bf16, fp32 or fp64, any strides.
        sorted_indices: [T * k] int32 or int64, the row of each choice, from `moe_permute`; a row
            that is not there counts as zero.
        probs: [T, k], any floating dtype; None for k = 1 and weight 1.

    Returns:
        Tensor [T, H] of permuted's dtype, products and sum in fp32 (fp64 for fp64), rounded once.
        Backward saves sorted_indices, probs, and permuted if probs needs a gradient. The sum has
        one order: two runs are equal.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match.
        RuntimeError: tensors on different devices.
    """
    out: Tensor = UNPERMUTE_OPERATOR(*prepare_unpermute(permuted, sorted_indices, probs))
    return out


def prepare(tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_rows(PERMUTE, "tokens", tokens)
    check_tensor(PERMUTE, "indices", indices)
    if indices.dtype not in _INTS:
        fail(TypeError, PERMUTE, "indices", indices.dtype, "int32 or int64")
    if indices.dim() not in (1, 2):
        fail(ValueError, PERMUTE, "indices", f"{indices.dim()} dimensions", "1 or 2")
    if indices.shape[0] != tokens.shape[0]:
        need = f"{tokens.shape[0]}, those of tokens"
        fail(ValueError, PERMUTE, "indices", f"{indices.shape[0]} rows", need)
    slots = indices.numel()
    check_count(PERMUTE, "indices", slots)
    rows = num_out_tokens or 0
    rows = min(rows, slots) if rows > 0 else max(slots + rows, 0)
    common_device(PERMUTE, tokens, indices)
    return tokens, indices, rows


def prepare_unpermute(
    permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_rows(UNPERMUTE, "permuted", permuted)
    check_tensor(UNPERMUTE, "sorted_indices", sorted_indices)
    if sorted_indices.dtype not in _INTS:
        fail(TypeError, UNPERMUTE, "sorted_indices", sorted_indices.dtype, "int32 or int64")
    if sorted_indices.dim() != 1:
        fail(ValueError, UNPERMUTE, "sorted_indices", f"{sorted_indices.dim()} dimensions", "1")
    if permuted.shape[0] > sorted_indices.shape[0]:
        need = f"at most {sorted_indices.shape[0]}, one for each index"
        fail(ValueError, UNPERMUTE, "permuted", f"{permuted.shape[0]} rows", need)
    if probs is not None:
        check_tensor(UNPERMUTE, "probs", probs)
        check_float(UNPERMUTE, "probs", probs)
        if probs.dim() != 2:
            fail(ValueError, UNPERMUTE, "probs", f"{probs.dim()} dimensions", "2")
        if probs.numel() != sorted_indices.shape[0]:
            need = f"{sorted_indices.shape[0]} elements, those of sorted_indices"
            fail(ValueError, UNPERMUTE, "probs", tuple(probs.shape), need)
    common_device(UNPERMUTE, permuted, sorted_indices, probs)
    return permuted, sorted_indices, probs


def check_rows(op: str, argument: str, value: Tensor) -> None:
    """Raise unless `value` is a floating matrix."""
    check_tensor(op, argument, value)
    check_float(op, argument, value)
    if value.dim() != 2:
        fail(ValueError, op, argument, f"{value.dim()} dimensions", "2")


def check_count(op: str, argument: str, count: int) -> None:
    """Raise unless rows can be numbered in int32."""
    if count >= 2**31:
        fail(ValueError, op, argument, f"{count} choices", "less than 2^31")


def topk(indices: Tensor) -> int:
    """Return k, how many experts a token names."""
    return indices.shape[1] if indices.dim() == 2 else 1


def _facts(tokens: Tensor, *_: Any) -> Facts:
    return Facts(tokens.device.type, tokens.dtype)


def _fake(tokens: Tensor, indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    permuted = tokens.new_empty((rows, tokens.shape[1]))
    return permuted, indices.new_empty(indices.numel(), dtype=torch.int32)


def _backward_fake(dpermuted: Tensor, sorted_indices: Tensor, tokens: int, k: int) -> Tensor:
    return dpermuted.new_empty((tokens, dpermuted.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, indices, _, ctx.backend = inputs
    ctx.tokens, ctx.topk = tokens.shape[0], topk(indices)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _grad(ctx: Any, dpermuted: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (sorted_indices,) = ctx.saved_tensors
    dtokens = PERMUTE_OPERATOR.backward(
        dpermuted, sorted_indices, ctx.tokens, ctx.topk, ctx.backend
    )
    return dtokens, None, None, None


def _unpermute_facts(permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None) -> Facts:
    options = (("probs", None if probs is None else probs.dtype),)
    return Facts(permuted.device.type, permuted.dtype, options)


def _unpermute_backward_facts(
    dout: Tensor, permuted: Tensor | None, sorted_indices: Tensor, probs: Tensor | None, rows: int
) -> Facts:
    return _unpermute_facts(dout, sorted_indices, probs)


def _unpermute_fake(permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None) -> Tensor:
    tokens = sorted_indices.shape[0] if probs is None else probs.shape[0]
    return permuted.new_empty((tokens, permuted.shape[1]))


def _unpermute_backward_fake(
    dout: Tensor, permuted: Tensor | None, sorted_indices: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    dprobs = dout.new_empty(0) if permuted is None or probs is None else torch.empty_like(probs)
    return dout.new_empty((rows, dout.shape[1])), dprobs.contiguous()


def _unpermute_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    permuted, sorted_indices, probs, ctx.backend = inputs
    ctx.rows = permuted.shape[0]
    kept = permuted if probs is not None and ctx.needs_input_grad[2] else None
    ctx.save_for_backward(kept, sorted_indices, probs)


def _unpermute_grad(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    permuted, sorted_indices, probs = ctx.saved_tensors
    dpermuted, dprobs = UNPERMUTE_OPERATOR.backward(
        dout, permuted, sorted_indices, probs, ctx.rows, ctx.backend
    )
    return dpermuted, None, None if permuted is None else dprobs, None


PERMUTE_OPERATOR = define_op(
    OpDef(
        name=PERMUTE,
        family=str(__package__),
        prepare=prepare,
        schema="(Tensor tokens, Tensor indices, SymInt rows) -> (Tensor, Tensor)",
        backward_schema="(Tensor dpermuted, Tensor sorted_indices, SymInt tokens, SymInt k)"
        " -> Tensor",
        facts=_facts,
        backward_facts=_facts,
        fake=_fake,
        backward_fake=_backward_fake,
        save=_save,
        grad=_grad,
        flops=None,
    )
)
UNPERMUTE_OPERATOR = define_op(
    OpDef(
        name=UNPERMUTE,
        family=str(__package__),
        prepare=prepare_unpermute,
        schema="(Tensor permuted, Tensor sorted_indices, Tensor? probs) -> Tensor",
        backward_schema="(Tensor dout, Tensor? permuted, Tensor sorted_indices, Tensor? probs,"
        " SymInt rows) -> (Tensor, Tensor)",
        facts=_unpermute_facts,
        backward_facts=_unpermute_backward_facts,
        fake=_unpermute_fake,
        backward_fake=_unpermute_backward_fake,
        save=_unpermute_save,
        grad=_unpermute_grad,
        flops=None,
    )
)
