"""Products and collectives for any device and any backend of torch.distributed.

What backward sends for one gradient travels while the other is computed: the gathering of the rows
beside the gradient's product, the scattering of a gradient beside the other's.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..device import compute_dtype, upcast
from ..matmul import portable as groups
from ..matmul.grouped import sum_groups
from ..norm import portable as norm
from ..registry import Backend, Kernel
from .activations import activate, activate_backward
from .add_norm import in_place
from .collectives import Pending, exchange, start_gather, start_scatter, sum_ranks
from .layout import gathered_rows, scattered_rows


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    transposed: bool,
    keep: bool,
    gather: str,
    gather_size: int,
    reduce: str,
    reduce_size: int,
    scatter: bool,
) -> tuple[Tensor, Tensor]:
    """Return (y, gathered rows, empty unless they are to be kept)."""
    rows = start_gather(a, gather, gather_size)()
    matrix = b.t() if transposed else b
    if not reduce and bias is not None and bias.dtype == a.dtype:
        y = torch.addmm(bias, rows, matrix)
    else:
        y = add_bias(_reduced(rows @ matrix, reduce, reduce_size, scatter), bias)
    return y, kept_rows(rows, keep, bool(gather))


def product_backward(
    dy: Tensor,
    dkept: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    transposed: bool,
    kept: bool,
    with_bias: bool,
    gather: str,
    gather_size: int,
    reduce: str,
    reduce_size: int,
    scatter: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (da, db, dbias), empty where not wanted; dbias in the compute dtype."""
    db = dy.new_empty(0)
    rows = None if a is None else start_gather(a, "" if kept else gather, gather_size)
    grad = start_gather(dy, reduce, reduce_size)() if scatter else dy
    da: Pending = partial(dy.new_empty, 0)
    if b is not None:
        product = grad @ (b if transposed else b.t())
        product = product if dkept is None else product + dkept
        da = start_scatter(product, gather, gather_size)
    if rows is not None:
        db = weight_gradient(rows(), grad, transposed)
    return da(), db, column_sums(grad, with_bias)


def add_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    eps: float,
    transposed: bool,
    group: str,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, normed, rstd); y is rounded after the sum, normed computed from the unrounded."""
    total = sum_ranks(x @ (weight.t() if transposed else weight), group)
    wide = total.to(compute_dtype(x.dtype)) + residual
    if bias is not None:
        wide += bias
    normed, rstd = norm.forward(wide, gamma, eps, 0.0, "fp32")
    return wide.to(x.dtype), normed.to(x.dtype), rstd


def add_norm_backward(
    dy: Tensor,
    dnormed: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor,
    y: Tensor,
    rstd: Tensor,
    transposed: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dresidual, dgamma, dbias), empty where not wanted."""
    wide, dgamma = norm.backward(dnormed, upcast(y), gamma, rstd, 0.0, "fp32")
    wide += dy
    dtotal = wide.to(y.dtype)
    dx, dweight = linear_backward(dtotal, x, weight, transposed)
    return dx, dweight, dtotal, dgamma, column_sums(wide, with_bias)


def grouped(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    transposed: bool,
    group: str,
    size: int,
) -> Tensor:
    """Return the sum over the ranks of x_e W_e, and bias_e, for each group of rows."""
    y = sum_ranks(groups.forward(x, weight, offsets, None, transposed), group)
    return add_group_bias(y, offsets, bias)


def grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    transposed: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias), empty where not wanted."""
    dx, dweight = (dy.new_empty(0) for _ in range(2))
    if weight is not None:
        dx = groups.forward(dy, weight, offsets, None, not transposed)
    if x is not None:
        dweight = groups.backward(dy, x, offsets, transposed)
    return dx, dweight, group_sums(dy, offsets, with_bias)


def dispatch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    by_rows: bool,
    activation: str,
    keep: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (act(z), gathered rows, z = rows W + bias); the last two empty where not wanted."""
    rows = _gather_experts(x, by_rows, ep, ep_size, tp, tp_size)
    z = torch.bmm(rows, weight)
    if bias is not None:
        z = (z + bias.unsqueeze(1)).to(x.dtype)
    kept = kept_rows(rows, keep, bool(ep or tp))
    if activation == "none":
        return z, kept, x.new_empty(0)
    return activate(z, activation), kept, z


