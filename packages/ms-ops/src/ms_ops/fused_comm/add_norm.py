"""A row-parallel product, its residual sum and the norm that follows, in one operator.

y = sum over ranks of x_r W_r + bias + residual        normed = rms_norm(y, gamma)
dtotal = dy + backward of the norm of dnormed          dresidual = dtotal, dx = dtotal W^T,
dW = x^T dtotal, dbias = sum over the rows of dtotal: backward sends nothing
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_float, check_same_dtype, check_tensor, fail
from ..device import LOW_PRECISION, common_device, compute_dtype
from ..opdef import OpDef, define_op
from ..registry import Facts
from .groups import named
from .products import check_bias, check_operands

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "matmul_all_reduce_add_rms_norm"
IN_PLACE = f"{OP}_"
_ARGUMENTS = "Tensor gamma, Tensor? bias, float eps, bool transposed, str group, int size"


def matmul_all_reduce_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gamma: Tensor,
    group: ProcessGroup,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    transpose_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Multiply, sum over the ranks of a group, add the residual, and normalise.

    Args:
        x: [..., k], fp16, bf16, fp32 or fp64, any strides; k may differ from rank to rank.
        weight: [k, n] in x's dtype; a transposed view serves as well.
        residual: [..., n] in x's dtype, the same on all ranks.
        gamma: [n], the norm's weight, in x's dtype, or fp32 with fp16 and bf16 x.
        group: the ranks that hold parts of k.
        eps: added to the mean square.
        bias: [n] in x's dtype, or fp32 with fp16 and bf16 x; the same on all ranks, added once.
        transpose_weight: weight is [n, k].

    Returns:
        (y, normed), both [..., n] of x's dtype and the same on all ranks. Backward takes those
        gradients on every rank; it saves x, weight, gamma, y and one number a row.

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match, negative eps.
        RuntimeError: tensors on different devices.
    """
    args = prepare(
        x, weight, residual, gamma, group, eps=eps, bias=bias, transpose_weight=transpose_weight
    )
    y, normed, _ = OPERATOR(*args)
    return y.view(residual.shape), normed.view(residual.shape)


