"""Permutation of tokens by expert, from a routing map: which token goes to which expert.

rows of expert e = tokens t with map[t, e], in their order; experts follow each other
permuted_probs[r] = probs[token of r, expert of r]
sorted_indices = rows in the order of their tokens; within a token in that of the experts
out[t] = sum over the rows r of t of probs[t, expert of r] * permuted[r]
drop_and_pad: every expert has C = num_out_tokens / E rows: the first C tokens of its column, those
that go to it before those that do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, check_tensor, fail
from ..device import common_device
from ..opdef import OpDef, define_op
from ..registry import Facts
from .index_form import check_count, check_rows
from .plan import is_plain

PERMUTE = "moe_permute_map"
UNPERMUTE = "moe_unpermute_map"


def moe_permute_map(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    *,
    drop_and_pad: bool = False,
    uniform: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Repeat each token for every expert it goes to, in the order of the experts.

    Args:
        tokens: [T, H], fp16, bf16, fp32 or fp64, any strides.
        routing_map: [T, E] bool.
        probs: [T, E], any floating dtype: weights to be permuted with the tokens.
        num_out_tokens: how many rows there are: the number of True entries of the map. None counts
            them, which waits for a device. With `drop_and_pad` E times the capacity, not None.
        drop_and_pad: every expert has the same number of rows, its capacity, at most T: tokens
            beyond it are dropped, missing ones are filled with tokens that do not go there.
        uniform: every token goes to the same number of experts, as it does when none is dropped.
            Ascend's kernels serve such maps only; the caller's word, checked on the host alone.

    Returns:
        permuted: [rows, H].
        permuted_probs: [rows] in probs's dtype; None without probs.
        sorted_indices: [rows] int32, what `moe_unpermute_map` takes.
        Backward saves sorted_indices and the map and sums in fp32 (fp64 for fp64), rounded once.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, a number of rows that is not that of the map (found
            on the host only), no capacity of 0 to T, `uniform` with `drop_and_pad` or a map that is
            not.
        RuntimeError: tensors on different devices.
    """
    args = prepare(
        tokens, routing_map, probs, num_out_tokens, drop_and_pad=drop_and_pad, uniform=uniform
    )
    permuted, permuted_probs, sorted_indices = PERMUTE_OPERATOR(*args)
    return permuted, None if probs is None else permuted_probs, sorted_indices


def moe_unpermute_map(
    permuted: Tensor,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    *,
    drop_and_pad: bool = False,
    uniform: bool = False,
) -> Tensor:
    """Sum the rows of each token, weighted by `probs`, in the tokens' order.

    Args:
        permuted: [rows, H], fp16, bf16, fp32 or fp64, any strides.
        sorted_indices: [rows], from `moe_permute_map`.
        routing_map: [T, E] bool, the one that the tokens were permuted by.
        probs: [T, E], any floating dtype; None for weight 1.
        drop_and_pad: as for `moe_permute_map`.
        uniform: as for `moe_permute_map`.

    Returns:
        Tensor [T, H] of permuted's dtype, products and sum in fp32 (fp64 for fp64), rounded once.
        Backward saves sorted_indices, the map, probs, and permuted if probs needs a gradient. The
        sum has one order: two runs are equal.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, `uniform` as for `moe_permute_map`.
        RuntimeError: tensors on different devices.
    """
    args = prepare_unpermute(
        permuted, sorted_indices, routing_map, probs, drop_and_pad=drop_and_pad, uniform=uniform
    )
    out: Tensor = UNPERMUTE_OPERATOR(*args)
    return out


