"""Matrix products whose rows come from, or whose sums go to, the ranks of a group.

matmul_all_reduce                  y = sum over ranks of a_r b_r                  + bias
all_gather_matmul                  y = [a_0; a_1; ...] b                          + bias
matmul_reduce_scatter              y = own rows of the sum over ranks of a_r b_r  + bias
all_gather_matmul_reduce_scatter   y = own rows of the sum of [a_0; a_1; ...] b   + bias

Backward runs the dual collective: with g = dy, gathered where y was scattered, and A = a, gathered
where it was, da = g b^T (summed and scattered where a was gathered), db = A^T g, dbias = sum over
the rows of g. An argument or result that all ranks of a group hold alike has one gradient, which
all of them get or give in full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checks import check_float, check_same_dtype, check_tensor, fail
from ..device import autocast_dtype, common_device, compute_dtype
from .groups import check_different, named
from .product_ops import Ways, define_product

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NO_GROUP = ("", 1)


def matmul_all_reduce(
    a: Tensor,
    b: Tensor,
    group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    transpose_b: bool = False,
) -> Tensor:
    """Multiply and sum over the ranks of a group: y = sum of a_r b_r + bias on every rank.

    Args:
        a: [..., k], fp16, bf16, fp32 or fp64, any strides; k may differ from rank to rank.
        b: [k, n] in a's dtype; a transposed view serves as well.
        group: the ranks that hold parts of k.
        bias: [n] in a's dtype, or fp32 with fp16 and bf16 a; the same on all ranks, added once.
        transpose_b: b is [n, k].

    Returns:
        Tensor [..., n] of a's dtype, contiguous, the same on all ranks. The partial sums travel in
        a's dtype. Backward takes that one gradient on every rank and sends nothing.

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match.
        RuntimeError: tensors on different devices.
    """
    args = prepare_matmul_all_reduce(a, b, group, bias=bias, transpose_b=transpose_b)
    return _shaped(MATMUL_ALL_REDUCE(*args)[0], a, 1, 1)


def all_gather_matmul(
    a: Tensor,
    b: Tensor,
    group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    transpose_b: bool = False,
    return_gathered: bool = False,
    save_gathered: bool = False,
) -> Any:
    """Gather rows from the ranks of a group and multiply: y = [a_0; a_1; ...] b + bias.

    Args:
        a: [m, ..., k], fp16, bf16, fp32 or fp64, any strides, of one shape on all ranks.
        b: [k, n] in a's dtype, the own part of the columns; n may differ from rank to rank.
        group: the ranks that hold the rows, in their order.
        bias: [n] in a's dtype, or fp32 with fp16 and bf16 a.
        transpose_b: b is [n, k].
        return_gathered: return the gathered rows too; gradients flow back from them as well.
        save_gathered: backward keeps the gathered rows; else it gathers a again, unless they were
            returned, while the gradient is multiplied.

    Returns:
        Tensor [size * m, ..., n] of a's dtype, contiguous, or (y, gathered) with gathered
        [size * m, ..., k]. The gradient of a is summed over the ranks and scattered.

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match.
        RuntimeError: tensors on different devices.
    """
    args = prepare_all_gather_matmul(
        a,
        b,
        group,
        bias=bias,
        transpose_b=transpose_b,
        return_gathered=return_gathered,
        save_gathered=save_gathered,
    )
    y, gathered = ALL_GATHER_MATMUL(*args)
    times = group.size()
    y = _shaped(y, a, times, 1)
    return (y, _shaped(gathered, a, times, 1)) if return_gathered else y


def matmul_reduce_scatter(
    a: Tensor,
    b: Tensor,
    group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    transpose_b: bool = False,
) -> Tensor:
    """Multiply, sum over the ranks of a group and keep the own rows of the sum.

    Args:
        a: [m, ..., k], fp16, bf16, fp32 or fp64, any strides; k may differ from rank to rank, m is
            a multiple of the group's size.
        b: [k, n] in a's dtype; a transposed view serves as well.
        group: the ranks that hold parts of k, in the order of the rows that they get.
        bias: [n] in a's dtype, or fp32 with fp16 and bf16 a; the same on all ranks, added once. Its
            gradient is complete on every rank: the sum over the rows of all of them.
        transpose_b: b is [n, k].

    Returns:
        Tensor [m / size, ..., n] of a's dtype, contiguous. The partial sums travel in a's dtype;
        backward gathers the gradient.

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match, rows that the ranks cannot share evenly.
        RuntimeError: tensors on different devices.
    """
    args = prepare_matmul_reduce_scatter(a, b, group, bias=bias, transpose_b=transpose_b)
    return _shaped(MATMUL_REDUCE_SCATTER(*args)[0], a, 1, group.size())


def all_gather_matmul_reduce_scatter(
    a: Tensor,
    b: Tensor,
    gather_group: ProcessGroup,
    scatter_group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    transpose_b: bool = False,
    return_gathered: bool = False,
    save_gathered: bool = False,
) -> Any:
    """Gather rows over one group, multiply, sum and scatter the rows over another.

    Args:
        a: [m, ..., k], fp16, bf16, fp32 or fp64, any strides, of one shape on all ranks of both
            groups; the gathered rows are a multiple of scatter_group's size.
        b: [k, n] in a's dtype.
        gather_group: the ranks that hold the rows, in their order.
        scatter_group: the ranks that hold parts of k, in the order of the rows that they get.
        bias: [n] as in `matmul_reduce_scatter`, the same on all ranks of scatter_group.
        transpose_b: b is [n, k].
        return_gathered: as in `all_gather_matmul`.
        save_gathered: as in `all_gather_matmul`.

    Returns:
        Tensor [gather size * m / scatter size, ..., n] of a's dtype, contiguous, or (y, gathered).

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match, rows that the ranks cannot share evenly, one group
            for both.
        RuntimeError: tensors on different devices.
    """
    args = prepare_all_gather_matmul_reduce_scatter(
        a,
        b,
        gather_group,
        scatter_group,
        bias=bias,
        transpose_b=transpose_b,
        return_gathered=return_gathered,
        save_gathered=save_gathered,
    )
    y, gathered = ALL_GATHER_MATMUL_REDUCE_SCATTER(*args)
    times = gather_group.size()
    y = _shaped(y, a, times, scatter_group.size())
    return (y, _shaped(gathered, a, times, 1)) if return_gathered else y


def _shaped(flat: Tensor, a: Tensor, times: int, parts: int) -> Tensor:
    """Return rows with the leading dimensions of `a`, of which the first is larger or smaller."""
    return flat.view(a.shape[0] * times // parts, *a.shape[1:-1], flat.shape[1])


def prepare_matmul_all_reduce(
    a: Tensor,
    b: Tensor,
    group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    transpose_b: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "matmul_all_reduce"
    ways = Ways(*NO_GROUP, *named(op, "group", group), scatter=False)
    return _prepare(op, a, b, bias, transpose_b, False, ways)


def prepare_all_gather_matmul(
    a: Tensor,
    b: Tensor,
    group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    transpose_b: bool = False,
    return_gathered: bool = False,
    save_gathered: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "all_gather_matmul"
    ways = Ways(*named(op, "group", group), *NO_GROUP, scatter=False)
    return _prepare(op, a, b, bias, transpose_b, return_gathered or save_gathered, ways)


def prepare_matmul_reduce_scatter(
    a: Tensor,
    b: Tensor,
    group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    transpose_b: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "matmul_reduce_scatter"
    ways = Ways(*NO_GROUP, *named(op, "group", group), scatter=True)
    return _prepare(op, a, b, bias, transpose_b, False, ways)


def prepare_all_gather_matmul_reduce_scatter(
    a: Tensor,
    b: Tensor,
    gather_group: ProcessGroup,
    scatter_group: ProcessGroup,
    *,
    bias: Tensor | None = None,
    transpose_b: bool = False,
    return_gathered: bool = False,
    save_gathered: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "all_gather_matmul_reduce_scatter"
    gather = named(op, "gather_group", gather_group)
    scatter = named(op, "scatter_group", scatter_group)
    check_different(op, "gather_group", gather[0], "scatter_group", scatter[0])
    ways = Ways(*gather, *scatter, scatter=True)
    return _prepare(op, a, b, bias, transpose_b, return_gathered or save_gathered, ways)


def _prepare(
    op: str, a: Tensor, b: Tensor, bias: Tensor | None, transposed: bool, keep: bool, ways: Ways
) -> tuple[Any, ...]:
    a, b = check_operands(op, ("a", a), ("b", b), transposed)
    columns = b.shape[0 if transposed else 1]
    check_bias(op, bias, a, columns)
    common_device(op, a, b, bias)
    rows = a.shape[0] * ways.gather_size
    if ways.scatter and rows % ways.reduce_size:
        fail(ValueError, op, "a", f"{rows} rows", f"a multiple of the {ways.reduce_size} ranks")
    flat = a.reshape(-1, a.shape[-1])
    return flat, b, bias, bool(transposed), bool(keep), *ways


def check_operands(
    op: str, first: tuple[str, Tensor], second: tuple[str, Tensor], transposed: bool
) -> tuple[Tensor, Tensor]:
    """Check rows [..., k] and a matrix [k, n] ([n, k] if transposed), cast them under autocast."""
    (left, a), (right, b) = first, second
    for name, tensor in (first, second):
        check_tensor(op, name, tensor)
        check_float(op, name, tensor)
    if a.dim() < 2:
        fail(ValueError, op, left, f"{a.dim()} dimensions", "2 or more")
    if b.dim() != 2:
        fail(ValueError, op, right, f"{b.dim()} dimensions", "2")
    cast = autocast_dtype(a.device.type)
    if cast is not None:
        a, b = a.to(cast), b.to(cast)
    check_same_dtype(op, right, b, left, a)
    inner = 1 if transposed else 0
    if b.shape[inner] != a.shape[-1]:
        need = f"{a.shape[-1]} in dimension {inner}, the columns of {left}"
        fail(ValueError, op, right, tuple(b.shape), need)
    return a, b


def check_bias(op: str, bias: Tensor | None, like: Tensor, columns: int) -> None:
    """Raise unless a bias is [columns] in the dtype of `like` or in its compute dtype."""
    if bias is None:
        return
    check_tensor(op, "bias", bias)
    allowed = tuple(dict.fromkeys((like.dtype, compute_dtype(like.dtype))))
    check_float(op, "bias", bias, allowed)
    if tuple(bias.shape) != (columns,):
        fail(ValueError, op, "bias", tuple(bias.shape), f"({columns},), the columns of the result")


MATMUL_ALL_REDUCE = define_product("matmul_all_reduce", prepare_matmul_all_reduce)
ALL_GATHER_MATMUL = define_product("all_gather_matmul", prepare_all_gather_matmul)
MATMUL_REDUCE_SCATTER = define_product("matmul_reduce_scatter", prepare_matmul_reduce_scatter)
ALL_GATHER_MATMUL_REDUCE_SCATTER = define_product(
    "all_gather_matmul_reduce_scatter", prepare_all_gather_matmul_reduce_scatter
)