def matmul_all_reduce_add_rms_norm_(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gamma: Tensor,
    group: ProcessGroup,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    transpose_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Do the same with y written into `residual`, for inference.

    Args:
        x: as in `matmul_all_reduce_add_rms_norm`.
        weight: likewise.
        residual: likewise, contiguous, sharing no memory with x.
        gamma: likewise.
        group: likewise.
        eps: likewise.
        bias: likewise.
        transpose_weight: likewise.

    Returns:
        (residual, normed).

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match, a residual that is not contiguous or overlaps x, a
            tensor that requires a gradient.
        RuntimeError: tensors on different devices.
    """
    args = prepare_in_place(
        x, weight, residual, gamma, group, eps=eps, bias=bias, transpose_weight=transpose_weight
    )
    normed: Tensor = IN_PLACE_OPERATOR(*args)
    return residual, normed.view(residual.shape)


def prepare(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gamma: Tensor,
    group: ProcessGroup,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    transpose_weight: bool = False,
    op: str = OP,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    x, weight = check_operands(op, ("x", x), ("weight", weight), transpose_weight)
    columns = weight.shape[0 if transpose_weight else 1]
    for name, tensor in (("residual", residual), ("gamma", gamma)):
        check_tensor(op, name, tensor)
    check_same_dtype(op, "residual", residual, "x", x)
    if residual.shape != (*x.shape[:-1], columns):
        fail(ValueError, op, "residual", tuple(residual.shape), f"{(*x.shape[:-1], columns)}")
    check_float(
        op, "gamma", gamma, (x.dtype, torch.float32) if x.dtype in LOW_PRECISION else (x.dtype,)
    )
    if tuple(gamma.shape) != (columns,) or columns == 0:
        fail(ValueError, op, "gamma", tuple(gamma.shape), f"({columns},), not empty")
    check_bias(op, bias, x, columns)
    if eps < 0:
        fail(ValueError, op, "eps", eps, "0 or more")
    common_device(op, x, weight, residual, gamma, bias)
    flat = (x.reshape(-1, x.shape[-1]), weight, residual.reshape(-1, columns))
    return *flat, gamma, bias, float(eps), bool(transpose_weight), *named(op, "group", group)


def prepare_in_place(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Check also what writing into the residual needs."""
    prepared = prepare(*args, **kwargs, op=IN_PLACE)
    x, residual = prepared[0], args[2] if len(args) > 2 else kwargs["residual"]
    if not residual.is_contiguous():
        fail(
            ValueError, IN_PLACE, "residual", "a tensor that is not contiguous", "a contiguous one"
        )
    tensors = [a for a in prepared if isinstance(a, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        need = "none: use matmul_all_reduce_add_rms_norm for training"
        fail(ValueError, IN_PLACE, "residual", "tensors that require gradients", need)
    if _readable(x) and _readable(residual) and _overlap(x, residual):
        fail(ValueError, IN_PLACE, "residual", "memory that x uses too", "memory of its own")
    return prepared


def in_place(
    add_norm: Callable[..., tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    *rest: object,
) -> Tensor:
    """Run a backend's `add_norm`, write y into the residual and return normed."""
    y, normed, _ = add_norm(x, weight, residual, *rest)
    residual.copy_(y)
    return normed


def _readable(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and not tensor.is_meta
    return plain and not torch.compiler.is_compiling()


def _overlap(x: Tensor, residual: Tensor) -> bool:
    if x.untyped_storage().data_ptr() != residual.untyped_storage().data_ptr():
        return False
    (first, last), (start, end) = _span(x), _span(residual)
    return bool(first < end and start < last)


def _span(tensor: Tensor) -> tuple[Any, Any]:
    """Return the first and the last byte but one of a tensor's places in its storage."""
    start = tensor.storage_offset()
    if not tensor.numel():
        return start, start
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + sum((n - 1) * step for n, step in steps) + 1


def _facts(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    eps: float,
    transposed: bool,
    group: str,
    size: int,
) -> Facts:
    options = (
        ("reduce_size", size),
        ("gamma", gamma.dtype),
        ("bias", None if bias is None else bias.dtype),
        ("transposed", transposed),
    )
    return Facts(x.device.type, x.dtype, options)


def _backward_facts(
    dy: Tensor,
    dnormed: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor,
    y: Tensor,
    rstd: Tensor,
    transposed: bool,
    with_bias: bool,
) -> Facts:
    return _facts(dy, dy, y, gamma, None, 0.0, transposed, "", 0)


def _fake(x: Tensor, weight: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, normed = x.new_empty(residual.shape), x.new_empty(residual.shape)
    return y, normed, x.new_empty((x.shape[0], 1), dtype=compute_dtype(x.dtype))


def _in_place_fake(x: Tensor, weight: Tensor, residual: Tensor, *_: Any) -> Tensor:
    return x.new_empty(residual.shape)


def _backward_fake(
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
    rows, columns = y.shape
    dx = y.new_empty((0,) if weight is None else (rows, weight.shape[1 if transposed else 0]))
    dweight = y.new_empty((0,))
    if x is not None:
        dweight = y.new_empty((columns, x.shape[1]) if transposed else (x.shape[1], columns))
    dbias = y.new_empty((columns if with_bias else 0,), dtype=compute_dtype(y.dtype))
    return dx, dweight, y.new_empty(y.shape), gamma.new_empty(gamma.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, gamma, bias, _, ctx.transposed, _, _, ctx.backend = inputs
    y, _, rstd = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(rstd)
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, gamma, y, rstd)


def _grad(ctx: Any, dy: Tensor, dnormed: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, weight, gamma, y, rstd = ctx.saved_tensors
    with_bias = ctx.bias_dtype is not None
    dx, dweight, dresidual, dgamma, dbias = OPERATOR.backward(
        dy, dnormed, x, weight, gamma, y, rstd, ctx.transposed, with_bias, ctx.backend
    )
    return (
        None if weight is None else dx,
        None if x is None else dweight,
        dresidual,
        dgamma,
        dbias.to(ctx.bias_dtype) if with_bias else None,
        *(None,) * 5,
    )


def _flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(x.shape[0]) * int(weight.shape[0]) * int(weight.shape[1])


def _backward_flops(
    dy: Tensor,
    dnormed: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor,
    y: Tensor,
    rstd: Tensor,
    transposed: bool,
    *_: Any,
    **__: Any,
) -> int:
    inner = 0 if x is None else int(x.shape[1])
    inner += 0 if weight is None else int(weight.shape[1 if transposed else 0])
    return 2 * int(y.numel()) * inner


OPERATOR = define_op(
    OpDef(
        name=OP,
        family=str(__package__),
        prepare=prepare,
        schema=f"(Tensor x, Tensor weight, Tensor residual, {_ARGUMENTS})"
        " -> (Tensor, Tensor, Tensor)",
        backward_schema="(Tensor dy, Tensor dnormed, Tensor? x, Tensor? weight, Tensor gamma,"
        " Tensor y, Tensor rstd, bool transposed, bool with_bias)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        facts=_facts,
        backward_facts=_backward_facts,
        fake=_fake,
        backward_fake=_backward_fake,
        save=_save,
        grad=_grad,
        flops=_flops,
        backward_flops=_backward_flops,
    )
)

IN_PLACE_OPERATOR = define_op(
    OpDef(
        name=IN_PLACE,
        family=str(__package__),
        prepare=prepare_in_place,
        schema=f"(Tensor x, Tensor weight, Tensor(a!) residual, {_ARGUMENTS}) -> Tensor",
        facts=_facts,
        fake=_in_place_fake,
        flops=_flops,
    )
)