def prepare(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    *,
    drop_and_pad: bool = False,
    uniform: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_rows(PERMUTE, "tokens", tokens)
    _check_map(PERMUTE, routing_map, probs)
    if routing_map.shape[0] != tokens.shape[0]:
        need = f"{tokens.shape[0]}, those of tokens"
        fail(ValueError, PERMUTE, "routing_map", f"{routing_map.shape[0]} rows", need)
    common_device(PERMUTE, tokens, routing_map, probs)
    _check_uniform(PERMUTE, routing_map, drop_and_pad, uniform)
    if drop_and_pad:
        _check_capacity(PERMUTE, routing_map, num_out_tokens)
    elif num_out_tokens is None:
        num_out_tokens = _count(routing_map)
    return tokens, routing_map, probs, num_out_tokens, bool(drop_and_pad), bool(uniform)


def prepare_unpermute(
    permuted: Tensor,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    *,
    drop_and_pad: bool = False,
    uniform: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_rows(UNPERMUTE, "permuted", permuted)
    check_tensor(UNPERMUTE, "sorted_indices", sorted_indices)
    if sorted_indices.dtype not in (torch.int32, torch.int64):
        fail(TypeError, UNPERMUTE, "sorted_indices", sorted_indices.dtype, "int32 or int64")
    if sorted_indices.shape != permuted.shape[:1]:
        need = f"({permuted.shape[0]},), the rows of permuted"
        fail(ValueError, UNPERMUTE, "sorted_indices", tuple(sorted_indices.shape), need)
    _check_map(UNPERMUTE, routing_map, probs)
    common_device(UNPERMUTE, permuted, sorted_indices, routing_map, probs)
    _check_uniform(UNPERMUTE, routing_map, drop_and_pad, uniform)
    if drop_and_pad:
        _check_capacity(UNPERMUTE, routing_map, permuted.shape[0])
    return permuted, sorted_indices, routing_map, probs, bool(drop_and_pad), bool(uniform)


def _check_map(op: str, routing_map: Tensor, probs: Tensor | None) -> None:
    check_tensor(op, "routing_map", routing_map)
    if routing_map.dtype is not torch.bool:
        fail(TypeError, op, "routing_map", routing_map.dtype, "torch.bool")
    if routing_map.dim() != 2:
        fail(ValueError, op, "routing_map", f"{routing_map.dim()} dimensions", "2")
    check_count(op, "routing_map", routing_map.numel())
    if probs is None:
        return
    check_tensor(op, "probs", probs)
    check_float(op, "probs", probs)
    if probs.shape != routing_map.shape:
        need = f"{tuple(routing_map.shape)}, that of routing_map"
        fail(ValueError, op, "probs", tuple(probs.shape), need)


def _check_capacity(op: str, routing_map: Tensor, rows: int | None) -> None:
    tokens, experts = routing_map.shape
    if rows is None or not experts or rows % experts or not 0 <= rows <= tokens * experts:
        need = f"{experts} experts times a capacity of 0 to {tokens}"
        fail(ValueError, op, "num_out_tokens" if op == PERMUTE else "permuted", rows, need)


def _check_uniform(op: str, routing_map: Tensor, drop_and_pad: bool, uniform: bool) -> None:
    if not uniform:
        return
    if drop_and_pad:
        fail(ValueError, op, "uniform", "True beside drop_and_pad", "one of them")
    if is_plain(routing_map) and routing_map.numel():
        sizes = routing_map.sum(1)
        if bool((sizes != sizes[0]).any()):
            got = f"True with tokens that go to {int(sizes.min())} to {int(sizes.max())} experts"
            fail(ValueError, op, "uniform", got, "False, or the same number for all")


def _count(routing_map: Tensor) -> int:
    if torch.compiler.is_compiling():
        fail(ValueError, PERMUTE, "num_out_tokens", None, "a number under torch.compile")
    return int(routing_map.count_nonzero())


def _facts(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    rows: int,
    drop_and_pad: bool,
    uniform: bool,
) -> Facts:
    options = (
        ("probs", None if probs is None else probs.dtype),
        ("drop_and_pad", drop_and_pad),
        ("uniform", uniform),
    )
    return Facts(tokens.device.type, tokens.dtype, options)


def _backward_facts(
    dpermuted: Tensor,
    dpermuted_probs: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    drop_and_pad: bool,
    uniform: bool,
) -> Facts:
    return _facts(dpermuted, routing_map, dpermuted_probs, 0, drop_and_pad, uniform)


def _fake(
    tokens: Tensor, routing_map: Tensor, probs: Tensor | None, rows: int, *_: bool
) -> tuple[Tensor, Tensor, Tensor]:
    permuted_probs = tokens.new_empty(0) if probs is None else probs.new_empty(rows)
    sorted_indices = tokens.new_empty(rows, dtype=torch.int32)
    return tokens.new_empty((rows, tokens.shape[1])), permuted_probs, sorted_indices


def _backward_fake(
    dpermuted: Tensor,
    dpermuted_probs: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    *_: bool,
) -> tuple[Tensor, Tensor]:
    dtokens = dpermuted.new_empty((routing_map.shape[0], dpermuted.shape[1]))
    if dpermuted_probs is None:
        return dtokens, dpermuted.new_empty(0)
    return dtokens, dpermuted_probs.new_empty(routing_map.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, routing_map, probs, _, *ctx.options = inputs
    ctx.has_probs = probs is not None
    ctx.mark_non_differentiable(*output[1 if probs is None else 2 :])
    ctx.save_for_backward(output[2], routing_map)


def _grad(
    ctx: Any, dpermuted: Tensor, dpermuted_probs: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    sorted_indices, routing_map = ctx.saved_tensors
    dtokens, dprobs = PERMUTE_OPERATOR.backward(
        dpermuted,
        dpermuted_probs if ctx.has_probs else None,
        sorted_indices,
        routing_map,
        *ctx.options,
    )
    return dtokens, None, dprobs if ctx.has_probs else None, None, None, None, None


def _unpermute_facts(
    permuted: Tensor,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    drop_and_pad: bool,
    uniform: bool,
) -> Facts:
    return _facts(permuted, routing_map, probs, 0, drop_and_pad, uniform)


def _unpermute_backward_facts(dout: Tensor, permuted: Tensor | None, *rest: Any) -> Facts:
    return _unpermute_facts(dout, *rest)


def _unpermute_fake(
    permuted: Tensor, sorted_indices: Tensor, routing_map: Tensor, *_: Any
) -> Tensor:
    return permuted.new_empty((routing_map.shape[0], permuted.shape[1]))


def _unpermute_backward_fake(
    dout: Tensor,
    permuted: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    *_: bool,
) -> tuple[Tensor, Tensor]:
    dpermuted = dout.new_empty((sorted_indices.shape[0], dout.shape[1]))
    if permuted is None or probs is None:
        return dpermuted, dout.new_empty(0)
    return dpermuted, probs.new_empty(probs.shape)


def _unpermute_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    permuted, sorted_indices, routing_map, probs, *ctx.options = inputs
    kept = permuted if probs is not None and ctx.needs_input_grad[3] else None
    ctx.save_for_backward(kept, sorted_indices, routing_map, probs)


def _unpermute_grad(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    permuted, sorted_indices, routing_map, probs = ctx.saved_tensors
    dpermuted, dprobs = UNPERMUTE_OPERATOR.backward(
        dout, permuted, sorted_indices, routing_map, probs, *ctx.options
    )
    return dpermuted, None, None, None if permuted is None else dprobs, None, None, None


PERMUTE_OPERATOR = define_op(
    OpDef(
        name=PERMUTE,
        family=str(__package__),
        prepare=prepare,
        schema="(Tensor tokens, Tensor routing_map, Tensor? probs, SymInt rows, bool drop_and_pad,"
        " bool uniform) -> (Tensor, Tensor, Tensor)",
        backward_schema="(Tensor dpermuted, Tensor? dpermuted_probs, Tensor sorted_indices,"
        " Tensor routing_map, bool drop_and_pad, bool uniform) -> (Tensor, Tensor)",
        facts=_facts,
        backward_facts=_backward_facts,
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
        schema="(Tensor permuted, Tensor sorted_indices, Tensor routing_map, Tensor? probs,"
        " bool drop_and_pad, bool uniform) -> Tensor",
        backward_schema="(Tensor dout, Tensor? permuted, Tensor sorted_indices, Tensor routing_map,"
        " Tensor? probs, bool drop_and_pad, bool uniform) -> (Tensor, Tensor)",
        facts=_unpermute_facts,
        backward_facts=_unpermute_backward_facts,
        fake=_unpermute_fake,
        backward_fake=_unpermute_backward_fake,
        save=_unpermute_save,
        grad=_unpermute_grad,
        flops=None,
    )
)
