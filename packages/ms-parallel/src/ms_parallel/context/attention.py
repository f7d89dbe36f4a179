"""Attention over a sequence whose tokens lie at several processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from ms_ops.checks import check_choice, check_float, check_same_dtype, check_tensor, fail
from ms_ops.device import autocast_dtype

from .digest import check_plans, plan_key
from .operator import forward_op
from .plan import AttnPlan
from .topology import CPTopology

Layout = Literal["bshd", "sbhd", "thd"]
LAYOUTS = ("bshd", "sbhd", "thd")
OP = "context_attention"


@overload
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttnPlan,
    topology: CPTopology,
    *,
    scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    alibi_sqrt: bool = ...,
    dropout_p: float = ...,
    dropout_rng: Tensor | None = ...,
    head_start: int = ...,
    sink: Tensor | None = ...,
    layout: Layout = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttnPlan,
    topology: CPTopology,
    *,
    scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    alibi_sqrt: bool = ...,
    dropout_p: float = ...,
    dropout_rng: Tensor | None = ...,
    head_start: int = ...,
    sink: Tensor | None = ...,
    layout: Layout = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttnPlan,
    topology: CPTopology,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    head_start: int = 0,
    sink: Tensor | None = None,
    layout: Layout = "bshd",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over the whole sequence, of which this process holds a part.

    All processes of the plan call it with the same plan and options. Gradients come back to the
    processes that hold the tokens. Accumulators are fp32 (fp64 for fp64) and rounded once.

    Args:
        q: this process's queries in `layout`: [B, s, H, D], [s, B, H, D], or with B = 1
            [s, H, D]; s is `plan.layout.length(rank)`; fp16, bf16, fp32 or fp64, any strides.
        k: its keys, Hk heads; Hk divides H.
        v: its values, Hk heads of Dv channels.
        plan: from `plan_attention`.
        topology: the groups, with the plan's size and `ulysses`.
        scale: factor of q k^T, 1/sqrt(D) when None.
        alibi_slopes: fp32 [H], constant: subtract slope times the distance of the positions.
        alibi_sqrt: the square root of the distance.
        dropout_p: probability to drop a weight.
        dropout_rng: int64 [2], seed and offset, the same at all processes. Which weights are
            dropped depends on them and on positions and heads, not on the plan, so that a
            repeated forward, backward and any number of processes agree.
        head_start: number of the first head of q among those of all tensor-parallel ranks, for
            dropout.
        sink: [H], the score of a key without a value that every query also sees. Its gradient is
            this process's part, as that of any replicated weight.
        layout: "bshd", "sbhd" or "thd".
        return_lse: return the log-sum-exp of the scores too, which has a gradient. In nodes of
            several places that is one exchange more, and two channels more of the output's
            gradient in backward, used or not.

    Returns:
        out like q with Dv channels, contiguous. With `return_lse` (out, lse): lse fp32 (fp64 for
        fp64) [B, H, s] or [s, H]. Kept for backward: queries and output at the
        node, the log-sum-exp, and the keys and values that the plan says.

    Raises:
        TypeError: an argument that is no tensor, or dtypes that differ.
        ValueError: shapes that disagree with the plan, unknown options, dropout without its seed
            and offset, a plan for other groups.
    """
    _check_groups(plan, topology)
    cast = autocast_dtype(q.device.type)
    if cast is not None:
        q, k, v = (t.to(cast) for t in (q, k, v))
    if topology.check_plans:
        check_plans(plan, topology, q.device)
    check_inputs((q, k, v), plan, topology.rank, layout)
    _check_options(q, plan, alibi_slopes, sink, dropout_p, dropout_rng)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    out, lse, _ = forward_op(
        q, k, v, alibi_slopes, dropout_rng if dropout_p else None, sink,
        plan_key(plan), topology.key, factor, bool(alibi_sqrt), float(dropout_p), int(head_start),
        layout, bool(return_lse),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_groups(plan: AttnPlan, topology: CPTopology) -> None:
    got = (topology.size, topology.ulysses)
    need = (plan.layout.size, plan.ulysses)
    if got != need:
        text = f"{need[0]} ranks in nodes of {need[1]}, as the plan has"
        fail(ValueError, OP, "topology", f"{got[0]} ranks in nodes of {got[1]}", text)
    if topology.window not in (1, plan.window):
        fail(ValueError, OP, "topology", f"window {topology.window}", f"{plan.window}, the plan's")


def check_inputs(tensors: Sequence[Tensor], plan: AttnPlan, rank: int, layout: str) -> None:
    check_choice(OP, "layout", layout, LAYOUTS)
    heads = (plan.heads.q_heads, plan.heads.kv_heads, plan.heads.kv_heads)
    d, dv = plan.head_dims
    batch = None
    for name, x, h, channels in zip("qkv", tensors, heads, (d, d, dv), strict=True):
        check_tensor(OP, name, x)
        check_float(OP, name, x)
        check_same_dtype(OP, name, x, "q", tensors[0])
        sizes = list(x.shape)
        at = {"bshd": 0, "sbhd": 1, "thd": None}[layout]
        if at is not None and len(sizes) == 4:
            batch = sizes[at] if batch is None else batch
            sizes.pop(at)
            same = x.shape[at] == batch
        else:
            same = at is None
        need = [plan.layout.length(rank), h, channels]
        if not same or sizes != need:
            got = f"{tuple(x.shape)} at rank {rank}"
            text = f"{layout} with (tokens, heads, channels) {tuple(need)}, as the plan has"
            fail(ValueError, OP, name, got, text + (f", batch {batch}" if batch else ""))


def _check_options(
    q: Tensor,
    plan: AttnPlan,
    slopes: Tensor | None,
    sink: Tensor | None,
    p: float,
    rng: Tensor | None,
) -> None:
    for name, x in (("alibi_slopes", slopes), ("sink", sink)):
        if x is not None and tuple(x.shape) != (plan.heads.q_heads,):
            need = f"{(plan.heads.q_heads,)}, a number a head"
            fail(ValueError, OP, name, tuple(x.shape), need)
    if slopes is not None and slopes.requires_grad:
        fail(ValueError, OP, "alibi_slopes", "a tensor that requires grad", "a constant")
    if not 0.0 <= p <= 1.0:
        fail(ValueError, OP, "dropout_p", p, "a probability from 0 to 1")
    if p and rng is None:
        need = "int64 [2], seed and offset, the same at all processes"
        fail(ValueError, OP, "dropout_rng", "None with dropout", need)
    if p and rng is not None and (rng.dtype is not torch.int64 or tuple(rng.shape) != (2,)):
        fail(ValueError, OP, "dropout_rng", f"{rng.dtype} {tuple(rng.shape)}", "torch.int64 (2,)")


class ContextAttention(torch.nn.Module):
    """Attention as a module: the plan and the options that do not change.

    Args:
        plan: from `plan_attention`; another one may be given to a call.
        topology: the groups.
        scale: factor of q k^T, 1/sqrt(D) when None.
        alibi_slopes: fp32 [H], or None.
        alibi_sqrt: the square root of the distance.
        dropout_p: probability to drop a weight, in training.
        layout: "bshd", "sbhd" or "thd".
    """

    alibi_slopes: Tensor | None

    def __init__(
        self,
        plan: AttnPlan,
        topology: CPTopology,
        *,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
        alibi_sqrt: bool = False,
        dropout_p: float = 0.0,
        layout: Layout = "bshd",
    ) -> None:
        super().__init__()
        self.plan, self.topology = plan, topology
        self.scale, self.alibi_sqrt, self.dropout_p = scale, alibi_sqrt, dropout_p
        self.layout: Layout = layout
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttnPlan | None = None,
        dropout_rng: Tensor | None = None,
    ) -> Tensor:
        """Attend; shapes and the rest as in `context_attention`."""
        return context_attention(
            q,
            k,
            v,
            self.plan if plan is None else plan,
            self.topology,
            scale=self.scale,
            alibi_slopes=self.alibi_slopes,
            alibi_sqrt=self.alibi_sqrt,
            dropout_p=self.dropout_p if self.training else 0.0,
            dropout_rng=dropout_rng,
            layout=self.layout,
        )


__all__ = ["ContextAttention", "context_attention"]
