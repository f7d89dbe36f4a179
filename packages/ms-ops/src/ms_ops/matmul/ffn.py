"""Two linear layers around an activation, whole or one pair of layers for each expert.

y = act(x W1 + b1) W2 + b2, the activation rounded to x's dtype between the products
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import swiglu
from ..checks import check_choice, check_float, check_same_dtype, check_tensor, fail
from ..device import LOW_PRECISION, autocast_dtype, compute_dtype, upcast
from .grouped import Groups, grouped_matmul

OP = "ffn"


def fast_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x)."""
    wide = upcast(x)
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gated(x: Tensor) -> Tensor:
        first, second = upcast(x).chunk(2, -1)
        return (act(first) * second).to(x.dtype)

    return gated


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "fastgelu": fast_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": _gated(F.gelu),
    "reglu": _gated(F.relu),
    "swiglu": swiglu,
}


def ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    offsets: Groups = None,
    group_sizes: Groups = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """Run a feed-forward layer.

    Args:
        x: [..., K], fp16, bf16, fp32 or fp64; rows of an expert follow each other.
        weight1: [K, N], or [E, K, N] with groups.
        weight2: [M, K2], or [E, M, K2]; M is N, or N / 2 for a gated activation.
        activation: "gelu", "fastgelu", "relu", "silu", or gated "geglu", "reglu", "swiglu", whose
            first half is activated.
        offsets: [E], the row at which each expert ends.
        group_sizes: [E], rows of each expert, in place of offsets.
        bias1: [N] or [E, N] in x's dtype, or fp32 with fp16 and bf16 x.
        bias2: [K2] or [E, K2] likewise.

    Returns:
        Tensor [..., K2] of x's dtype; differentiable in all tensors.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: unknown activation, shapes that do not match, groups without experts.
        RuntimeError: tensors on different devices.
    """
    check_choice(OP, "activation", activation, (*PLAIN, *GATED))
    _check(x, weight1, weight2, activation in GATED)
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        _check_bias(name, bias, x, (*weight.shape[:-2], weight.shape[-1]))
    if (offsets is None and group_sizes is None) != (weight1.dim() == 2):
        need = "offsets or group_sizes with weights of three dimensions, else neither"
        fail(ValueError, OP, "weight1", f"{weight1.dim()} dimensions", need)
    rows = x.reshape(-1, x.shape[-1])
    groups = (offsets, group_sizes)
    hidden = _product(rows, weight1, bias1, groups)
    hidden = (PLAIN | GATED)[activation](hidden)
    out = _product(hidden, weight2, bias2, groups)
    return out.view(*x.shape[:-1], out.shape[-1])


def _check(x: Tensor, weight1: Tensor, weight2: Tensor, gated: bool) -> None:
    for name, tensor in (("x", x), ("weight1", weight1), ("weight2", weight2)):
        check_tensor(OP, name, tensor)
        check_float(OP, name, tensor)
        check_same_dtype(OP, name, tensor, "x", x)
    if x.dim() < 2:
        fail(ValueError, OP, "x", f"{x.dim()} dimensions", "2 or more")
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        if weight.dim() not in (2, 3) or weight.shape[:-2] != weight1.shape[:-2]:
            fail(ValueError, OP, name, tuple(weight.shape), "[rows, columns], or that of experts")
    width = weight1.shape[-1]
    if gated and width % 2:
        fail(ValueError, OP, "weight1", f"{width} columns", "an even number for a gated activation")
    for name, weight, rows in (
        ("weight1", weight1, x.shape[-1]),
        ("weight2", weight2, width // 2 if gated else width),
    ):
        if weight.shape[-2] != rows:
            fail(ValueError, OP, name, f"{weight.shape[-2]} rows", f"{rows}")


def _check_bias(name: str, bias: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    if bias is None:
        return
    check_tensor(OP, name, bias)
    check_float(OP, name, bias, tuple(dict.fromkeys((x.dtype, compute_dtype(x.dtype)))))
    if tuple(bias.shape) != shape:
        fail(ValueError, OP, name, tuple(bias.shape), f"{shape}")


def _product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, groups: tuple[Groups, Groups]
) -> Tensor:
    if weight.dim() == 3:
        ends, sizes = groups
        return grouped_matmul(rows, weight, ends, group_sizes=sizes, bias=bias)
    if bias is None or autocast_dtype(rows.device.type) is not None:
        return rows @ weight if bias is None else rows @ weight + bias
    if bias.dtype == rows.dtype or rows.dtype not in LOW_PRECISION:
        return torch.addmm(bias, rows, weight)
    return (rows @ weight + bias).to(rows.dtype)
