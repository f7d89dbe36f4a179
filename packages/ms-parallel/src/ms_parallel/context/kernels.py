"""One call of a step on ms_ops.attention.

Tensors have rows first, [n, B, h, D]. For packed sequences batch and heads are one dimension, so
that the rows of a batch are packed without a copy; a single sequence is a plain call in the layout
"sbhd", which knows its position for biases and dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ms_ops.attention import MaskSpec, attention, attention_backward, attention_merge
from ms_ops.device import upcast

from .calls import Call
from .heads import HeadPlan


@dataclass(frozen=True)
class Scoring:
    """How scores are formed, for the heads of one place.

    Attributes:
        scale: factor of q k^T.
        slopes: fp32 [h], ALiBi's slopes of this place's heads.
        root: ALiBi takes the square root of the distance.
        dropout_p: probability to drop a weight.
        rng: int64 [2], seed and offset.
        head_start: number of this place's first head among all heads.
        bounds: (left, right) of the mask's band.
        expand: int64, the key and value head of each group of query heads; None where groups
            are all alike and in order.
    """

    scale: float
    slopes: Tensor | None = None
    root: bool = False
    dropout_p: float = 0.0
    rng: Tensor | None = None
    head_start: int = 0
    bounds: tuple[int | None, int | None] = (None, None)
    expand: Tensor | None = None

    @property
    def by_position(self) -> bool:
        """Whether scores or dropout depend on the position."""
        return self.slopes is not None or self.dropout_p > 0


def expansion(heads: HeadPlan, place: int, device: torch.device) -> Tensor | None:
    """Return which key head serves which group of a place's query heads, None for the plain rule.

    A place may have some query heads of one group and others of the next. Its key heads are then
    repeated, for the kernel, up to groups of equal size.
    """
    (q0, q1), (k0, k1) = heads.q[place], heads.kv[place]
    group = heads.q_heads // heads.kv_heads
    served = [h // group - k0 for h in range(q0, q1)]
    n = q1 - q0
    for size in range(n, 0, -1):
        runs = [served[i : i + size] for i in range(0, n, size)]
        if n % size == 0 and all(len(set(run)) == 1 for run in runs):
            found = [run[0] for run in runs]
            plain = found == list(range(k1 - k0))
            return None if plain else torch.tensor(found, device=device)
    return None


def attend(call: Call, how: Scoring, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out [n, B, h, Dv], lse [n, B, h]) of a call."""
    q, k, v = _unrounded(q, k, v)
    k, v = (_expanded(t, how.expand) for t in (k, v))
    options = _options(call, how)
    if call.cu_q is None:
        out, lse = attention(q, k, v, return_lse=True, **options)
        return out, lse.permute(2, 0, 1)
    folded = (t.flatten(1, 2) for t in (q, k, v))
    out, lse = attention(*folded, return_lse=True, **options)
    return out.view(*q.shape[:-1], v.shape[-1]), lse.view(q.shape[:-1])


def attend_backward(
    call: Call, how: Scoring, tensors: tuple[Tensor, ...], lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of a call.

    Args:
        call: which.
        how: how its scores are formed.
        tensors: dout, q, k, v and out, rows first; `out` over all keys. What dout has beyond the
            channels of out is the gradient of lse, as `with_lse_gradient` writes it.
        lse: [n, B, h], over all keys.
    """
    dout, q, k, v, out = _unrounded(*tensors)
    kv_shapes = (k.shape, v.shape)
    more = (0, dout.shape[-1] - out.shape[-1])
    if any(more):  # Without it `pad` would copy.
        v, out = pad(v, more), pad(out, more, value=1.0)
    k, v = (_expanded(t, how.expand) for t in (k, v))
    options = _options(call, how)
    if call.cu_q is None:
        stats = lse.permute(1, 2, 0).contiguous()
        dq, dk, dv = attention_backward(dout, q, k, v, out, stats, **options)
    else:
        d, a, b, c, o = (t.flatten(1, 2) for t in (dout, q, k, v, out))
        dq, dk, dv = attention_backward(d, a, b, c, o, lse.flatten(1), **options)
    dq, dk, dv = dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)[..., : kv_shapes[1][-1]]
    pairs = zip((dk, dv), kv_shapes, strict=True)
    dk, dv = (_contracted(grad, shape, how.expand) for grad, shape in pairs)
    return dq, dk, dv


def with_lse_gradient(dout: Tensor, dlse: Tensor | None, layout: str) -> Tensor:
    """Return dout with two channels more, whose effect is the gradient of the log-sum-exp.

    ds = p * (dp - delta + dlse). A channel with value 0, output 1 and output gradient -dlse changes
    delta = sum(dout * out) by -dlse and nothing else; a second one carries what rounding to a low
    precision takes from the first. Both are there without a gradient too, so that all ranks send
    alike.

    Args:
        dout: gradient of the output, in `layout`.
        dlse: [B, H, s], or [s, H] in layout "thd"; None for zeros.
        layout: "bshd", "sbhd" or "thd".
    """
    if dlse is None:
        return pad(dout, (0, 2))
    order = {"bshd": (0, 2, 1), "sbhd": (2, 0, 1)}.get(layout)
    rows = (dlse if order is None else dlse.permute(order)).unsqueeze(-1)
    coarse = rows.to(dout.dtype)
    fine = (rows - coarse.to(rows.dtype)).to(dout.dtype)
    return torch.cat((dout, -coarse, -fine), -1)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) over the keys of both parts, in the dtype of `out`; rows first."""
    shape = out.shape
    parts = (out.flatten(1, 2), lse.flatten(1), more.flatten(1, 2), more_lse.flatten(1))
    found, total = attention_merge(*parts, layout="thd")
    return found.view(shape), total.view(shape[:-1])


def _options(call: Call, how: Scoring) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": how.scale}
    if call.kind == "causal":
        options["causal"] = True  # A square: where the diagonal ends, it also starts.
    elif call.kind == "band":
        options["mask"] = MaskSpec(*how.bounds, q_start=call.q_pos, kv_start=call.k_pos)
    elif call.kind == "dense":
        options["mask"] = call.tile
    if call.cu_q is not None:
        return options | {"layout": "thd", "cu_seqlens_q": call.cu_q, "cu_seqlens_k": call.cu_k}
    options |= {"layout": "sbhd", "q_start": call.q_pos, "kv_start": call.k_pos}
    if how.slopes is not None:
        options |= {"alibi_slopes": how.slopes, "alibi_sqrt": how.root}
    if how.dropout_p:
        options |= {"dropout_p": how.dropout_p, "dropout_rng": how.rng}
        options["head_start"] = how.head_start
    return options


def _unrounded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Upcast what a CPU computes with: its kernels do so anyway, and then round what they return.

    Other devices' kernels round each partial result to the dtype of their inputs.
    """
    return tuple(map(upcast, tensors)) if tensors[0].device.type == "cpu" else tensors


def _expanded(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(2, index)


def _contracted(grad: Tensor, shape: torch.Size, index: Tensor | None) -> Tensor:
    if index is None:
        return grad
    whole = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    return whole.index_add_(2, index, grad)


__all__ = ["Scoring", "attend", "attend_backward", "expansion", "merge", "with_lse_gradient"]
