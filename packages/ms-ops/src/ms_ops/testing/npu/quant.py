"""The kinds of torch_npu's grouped product as documented: which extras go with which dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .require import need, need_dtypes

OP = "npu_grouped_matmul"


@dataclass(frozen=True)
class Extra:
    """What a call does beyond the products.

    Attributes:
        output: dtype of the result.
        matrices: the weights as they are multiplied.
        bias: [E, N] added to the products, or None.
        scaled: joins the products of all groups into the result.
    """

    output: torch.dtype
    matrices: Callable[[Tensor], Tensor]
    bias: Tensor | None
    scaled: Callable[[list[Tensor]], Tensor]


def plain(x: Tensor, weight: Tensor, given: Mapping[str, Any]) -> Extra:
    """Floating point: a bias of fp16 beside fp16, else of fp32."""
    need_dtypes(OP, x, weight)
    need(OP, set(given) <= {"bias"}, "no quantisation")
    bias = _one(given, "bias")
    wanted = torch.float16 if x.dtype is torch.float16 else torch.float32
    need(OP, bias is None or bias.dtype is wanted, f"bias {wanted}")
    return Extra(x.dtype, Tensor.float, None if bias is None else bias.float(), torch.cat)


def low_bit_weights(x: Tensor, weight: Tensor, given: Mapping[str, Any]) -> Extra:
    """8-bit weights beside 16-bit rows: a scale and an offset for each column, both needed."""
    need(OP, x.dtype in (torch.float16, torch.bfloat16), "16-bit rows")
    need(OP, set(given) <= {"bias", "antiquant_scale", "antiquant_offset"}, "antiquant, bias only")
    scale, shift = _one(given, "antiquant_scale"), _one(given, "antiquant_offset")
    need(OP, scale is not None and shift is not None, "antiquant_scale and antiquant_offset")
    assert scale is not None
    assert shift is not None
    columns = (weight.shape[0], weight.shape[2])
    alike = all(t.dtype == x.dtype and t.shape == columns for t in (scale, shift))
    need(OP, alike, f"scale and offset {x.dtype} {columns}")
    bias = _one(given, "bias")
    wanted = torch.float16 if x.dtype is torch.float16 else torch.float32
    need(OP, bias is None or bias.dtype is wanted, f"bias {wanted}")

    def matrices(weight: Tensor) -> Tensor:
        wide = (weight.float() + shift.float().unsqueeze(1)) * scale.float().unsqueeze(1)
        return wide.to(x.dtype).float()

    return Extra(x.dtype, matrices, None if bias is None else bias.float(), torch.cat)


def integers(x: Tensor, weight: Tensor, given: Mapping[str, Any]) -> Extra:
    """8-bit rows and weights: int32 sums, scaled in fp32 per column and per row."""
    need(OP, weight.dtype is torch.int8, "8-bit weights")
    names = {"bias", "scale", "per_token_scale", "act_type", "output_dtype"}
    need(OP, set(given) <= names, f"{sorted(names)} only")
    scale, rows, bias = (_one(given, n) for n in ("scale", "per_token_scale", "bias"))
    need(OP, scale is not None and scale.shape == weight.shape[::2], "scale [E, N]")
    assert scale is not None
    # A dtype reaches the operator as its number.
    number = given.get("output_dtype")
    output, known = {torch.bfloat16: (torch.bfloat16, 15), torch.float32: (torch.float16, 5)}.get(
        scale.dtype, (torch.int8, 1)
    )
    need(OP, number in (output, known), "bf16 scale for bf16 results, fp32 for fp16")
    need(OP, bias is None or bias.dtype is torch.int32, "an int32 bias")
    act = given.get("act_type", 0)
    need(OP, act in ACTIVATIONS and (act == 0 or rows is not None), "act_type with scales per row")
    if rows is not None:
        need(OP, rows.dtype is torch.float32 and rows.shape == x.shape[:1], "fp32 scales per row")

    def scaled(parts: list[Tensor]) -> Tensor:
        wide = [p.float() * s.float() for p, s in zip(parts, scale, strict=True)]
        y = torch.cat(wide)
        y = y if rows is None else y * rows.unsqueeze(1)
        return ACTIVATIONS[act](y)

    return Extra(output, Tensor.int, bias, scaled)


def _one(given: Mapping[str, Any], name: str) -> Tensor | None:
    tensors = given.get(name)
    need(OP, tensors is None or len(tensors) == 1, f"one {name}")
    return None if tensors is None else tensors[0]


def _gelu(y: Tensor) -> Tensor:
    return torch.nn.functional.gelu(y, approximate="tanh")


ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    0: Tensor.float,
    1: torch.relu,
    2: _gelu,
    4: lambda y: y * torch.sigmoid(1.702 * y),
    5: torch.nn.functional.silu,
}
