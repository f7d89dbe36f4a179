"""FLOPs of one process's part of an attention, for whoever counts them (see `ms_ops.flops`)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ms_ops.flops import state_flops

from .cost import node_cells
from .digest import plan_of
from .plan import AttnPlan
from .topology import topology_of


def forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    rng: Tensor | None,
    sink: Tensor | None,
    plan: str,
    topology: str,
    *rest: Any,
    attention: str = "model",
    **_: Any,
) -> int:
    """FLOPs of a forward: pairs of tokens x 2 (D + Dv) x heads.

    Args:
        q: as the operator takes it, like all that follow.
        k: likewise.
        v: likewise.
        slopes: likewise.
        rng: likewise.
        sink: likewise.
        plan: likewise.
        topology: likewise.
        *rest: likewise.
        attention: "model" and "launched" count the pairs that this process computes, "full" its
            queries times all keys of their documents.
    """
    found, rank = plan_of(plan), topology_of(topology).rank
    return 2 * _pairs(found, rank, _rows(q), attention) * sum(found.head_dims)


def backward_flops(dout: Tensor, *rest: Any, attention: str = "model", **_: Any) -> int:
    """FLOPs of a backward: four products for the two of forward, "launched" the scores again.

    Args:
        dout: as the operator takes it, like all that follow.
        *rest: likewise.
        attention: as in `forward_flops`.
    """
    # After the gradient: four inputs, the state, three options, the plan, the groups.
    plan, topology = rest[8:10]
    found, rank = plan_of(plan), topology_of(topology).rank
    d, dv = found.head_dims
    factor = (3 if attention == "launched" else 2) * d + 2 * dv
    return 2 * _pairs(found, rank, _rows(dout), attention) * factor


def _rows(x: Tensor) -> int:
    """Tokens of all rows of the batch."""
    return x.shape[:-2].numel()


def _pairs(plan: AttnPlan, rank: int, rows: int, attention: str) -> int:
    """Number of pairs of a query and a key, of all heads and rows of the batch."""
    own = plan.layout.length(rank)
    batch = rows // own if own else 1
    if attention == "full":
        documents = plan.mask.documents or (0, plan.layout.total)
        held = _held(plan, rank, documents)
        pairs = sum(n * (b - a) for n, (a, b) in zip(held, pairwise(documents), strict=True))
        return pairs * batch * plan.heads.q_heads
    node, place = divmod(rank, plan.ulysses)
    first, last = plan.heads.q[place]
    return node_cells(plan.forward, node) * batch * (last - first)


def _held(plan: AttnPlan, rank: int, documents: Sequence[int]) -> list[int]:
    """Number of tokens that a rank holds of each document."""
    held = [0] * (len(documents) - 1)
    for _, start, stop in plan.layout.segments(rank):
        at = bisect_right(documents, start) - 1
        while start < stop:
            end = min(stop, documents[at + 1])
            held[at] += end - start
            start, at = end, at + 1
    return held


def state_context_flops() -> None:
    """Attach the formulas to the operators."""
    state_flops(torch.ops.ms_parallel.context_attention, forward_flops)
    state_flops(torch.ops.ms_parallel.context_attention_backward, backward_flops)
