"""Products of experts with the exchange of their rows, over expert (ep) and tensor (tp) ranks.

alltoall_allgather_bmm      y = act(rows W + bias), rows = this rank's experts' rows from all ranks
bmm_reducescatter_alltoall  y = the rows of sum over tp of x W, + bias, where they came from

Each runs the other's collectives in backward. `shard` says what tp splits outside of the experts:
"hidden" the columns, "capacity" the rows, which inside lie in the order (ep, tp, row).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checks import check_choice, check_float, check_same_dtype, check_tensor, fail
from ..device import autocast_dtype, common_device, compute_dtype
from .activations import ACTIVATIONS
from .expert_ops import define_combine, define_dispatch
from .groups import check_different, named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DISPATCH = "alltoall_allgather_bmm"
COMBINE = "bmm_reducescatter_alltoall"
SHARDS = ("hidden", "capacity")


def alltoall_allgather_bmm(
    x: Tensor,
    weight: Tensor,
    ep_group: ProcessGroup,
    tp_group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    shard: str = "hidden",
    activation: str = "none",
    return_gathered: bool = False,
    return_product: bool = False,
    save_gathered: bool = True,
) -> Any:
    """Send rows to their experts, gather what tp splits, multiply and activate.

    Args:
        x: [E, C, H / tp] or, with shard "capacity", [E, C / tp, H]: C rows for each of all E
            experts; fp16, bf16, fp32 or fp64, any strides, of one shape on all ranks.
        weight: [E / ep, H, M] in x's dtype, the own experts' part of the columns.
        ep_group: the ranks that share the experts, in their order.
        tp_group: the ranks that share the columns or rows, in their order.
        bias: [E / ep, M] in x's dtype, or fp32 with fp16 and bf16 x.
        shard: "hidden" or "capacity".
        activation: "none", "gelu", "silu", "relu" or "fastgelu" (z sigmoid(1.702 z)).
        return_gathered: return the gathered rows [E / ep, ep * C, H] too.
        return_product: return what is activated, [E / ep, ep * C, M], too.
        save_gathered: backward keeps the gathered rows; else it sends them again, unless they were
            returned.

    Returns:
        Tensor [E / ep, ep * C, M] of x's dtype, contiguous, or a tuple of it and what was asked
        for, gathered rows first. Gradients flow back from all of them.

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match, experts that the ranks cannot share evenly, unknown
            shard or activation, one group for both.
        RuntimeError: tensors on different devices.
    """
    args = prepare_dispatch(
        x,
        weight,
        ep_group,
        tp_group,
        bias=bias,
        shard=shard,
        activation=activation,
        return_gathered=return_gathered,
        return_product=return_product,
        save_gathered=save_gathered,
    )
    y, gathered, product = DISPATCH_OPERATOR(*args)
    product = y if activation == "none" else product
    asked = ((return_gathered, gathered), (return_product, product))
    more = tuple(tensor for wanted, tensor in asked if wanted)
    return (y, *more) if more else y


def bmm_reducescatter_alltoall(
    x: Tensor,
    weight: Tensor,
    ep_group: ProcessGroup,
    tp_group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    shard: str = "hidden",
) -> Tensor:
    """Multiply, sum over tp and scatter, add the bias, and send the rows back.

    Args:
        x: [E / ep, ep * C, M], fp16, bf16, fp32 or fp64, any strides; M, the own part of the inner
            dimension, may differ between the ranks of tp.
        weight: [E / ep, M, H] in x's dtype.
        ep_group: the ranks that share the experts, in their order.
        tp_group: the ranks that share the inner dimension, in the order of the parts they get.
        bias: in x's dtype, or fp32 with fp16 and bf16 x, added once, after the sum: [E / ep,
            H / tp], or with shard "capacity" [E / ep, H], the same on all ranks of tp, whose
            gradient is then complete on each.
        shard: "hidden" or "capacity".

    Returns:
        Tensor [E, C, H / tp], or [E, C / tp, H], of x's dtype, contiguous.

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match, rows or columns that the ranks cannot share evenly,
            unknown shard, one group for both.
        RuntimeError: tensors on different devices.
    """
    y: Tensor = COMBINE_OPERATOR(
        *prepare_combine(x, weight, ep_group, tp_group, bias=bias, shard=shard)
    )
    return y


def prepare_dispatch(
    x: Tensor,
    weight: Tensor,
    ep_group: ProcessGroup,
    tp_group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    shard: str = "hidden",
    activation: str = "none",
    return_gathered: bool = False,
    return_product: bool = False,
    save_gathered: bool = True,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = DISPATCH
    check_choice(op, "activation", activation, ACTIVATIONS)
    x, weight, groups = _prepare(op, x, weight, ep_group, tp_group, shard)
    _, ep_size, _, tp_size = groups
    if x.shape[0] != weight.shape[0] * ep_size:
        need = f"{weight.shape[0]} experts of weight times {ep_size} ranks of ep_group"
        fail(ValueError, op, "x", f"{x.shape[0]} experts", need)
    hidden = x.shape[2] * (tp_size if shard == "hidden" else 1)
    if weight.shape[1] != hidden:
        fail(ValueError, op, "weight", tuple(weight.shape), f"{hidden} in dimension 1")
    _check_bias(op, bias, x, (weight.shape[0], weight.shape[2]))
    common_device(op, x, weight, bias)
    keep = bool(return_gathered or save_gathered)
    return x, weight, bias, shard == "capacity", activation, keep, *groups


def prepare_combine(
    x: Tensor,
    weight: Tensor,
    ep_group: ProcessGroup,
    tp_group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    shard: str = "hidden",
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = COMBINE
    x, weight, groups = _prepare(op, x, weight, ep_group, tp_group, shard)
    _, ep_size, _, tp_size = groups
    by_rows = shard == "capacity"
    if x.shape[0] != weight.shape[0] or x.shape[2] != weight.shape[1]:
        need = f"{x.shape[0]} experts and {x.shape[2]} rows, those of x"
        fail(ValueError, op, "weight", tuple(weight.shape), need)
    ranks = ep_size * (tp_size if by_rows else 1)
    if x.shape[1] % ranks:
        fail(ValueError, op, "x", f"{x.shape[1]} rows", f"a multiple of the {ranks} ranks")
    hidden = weight.shape[2]
    if not by_rows and hidden % tp_size:
        fail(ValueError, op, "weight", f"{hidden} columns", f"a multiple of {tp_size} ranks")
    _check_bias(op, bias, x, (x.shape[0], hidden if by_rows else hidden // tp_size))
    common_device(op, x, weight, bias)
    return x, weight, bias, by_rows, *groups


def _prepare(
    op: str,
    x: Tensor,
    weight: Tensor,
    ep_group: ProcessGroup,
    tp_group: ProcessGroup,
    shard: str,
) -> tuple[Tensor, Tensor, tuple[str, int, str, int]]:
    check_choice(op, "shard", shard, SHARDS)
    for name, tensor in (("x", x), ("weight", weight)):
        check_tensor(op, name, tensor)
        check_float(op, name, tensor)
        if tensor.dim() != 3:
            fail(ValueError, op, name, f"{tensor.dim()} dimensions", "3")
    cast = autocast_dtype(x.device.type)
    if cast is not None:
        x, weight = x.to(cast), weight.to(cast)
    check_same_dtype(op, "weight", weight, "x", x)
    ep, tp = named(op, "ep_group", ep_group), named(op, "tp_group", tp_group)
    check_different(op, "ep_group", ep[0], "tp_group", tp[0])
    return x, weight, (*ep, *tp)


def _check_bias(op: str, bias: Tensor | None, x: Tensor, shape: tuple[int, int]) -> None:
    if bias is None:
        return
    check_tensor(op, "bias", bias)
    check_float(op, "bias", bias, tuple(dict.fromkeys((x.dtype, compute_dtype(x.dtype)))))
    if tuple(bias.shape) != shape:
        fail(ValueError, op, "bias", tuple(bias.shape), f"{shape}")


DISPATCH_OPERATOR = define_dispatch(DISPATCH, prepare_dispatch)
COMBINE_OPERATOR = define_combine(COMBINE, prepare_combine)
