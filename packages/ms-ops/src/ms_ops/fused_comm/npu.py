"""Products with communication by torch_npu's kernels that overlap the two.

They take fp16 and bf16, groups of 2, 4 or 8 ranks, and inner dimensions from 256 to 65534. A
smaller inner dimension of a summed product is filled up with zeros, so that all ranks run the same
kernel also where theirs differ; what is larger must be so on all ranks. The kernels that gather or
scatter take no bias; where the one that sums over all ranks takes one, it would add each rank's.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import npu
from ..device import LOW_PRECISION, upcast
from ..matmul import npu as groups
from ..norm import npu as norm
from ..registry import Backend, Facts, Kernel
from . import portable
from .add_norm import in_place
from .collectives import start_gather, start_scatter, sum_ranks, there
from .groups import group_of

RANKS = (2, 4, 8)
INNER = range(256, 65535)

_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def note_name(group: Any, name: str) -> None:
    """Say what the kernels call a group, instead of asking its HCCL backend."""
    _names[group] = name


def forget_name(group: Any) -> None:
    """Take back what `note_name` said."""
    del _names[group]


def hccl_name(group: Any, device: torch.device) -> str:
    """Return the name of a group's communicator, which its HCCL backend knows by global rank."""
    if group not in _names:
        backend = group._get_backend(device)
        _names[group] = backend.get_hccl_comm_name(torch.distributed.get_rank())
    return _names[group]


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
    sides = (gather, gather_size, reduce, reduce_size, scatter)
    columns = b.shape[0 if transposed else 1]
    if not _serves(a.shape[0], a.shape[1], columns):
        return portable.product(a, b, bias, transposed, keep, *sides)
    matrix, kept = b.t() if transposed else b, a.new_empty(0)
    if gather:
        y, kept = _gathered(a, matrix, gather, gather_size, keep)
        y = start_scatter(y, reduce, reduce_size)() if scatter else y
    elif scatter:
        y = _scattered(a, matrix, reduce, reduce_size)
    else:
        y = _summed(a, matrix, reduce)
    return portable.add_bias(y, bias), kept if gather else portable.kept_rows(a, keep, False)


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
    """Return (da, db, dbias); the gradient's product runs the dual kernel of the forward's."""
    sides = (gather, gather_size, reduce, reduce_size, scatter)
    inner = dy.shape[1]
    columns = 0 if b is None else b.shape[1 if transposed else 0]
    if b is None or not _serves(dy.shape[0], inner, columns):
        return portable.product_backward(dy, dkept, a, b, transposed, kept, with_bias, *sides)
    matrix, grad = b if transposed else b.t(), dy
    rows = None if a is None else start_gather(a, "" if kept else gather, gather_size)
    if scatter and reduce:
        da, grad = _gathered(dy, matrix, reduce, reduce_size, True)
        pending = start_scatter(da if dkept is None else da + dkept, gather, gather_size)
    elif gather and dkept is None:
        pending = there(_scattered(dy, matrix, gather, gather_size))
    else:
        da = dy @ matrix
        pending = start_scatter(da if dkept is None else da + dkept, gather, gather_size)
    db = dy.new_empty(0)
    if rows is not None:
        db = portable.weight_gradient(rows(), grad, transposed)
    return pending(), db, portable.column_sums(grad, with_bias)


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
    """Return (y, normed, rstd). The sum is normalised in fp32; it travels in x's dtype."""
    matrix = weight.t() if transposed else weight
    if not _serves(x.shape[0], x.shape[1], matrix.shape[1]):
        return portable.add_norm(x, weight, residual, gamma, bias, eps, transposed, group, size)
    total = upcast(_summed(x, matrix, group))
    total = total if bias is None else total + bias
    normed, rstd, y = npu.op("npu_add_rms_norm")(
        total, upcast(residual).contiguous(), upcast(gamma).contiguous(), epsilon=eps
    )
    return y.to(x.dtype), normed.to(x.dtype), rstd


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
    wide, dgamma = norm.backward(upcast(dnormed), upcast(y), upcast(gamma), rstd, 0.0, "fp32")
    wide = wide + dy
    dtotal = wide.to(y.dtype)
    dx, dweight = portable.linear_backward(dtotal, x, weight, transposed)
    dbias = portable.column_sums(wide, with_bias)
    return dx, dweight, dtotal, dgamma.to(gamma.dtype), dbias


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
    return portable.add_group_bias(y, offsets, bias)


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
    return dx, dweight, portable.group_sums(dy, offsets, with_bias)


def _gathered(
    a: Tensor, matrix: Tensor, group: str, size: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return ([a_0; a_1; ...] matrix, the rows or nothing); a has one shape on all ranks."""
    if a.shape[1] not in INNER:
        rows = start_gather(a, group, size)()
        return rows @ matrix, rows if keep else a.new_empty(0)
    name = hccl_name(group_of(group), a.device)
    y, rows = npu.op("npu_all_gather_base_mm")(
        a.contiguous(), _operand(matrix), name, size, gather_index=0, gather_output=keep
    )
    return y, rows


def _scattered(rows: Tensor, matrix: Tensor, group: str, size: int) -> Tensor:
    """Return the own rows of the sum of the products."""
    rows, matrix = _filled(rows, matrix)
    name = hccl_name(group_of(group), rows.device)
    y: Tensor = npu.op("npu_mm_reduce_scatter_base")(rows, matrix, name, size, reduce_op="sum")
    return y


def _summed(rows: Tensor, matrix: Tensor, group: str) -> Tensor:
    """Return the sum of the products."""
    rows, matrix = _filled(rows, matrix)
    name = hccl_name(group_of(group), rows.device)
    y: Tensor = npu.op("npu_mm_all_reduce_base")(rows, matrix, name, reduce_op="sum")
    return y


def _filled(rows: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with an inner dimension that the kernels take."""
    lacking = INNER.start - rows.shape[1]
    if lacking > 0:
        return F.pad(rows, (0, lacking)), F.pad(matrix, (0, 0, 0, lacking))
    return rows.contiguous(), _operand(matrix)


def _operand(matrix: Tensor) -> Tensor:
    """Return a second factor as the kernels take it: contiguous or a transposed view."""
    plain = matrix.is_contiguous() or matrix.t().is_contiguous()
    return matrix if plain else matrix.contiguous()


def _serves(rows: int, inner: int, columns: int) -> bool:
    return 0 not in (rows, columns) and inner < INNER.stop


def _supports(facts: Facts) -> str | None:
    sizes = [facts.option(name) for name in ("gather_size", "reduce_size")]
    present = [size for size in sizes if size not in (None, 0, 1)]
    if not present and 0 not in sizes:  # 0: a backward that sends nothing
        return "a group of one rank: nothing is sent"
    if any(size not in RANKS for size in present):
        return f"torch_npu's kernels serve 2, 4 or 8 ranks, not {present}"
    return npu.declines(facts, LOW_PRECISION)


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {
        "matmul_all_reduce": Kernel(product, product_backward, _supports),
        "all_gather_matmul": Kernel(product, product_backward, _supports),
        "matmul_reduce_scatter": Kernel(product, product_backward, _supports),
        "all_gather_matmul_reduce_scatter": Kernel(product, product_backward, _supports),
        "matmul_all_reduce_add_rms_norm": Kernel(add_norm, add_norm_backward, _supports),
        "matmul_all_reduce_add_rms_norm_": Kernel(partial(in_place, add_norm), supports=_supports),
        "grouped_matmul_all_reduce": Kernel(grouped, grouped_backward, npu.declines),
    },
    npu.available,
)
