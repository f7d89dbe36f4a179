"""Two linear layers around an activation, whole or one pair of layers for each expert.

y = act(x W1 + b1) W2 + b2, the activation rounded to x's dtype between the products
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import swiglu
from ..checks import check_choice, check_float, check_same_dtype, check_tensor, fail
from ..device import LOW_PRECISION, autocast_dtype, common_device, compute_dtype, upcast
from ..opdef import OpDef, define_op
from ..registry import Facts
from .grouped import Groups, grouped_matmul
from .groups import ends_of

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
    args = prepare(
        x,
        weight1,
        weight2,
        activation,
        offsets=offsets,
        group_sizes=group_sizes,
        bias1=bias1,
        bias2=bias2,
    )
    # What is differentiated, compiled or cast by autocast is the operators that it is made of.
    tensors = [t for t in args if isinstance(t, Tensor)]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if learns or torch.compiler.is_compiling() or autocast_dtype(x.device.type) is not None:
        return compose(*args)
    y: Tensor = OPERATOR(*args)
    return y


def prepare(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    offsets: Groups = None,
    group_sizes: Groups = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_choice(OP, "activation", activation, (*PLAIN, *GATED))
    _check(x, weight1, weight2, activation in GATED)
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        _check_bias(name, bias, x, (*weight.shape[:-2], weight.shape[-1]))
    if (offsets is None and group_sizes is None) != (weight1.dim() == 2):
        need = "offsets or group_sizes with weights of three dimensions, else neither"
        fail(ValueError, OP, "weight1", f"{weight1.dim()} dimensions", need)
    common_device(OP, x, weight1, weight2, bias1, bias2)
    ends = None
    if weight1.dim() == 3:
        rows = x.shape[:-1].numel()
        ends = ends_of(OP, rows, weight1.shape[0], offsets, group_sizes, x.device)
    return x, weight1, weight2, activation, ends, bias1, bias2


def compose(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    ends: Tensor | None,
    bias1: Tensor | None,
    bias2: Tensor | None,
) -> Tensor:
    """Return the layer as products and an activation of their own."""
    rows = x.reshape(-1, x.shape[-1])
    hidden = (PLAIN | GATED)[activation](_product(rows, weight1, bias1, ends))
    out = _product(hidden, weight2, bias2, ends)
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


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor | None) -> Tensor:
    if ends is not None:
        return grouped_matmul(rows, weight, ends, bias=bias)
    if bias is None or autocast_dtype(rows.device.type) is not None:
        return rows @ weight if bias is None else rows @ weight + bias
    if bias.dtype == rows.dtype or rows.dtype not in LOW_PRECISION:
        return torch.addmm(bias, rows, weight)
    return (rows @ weight + bias).to(rows.dtype)


def _facts(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    ends: Tensor | None,
    bias1: Tensor | None,
    bias2: Tensor | None,
) -> Facts:
    options = (
        ("activation", activation),
        ("groups_on", None if ends is None else ends.device.type),
        ("bias1", None if bias1 is None else bias1.dtype),
        ("bias2", None if bias2 is None else bias2.dtype),
    )
    return Facts(x.device.type, x.dtype, options)


def _fake(x: Tensor, weight1: Tensor, weight2: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight2.shape[-1]))


def _flops(x: Tensor, weight1: Tensor, weight2: Tensor, *_: Any, **__: Any) -> int:
    rows = int(x.shape[:-1].numel())
    products = (int(w.shape[-2]) * int(w.shape[-1]) for w in (weight1, weight2))
    return 2 * rows * sum(products)


OPERATOR = define_op(
    OpDef(
        name=OP,
        family=str(__package__),
        prepare=prepare,
        schema="(Tensor x, Tensor weight1, Tensor weight2, str activation, Tensor? ends,"
        " Tensor? bias1, Tensor? bias2) -> Tensor",
        facts=_facts,
        fake=_fake,
        flops=_flops,
        opaque=True,
    )
)
