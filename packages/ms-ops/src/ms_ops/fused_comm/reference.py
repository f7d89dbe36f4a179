"""The formulas written out: every rank gathers what all ranks hold, in the compute dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed._functional_collectives
from torch import Tensor

from ..device import compute_dtype
from ..matmul import reference as groups
from ..norm import reference as norm
from ..registry import Backend, Kernel
from .activations import activate, activate_backward
from .add_norm import in_place
from .groups import group_of


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
    rows = _everyone(a, gather, gather_size).flatten(0, 1)
    y = _everyone(rows @ _matrix(b, transposed), reduce, reduce_size).sum(0)
    y = _own(y, reduce, reduce_size) if scatter else y
    y = y if bias is None else y + bias
    return y.to(a.dtype), (rows if keep else rows.new_empty(0)).to(a.dtype, copy=True)


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
    sides = (reduce, reduce_size) if scatter else ("", 1)
    grad = _everyone(dy, *sides).flatten(0, 1)
    da, db = (grad.new_empty(0) for _ in range(2))
    if b is not None:
        da = grad @ _matrix(b, transposed).t()
        da = da if dkept is None else da + dkept
        da = _own(_everyone(da, gather, gather_size).sum(0), gather, gather_size)
    if a is not None:
        rows = _everyone(a, *(("", 1) if kept else (gather, gather_size))).flatten(0, 1)
        db = _turned(rows.t() @ grad, transposed)
    dbias = grad.sum(0) if with_bias else grad.new_empty(0)
    return da.to(dy.dtype).contiguous(), db.to(dy.dtype), dbias


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
    """Return (y, normed, rstd)."""
    wide = _everyone(_wide(x) @ _matrix(weight, transposed), group, size).sum(0) + residual
    wide = wide if bias is None else wide + bias
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
    dnorm, dgamma = norm.backward(_wide(dnormed), _wide(y), gamma, rstd, 0.0, "fp32")
    grad = dnorm + dy
    dx, dweight = (grad.new_empty(0) for _ in range(2))
    if weight is not None:
        dx = grad @ _matrix(weight, transposed).t()
    if x is not None:
        dweight = _turned(_wide(x).t() @ grad, transposed)
    dbias = grad.sum(0) if with_bias else grad.new_empty(0)
    return dx.to(y.dtype), dweight.to(y.dtype), grad.to(y.dtype), dgamma, dbias


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
    parts = groups.forward(_wide(x), _wide(weight), offsets, None, transposed)
    y = _everyone(parts, group, size).sum(0)
    if bias is not None:
        rows = zip(groups.parts(y, offsets), bias, strict=True)
        y = torch.cat([y[:0], *(part + row for part, row in rows)])
    return y.to(x.dtype)


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
    dbias = _wide(dy.new_empty(0))
    if weight is not None:
        dx = groups.forward(dy, weight, offsets, None, not transposed)
    if x is not None:
        dweight = groups.backward(dy, x, offsets, transposed)
    if with_bias:
        sums = [part.sum(0) for part in groups.parts(_wide(dy), offsets)]
        dbias = torch.stack(sums) if sums else _wide(dy[:0])
    return dx, dweight, dbias


def dispatch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    by_rows: bool,
    activation: str,
    keep: bool,
    *sides: str | int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (act(z), gathered rows, z = rows W + bias); the last two empty where not wanted."""
    rows = _gather_experts(x, by_rows, sides)
    z = rows @ _wide(weight)
    z = z if bias is None else z + bias.unsqueeze(1)
    kept = (rows if keep else rows.new_empty(0)).to(x.dtype, copy=True)
    if activation == "none":
        return z.to(x.dtype), kept, x.new_empty(0)
    return activate(z, activation).to(x.dtype), kept, z.to(x.dtype)


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
    *sides: str | int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias), empty where not wanted."""
    grad = _wide(dy)
    grad = grad if activation == "none" else activate_backward(grad, _wide(z), activation)
    grad = grad if dz is None else grad + dz
    dx, dweight = (grad.new_empty(0) for _ in range(2))
    if weight is not None:
        rows = grad @ _wide(weight).transpose(1, 2)
        dx = _scatter_experts(rows if dkept is None else rows + dkept, None, by_rows, sides)
    if x is not None:
        rows = _wide(x) if kept else _gather_experts(x, by_rows, sides)
        dweight = rows.transpose(1, 2) @ grad
    dbias = grad.sum(1) if with_bias else grad.new_empty(0)
    return dx.to(dy.dtype), dweight.to(dy.dtype), dbias


def combine(
    x: Tensor, weight: Tensor, bias: Tensor | None, by_rows: bool, *sides: str | int
) -> Tensor:
    """Return the sum over tp of x W, scattered, and bias, sent back to where the rows came from."""
    return _scatter_experts(_wide(x) @ _wide(weight), bias, by_rows, sides).to(x.dtype)


def combine_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    by_rows: bool,
    with_bias: bool,
    *sides: str | int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias), empty where not wanted."""
    grad = _gather_experts(dy, by_rows, sides)
    dx, dweight, dbias = (grad.new_empty(0) for _ in range(3))
    if weight is not None:
        dx = grad @ _wide(weight).transpose(1, 2)
    if x is not None:
        dweight = _wide(x).transpose(1, 2) @ grad
    if with_bias:
        _, _, tp, tp_size = sides
        dbias = grad.sum(1)
        if not by_rows:
            dbias = _own(dbias.t(), str(tp), int(tp_size)).t()
    return dx.to(dy.dtype), dweight.to(dy.dtype), dbias.contiguous()


