"""torch_npu's feed-forward layer as documented: fp32 inside, 16 bits between the products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .require import need, need_contiguous, need_dtypes

OP = "npu_ffn"
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "fastgelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    "relu": F.relu,
    "silu": F.silu,
}
GATED = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu"}


def ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    expert_tokens: Sequence[int] | None = None,
    expert_tokens_index: Sequence[int] | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    inner_precise: int | None = None,
    **given: Any,
) -> Tensor:
    """Return act(x W1 + b1) W2 + b2, whole or expert by expert."""
    _check(x, weight1, weight2, (bias1, bias2), given)
    need(OP, expert_tokens is None or expert_tokens_index is None, "one list of tokens")
    experts = weight1.dim() == 3
    ends = expert_tokens_index if expert_tokens is None else list(accumulate(expert_tokens))
    need(OP, (ends is not None) == experts, "a list beside experts")
    half = x.dtype is torch.float16
    need(OP, (inner_precise or 0) in (0, half), "inner_precise 0, or 1 in fp16")
    gated = activation in GATED
    need(OP, gated or activation in PLAIN, f"a known activation: {activation}")
    need(OP, not gated or (half and not experts and inner_precise == 1), "gated: fp16, whole")
    y = x.new_empty((*x.shape[:-1], weight2.shape[-1]))
    if y.device.type == "cpu":
        rows = x.reshape(-1, x.shape[-1])
        numbers = [rows.shape[0]] if ends is None else list(ends)
        need(OP, numbers[-1] == rows.shape[0] and len(numbers) <= 256, "ends of all tokens")
        out, layers = y.view(rows.shape[0], -1), _layers(weight1, weight2, bias1, bias2)
        for (a, b), layer in zip(pairwise([0, *numbers]), layers, strict=True):
            out[a:b] = _layer(rows[a:b], layer, activation)
    return y


def _layers(*tensors: Tensor | None) -> list[tuple[Any, ...]]:
    """Return (weight1, weight2, bias1, bias2) of each expert."""
    weight1 = tensors[0]
    assert weight1 is not None
    if weight1.dim() == 2:
        return [tensors]
    return [tuple(None if t is None else t[e] for t in tensors) for e in range(weight1.shape[0])]


def _layer(rows: Tensor, layer: tuple[Any, ...], activation: str) -> Tensor:
    w1, w2, b1, b2 = layer
    hidden = rows.float() @ w1.float()
    hidden = hidden if b1 is None else hidden + b1.float()
    if activation in GATED:
        gate, up = hidden.chunk(2, -1)
        hidden = PLAIN[GATED[activation]](gate) * up
    else:
        hidden = PLAIN[activation](hidden)
    out = hidden.to(rows.dtype).float() @ w2.float()
    y: Tensor = out if b2 is None else out + b2.float()
    return y.to(rows.dtype)


def _check(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    biases: tuple[Tensor | None, ...],
    given: dict[str, Any],
) -> None:
    need(OP, all(v is None for v in given.values()), "no quantisation")
    need_dtypes(OP, x, weight1, weight2)
    need(OP, x.dtype is not torch.float32, "fp16 or bf16")
    need_contiguous(OP, x, weight1, weight2)
    need(OP, 0 not in (x.numel(), weight1.numel(), weight2.numel()), "tensors that are not empty")
    wanted = torch.float16 if x.dtype is torch.float16 else torch.float32
    need(OP, all(b is None or b.dtype is wanted for b in biases), f"bias {wanted}")
    need(OP, 2 <= x.dim() <= 8 and weight1.dim() == weight2.dim(), "2 to 8 dimensions")


KERNELS = {"npu::npu_ffn": ffn}
