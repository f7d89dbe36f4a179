"""Grouped products of 8-bit integers, for inference.

y = act((x W[e] + bias[e]) * scale[e] * per_token_scale)       sums in integers, scaling in fp32
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_tensor, fail
from ..device import common_device
from ..opdef import OpDef, define_op
from ..registry import Facts
from .grouped import Groups
from .groups import ends_of

OP = "quant_grouped_matmul"
ACTIVATIONS = ("none", "relu", "gelu_tanh", "fast_gelu", "silu")
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


def quant_grouped_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Groups = None,
    *,
    output_dtype: torch.dtype,
    group_sizes: Groups = None,
    per_token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Multiply groups of 8-bit rows by 8-bit matrices and scale the integer sums.

    Args:
        x: [T, K] int8; rows of a group follow each other.
        weight: [E, K, N] int8.
        scale: [E, N], bf16, fp32 or fp64.
        offsets: [E], the row at which each group ends, as in `grouped_matmul`.
        output_dtype: fp16, bf16 or fp32.
        group_sizes: [E], rows of each group, in place of offsets.
        per_token_scale: [T], fp32 or fp64.
        bias: [E, N] int32, added to the integer sums.
        activation: "none", "relu", "gelu_tanh", "fast_gelu" or "silu", in fp32.

    Returns:
        Tensor [T, N], rounded once. Not differentiable.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, unknown activation, a list of groups that does not
            cover the rows.
        RuntimeError: tensors on different devices.
    """
    args = prepare(
        x,
        weight,
        scale,
        offsets,
        output_dtype=output_dtype,
        group_sizes=group_sizes,
        per_token_scale=per_token_scale,
        bias=bias,
        activation=activation,
    )
    y: Tensor = OPERATOR(*args)
    return y


def prepare(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Groups = None,
    *,
    output_dtype: torch.dtype,
    group_sizes: Groups = None,
    per_token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_integers(OP, "x", x, 2)
    check_integers(OP, "weight", weight, 3)
    if weight.shape[1] != x.shape[1]:
        fail(ValueError, OP, "weight", tuple(weight.shape), f"{x.shape[1]} rows, the columns of x")
    shape = (weight.shape[0], weight.shape[2])
    check_columns(OP, "scale", scale, shape, (torch.bfloat16, torch.float32, torch.float64))
    if bias is not None:
        check_columns(OP, "bias", bias, shape, (torch.int32,))
    if per_token_scale is not None:
        wide = (torch.float32, torch.float64)
        check_columns(OP, "per_token_scale", per_token_scale, x.shape[:1], wide)
    check_choice(OP, "activation", activation, ACTIVATIONS)
    check_choice(OP, "output_dtype", output_dtype, OUTPUTS)
    common_device(OP, x, weight, scale, per_token_scale, bias)
    ends = ends_of(OP, x.shape[0], weight.shape[0], offsets, group_sizes, x.device)
    return x, weight, scale, ends, per_token_scale, bias, activation, output_dtype


def check_integers(op: str, name: str, tensor: Tensor, dims: int) -> None:
    """Raise unless an argument is an int8 tensor of some dimensions."""
    check_tensor(op, name, tensor)
    if tensor.dtype is not torch.int8:
        fail(TypeError, op, name, tensor.dtype, "torch.int8")
    if tensor.dim() != dims:
        fail(ValueError, op, name, f"{tensor.dim()} dimensions", str(dims))


def check_columns(
    op: str, name: str, tensor: object, shape: Any, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise unless an argument is a tensor of a shape and one of some dtypes."""
    check_tensor(op, name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in dtypes:
        names = " or ".join(map(str, dtypes))
        fail(TypeError, op, name, tensor.dtype, names)
    if tuple(tensor.shape) != tuple(shape):
        fail(ValueError, op, name, tuple(tensor.shape), f"{tuple(shape)}")


def activate(y: Tensor, activation: str) -> Tensor:
    """Apply an activation by its name."""
    if activation == "relu":
        return y.relu()
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    if activation == "none":
        return y
    return y * torch.sigmoid(y * (1.702 if activation == "fast_gelu" else 1.0))


def _facts(x: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, *rest: Any) -> Facts:
    per_token = rest[0]
    options = (
        ("activation", rest[2]),
        ("output", rest[3]),
        ("groups_on", offsets.device.type),
        ("scale", scale.dtype),
        ("per_token_scale", None if per_token is None else per_token.dtype),
    )
    return Facts(x.device.type, x.dtype, options)


def _fake(x: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]), dtype=rest[3])


def _flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(x.shape[0]) * int(weight.shape[1]) * int(weight.shape[2])


OPERATOR = define_op(
    OpDef(
        name=OP,
        family=str(__package__),
        prepare=prepare,
        schema="(Tensor x, Tensor weight, Tensor scale, Tensor offsets, Tensor? per_token_scale,"
        " Tensor? bias, str activation, ScalarType output_dtype) -> Tensor",
        facts=_facts,
        fake=_fake,
        flops=_flops,
        opaque=True,
    )
)