def _gather_experts(x: Tensor, by_rows: bool, sides: Sequence[str | int]) -> Tensor:
    ep, ep_size, tp, tp_size = sides
    mine = _everyone(x, str(ep), int(ep_size)).transpose(0, 1)
    mine = _own(mine, str(ep), int(ep_size)).transpose(0, 1)
    parts = _everyone(mine.contiguous(), str(tp), int(tp_size)).unbind(0)
    whole = torch.cat(parts, dim=2 if by_rows else 3)
    return whole.transpose(0, 1).flatten(1, 2).contiguous()


def _scatter_experts(
    z: Tensor, bias: Tensor | None, by_rows: bool, sides: Sequence[str | int]
) -> Tensor:
    ep, ep_size, tp, tp_size = sides
    ep, ep_size, tp, tp_size = str(ep), int(ep_size), str(tp), int(tp_size)
    total = _everyone(z, tp, tp_size).sum(0)
    rows = total.view(total.shape[0], ep_size, total.shape[1] // ep_size, total.shape[2])
    axis = 2 if by_rows else 3
    rows = _own(rows.transpose(0, axis), tp, tp_size).transpose(0, axis)
    rows = rows if bias is None else rows + bias[:, None, None]
    sent = _everyone(rows.contiguous(), ep, ep_size).transpose(0, 2)
    back = _own(sent, ep, ep_size)[0].transpose(0, 1)
    return back.flatten(0, 1).contiguous()


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _matrix(b: Tensor, transposed: bool) -> Tensor:
    return _wide(b.t() if transposed else b)


def _turned(matrix: Tensor, transposed: bool) -> Tensor:
    return (matrix.t() if transposed else matrix).contiguous()


def _everyone(x: Tensor, group: str, size: int) -> Tensor:
    """Return [size, ...], what each rank holds, in the compute dtype."""
    wide = _wide(x).contiguous()
    if not group or not wide.numel():
        return wide.expand(size, *wide.shape)
    ops = torch.ops._c10d_functional
    flat = ops.wait_tensor(ops.all_gather_into_tensor(wide.flatten(), size, group))
    stacked: Tensor = flat.view(size, *wide.shape)
    return stacked


def _own(x: Tensor, group: str, size: int) -> Tensor:
    """Return this rank's part of the first dimension."""
    rank = group_of(group).rank() if group else 0
    part = x.shape[0] // size
    return x[rank * part : (rank + 1) * part]


BACKEND = Backend(
    "reference",
    100,
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
