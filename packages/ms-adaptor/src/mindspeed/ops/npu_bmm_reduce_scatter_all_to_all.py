"""`npu_bmm_reducescatter_alltoall`: experts' products sent back to where their rows came from."""

from __future__ import annotations

from torch import Tensor

from ms_ops import comm
from ms_ops.checks import check_choice

from .npu_all_to_all_all_gather_bmm import SHARDS, flat_bias
from .process_groups import Group, check_size, resolved

OP = "npu_bmm_reducescatter_alltoall"


def npu_bmm_reducescatter_alltoall(
    x: Tensor,
    weight: Tensor,
    group_ep: Group,
    group_ep_worldsize: int,
    group_tp: Group,
    group_tp_worldsize: int,
    *,
    bias: Tensor | None = None,
    shard_type: int = 0,
) -> Tensor:
    """Return the rows, [E, C, H / tp] with shard_type 0 or [E, C / tp, H] with 1.

    See `ms_ops.comm.bmm_reducescatter_alltoall`.

    Args:
        x: [E / ep, ep * C, M].
        weight: [E / ep, M, H].
        group_ep: the ranks that share the experts: a process group, or the name of one.
        group_ep_worldsize: its size.
        group_tp: the ranks that share the inner dimension, likewise.
        group_tp_worldsize: its size.
        bias: added once, after the sum: [E / ep, H / tp] with shard_type 0, [E / ep, H] with 1; a
            dimension of 1 for the rows may stand between.
        shard_type: 0 or 1.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes, sizes or names that do not match.
    """
    check_choice(OP, "shard_type", shard_type, tuple(SHARDS))
    ep, tp = resolved(OP, "group_ep", group_ep), resolved(OP, "group_tp", group_tp)
    check_size(OP, "group_ep_worldsize", ep, group_ep_worldsize)
    check_size(OP, "group_tp_worldsize", tp, group_tp_worldsize)
    return comm.bmm_reducescatter_alltoall(
        x, weight, ep, tp, bias=flat_bias(bias), shard=SHARDS[shard_type]
    )
