"""`npu_alltoall_allgather_bmm`: rows sent to their experts and multiplied."""

from __future__ import annotations

from torch import Tensor

from ms_ops import comm
from ms_ops.checks import check_choice
from ms_ops.fused_comm.activations import ACTIVATIONS

from .process_groups import Group, check_size, resolved

OP = "npu_alltoall_allgather_bmm"
SHARDS = {0: "hidden", 1: "capacity"}


def npu_alltoall_allgather_bmm(
    x: Tensor,
    weight: Tensor,
    group_ep: Group,
    group_ep_worldsize: int,
    group_tp: Group,
    group_tp_worldsize: int,
    *,
    bias: Tensor | None = None,
    shard_type: int = 0,
    act_type: str = "None",
    need_allgather_out: bool = False,
    need_activation_feature: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (y, gathered rows or None, what is activated or None).

    See `ms_ops.comm.alltoall_allgather_bmm`; all results are differentiable.

    Args:
        x: [E, C, H / tp] with shard_type 0, [E, C / tp, H] with 1.
        weight: [E / ep, H, M].
        group_ep: the ranks that share the experts: a process group, or the name of one.
        group_ep_worldsize: its size.
        group_tp: the ranks that share columns or rows, likewise.
        group_tp_worldsize: its size.
        bias: [E / ep, M] or [E / ep, 1, M].
        shard_type: 0 or 1.
        act_type: None, GeLU, SiLU, ReLU or FastGeLU, in any case.
        need_allgather_out: return the gathered rows.
        need_activation_feature: return what is activated.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes, sizes or names that do not match.
    """
    check_choice(OP, "shard_type", shard_type, tuple(SHARDS))
    check_choice(OP, "act_type", str(act_type).lower(), ACTIVATIONS)
    ep, tp = resolved(OP, "group_ep", group_ep), resolved(OP, "group_tp", group_tp)
    check_size(OP, "group_ep_worldsize", ep, group_ep_worldsize)
    check_size(OP, "group_tp_worldsize", tp, group_tp_worldsize)
    found = comm.alltoall_allgather_bmm(
        x,
        weight,
        ep,
        tp,
        bias=flat_bias(bias),
        shard=SHARDS[shard_type],
        activation=str(act_type).lower(),
        return_gathered=need_allgather_out,
        return_product=need_activation_feature,
    )
    rest = list(found[1:]) if isinstance(found, tuple) else []
    gathered = rest.pop(0) if need_allgather_out else None
    product = rest.pop(0) if need_activation_feature else None
    return (found[0] if isinstance(found, tuple) else found), gathered, product


def flat_bias(bias: Tensor | None) -> Tensor | None:
    """Return a bias without the dimension of the rows."""
    return bias.squeeze(1) if bias is not None and bias.dim() == 3 else bias