def dispatch_backward(
    dy: Tensor,
    dkept: Tensor | None,
    dz: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    by_rows: bool,
    activation: str,
    kept: bool,
    with_bias: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias), empty where not wanted."""
    grad = dy if activation == "none" else activate_backward(dy, z, activation)
    grad = grad if dz is None else grad + dz
    dx, dweight, dbias = (dy.new_empty(0) for _ in range(3))
    if weight is not None:
        product = torch.bmm(grad, weight.transpose(1, 2))
        product = product if dkept is None else product + dkept
        dx = _scatter_experts(product, None, by_rows, ep, ep_size, tp, tp_size)
    if x is not None:
        rows = x if kept else _gather_experts(x, by_rows, ep, ep_size, tp, tp_size)
        dweight = torch.bmm(rows.transpose(1, 2), grad)
    if with_bias:
        dbias = grad.sum(1, dtype=compute_dtype(dy.dtype))
    return dx, dweight, dbias.to(compute_dtype(dy.dtype))


def combine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    by_rows: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
) -> Tensor:
    """Return the sum over tp of x W, scattered, and bias, sent back to where the rows came from."""
    return _scatter_experts(torch.bmm(x, weight), bias, by_rows, ep, ep_size, tp, tp_size)


def combine_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    by_rows: bool,
    with_bias: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias), empty where not wanted."""
    wide = compute_dtype(dy.dtype)
    dx, dweight = (dy.new_empty(0) for _ in range(2))
    dbias = dy.new_empty(0, dtype=wide)
    own = exchange(dy, ep, ep_size)
    grad = gathered_rows(start_gather(own, tp, tp_size)(), by_rows, ep_size, tp_size)
    if weight is not None:
        dx = torch.bmm(grad, weight.transpose(1, 2))
    if x is not None:
        dweight = torch.bmm(x.transpose(1, 2), grad)
    if with_bias and by_rows:
        dbias = grad.sum(1, dtype=wide)
    elif with_bias:
        dbias = gathered_rows(own, by_rows, ep_size, 1).sum(1, dtype=wide)
    return dx, dweight, dbias


def _gather_experts(
    x: Tensor, by_rows: bool, ep: str, ep_size: int, tp: str, tp_size: int
) -> Tensor:
    """Return all rows of the own experts, [E / ep, ep * C, H]."""
    blocks = start_gather(exchange(x, ep, ep_size), tp, tp_size)()
    return gathered_rows(blocks, by_rows, ep_size, tp_size)


def _scatter_experts(
    z: Tensor, bias: Tensor | None, by_rows: bool, ep: str, ep_size: int, tp: str, tp_size: int
) -> Tensor:
    """Return the inverse: sums over tp go to the ranks that the rows came from."""
    blocks = scattered_rows(z, by_rows, ep_size, tp_size)
    own = start_scatter(blocks, tp, tp_size)()
    if bias is not None:
        experts = own.unflatten(0, (ep_size, own.shape[0] // ep_size)) + bias.unsqueeze(1)
        own = experts.view(own.shape).to(z.dtype)
    return exchange(own, ep, ep_size)


def _reduced(y: Tensor, group: str, size: int, scatter: bool) -> Tensor:
    return start_scatter(y, group, size)() if scatter else sum_ranks(y, group)


def kept_rows(rows: Tensor, keep: bool, sent: bool) -> Tensor:
    """Return gathered rows as an output: empty unless kept, and never the input itself.

    Rows that nobody sent are the input.
    """
    if not keep:
        return rows.new_empty(0)
    return rows if sent and rows.numel() else rows.clone()


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y + bias in y's dtype."""
    return y if bias is None else (y + bias).to(y.dtype)


def add_group_bias(y: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Return y with each row's group's bias."""
    if bias is None:
        return y
    places = torch.arange(y.shape[0], device=y.device, dtype=offsets.dtype)
    group = torch.searchsorted(offsets.to(y.device), places, right=True)
    return (y + bias[group]).to(y.dtype)


def group_sums(dy: Tensor, offsets: Tensor, wanted: bool) -> Tensor:
    """Return the sum over each group's rows in the compute dtype."""
    if wanted:
        return sum_groups(dy, offsets)
    return dy.new_empty(0, dtype=compute_dtype(dy.dtype))


def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight) of a product, empty where the other factor is not given."""
    dx, dweight = (dy.new_empty(0) for _ in range(2))
    if weight is not None:
        dx = dy @ (weight if transposed else weight.t())
    if x is not None:
        dweight = weight_gradient(x, dy, transposed)
    return dx, dweight


def weight_gradient(rows: Tensor, dy: Tensor, transposed: bool) -> Tensor:
    """Return rows^T dy, or its transpose where the weight is transposed."""
    return dy.t() @ rows if transposed else rows.t() @ dy


def column_sums(dy: Tensor, wanted: bool) -> Tensor:
    """Return the sum over the rows in the compute dtype."""
    wide = compute_dtype(dy.dtype)
    return dy.sum(0, dtype=wide) if wanted else dy.new_empty(0, dtype=wide)


BACKEND = Backend(
    "portable",
    90,
    {
        "matmul_all_reduce": Kernel(product, product_backward),
        "all_gather_matmul": Kernel(product, product_backward),
        "matmul_reduce_scatter": Kernel(product, product_backward),
        "all_gather_matmul_reduce_scatter": Kernel(product, product_backward),
        "matmul_all_reduce_add_rms_norm": Kernel(add_norm, add_norm_backward),
        "matmul_all_reduce_add_rms_norm_": Kernel(partial(in_place, add_norm)),
        "grouped_matmul_all_reduce": Kernel(grouped, grouped_backward),
        "alltoall_allgather_bmm": Kernel(dispatch, dispatch_backward),
        "bmm_reducescatter_alltoall": Kernel(combine, combine_backward),
    },
)
