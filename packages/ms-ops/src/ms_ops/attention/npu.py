"""Attention by torch_npu's fused kernels.

v1 serves eager calls, v3 traced ones (its lengths are tensors), v2 those with a position term that
v1 lacks. Statistics cross this border as the log-sum-exp: any pair with max + log(sum) = lse is
valid for the kernel's backward, so (lse, 1) is what it gets, whichever backend ran forward.

A sink is a factor on output and log-sum-exp, and what rows without any key give is written by us:
the documents leave both open. Not served here: dropout (ours is a function of the place, the
kernel's of its stream; forward takes a mask, its gradient does not), ALiBi in packs. What the
kernel refuses within a served call runs in the written-out form: ALiBi with other than equal
lengths, a pack with queries that see no key or of too many sequences, too many channels or heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import npu
from ..registry import Backend, Facts, Kernel
from . import reference
from .call import Call
from .layout import PACKED
from .npu_mask import Masking, masking, spare_tokens, traced

LAYOUTS = {"bshd": "BSND", "sbhd": "SBH", "bhsd": "BNSD", "thd": "TND"}
STATS = 8  # The kernel keeps eight copies of each statistic.
# At most: channels and heads.
WIDTH, HEADS = 768, 256


@dataclass(frozen=True)
class Prepared:
    """Operands as the kernel takes them, and the keywords of forward and backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    keywords: dict[str, Any]
    version: str
    scale: float
    masking: Masking


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as the reference does."""
    call = Call(*rest)
    spare = spare_tokens(call, q, k)
    if spare is not None:
        out, lse = forward(*_without(spare, q, k, v), *rest)
        return _with(spare[0], out), _with(spare[0], lse, -torch.inf)
    ready = _prepare(call, q, k, v)
    if ready is None:
        return reference.forward(q, k, v, *rest)
    run = npu.op(f"npu_fusion_attention{ready.version}")
    layout = LAYOUTS[call.layout]
    out, top, total = run(
        ready.q, ready.k, ready.v, ready.heads, layout, scale=ready.scale, **ready.keywords
    )[:3]
    lse = top[..., 0] + total[..., 0].log()
    out = out.reshape(*q.shape[:-1], -1)[..., : v.shape[-1]]
    if call.sink is not None:
        out, lse = _with_sink(call, out, lse)
    empty = ready.masking.empty
    if empty is not None:
        lse = lse.masked_fill(empty, -torch.inf)
        out = out.masked_fill(_like_out(empty.expand(lse.shape), call.layout), 0.0)
    return out.contiguous(), lse.contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Return (dq, dk, dv, dbias, dsink) from an output and log-sum-exp of any backend."""
    call, bias_grad = Call(*rest[:-1]), rest[-1]
    spare = spare_tokens(call, q, k)
    if spare is not None:
        few = _without(spare, q, k, v)
        above = (t[: t.shape[0] - spare[0]] for t in (dout, out, lse))
        dy, y, stats = (t.contiguous() for t in above)
        grads = backward(dy, *few, y, stats, *rest)
        counts = (spare[0], spare[1], spare[1])
        padded = (_with(n, g) for n, g in zip(counts, grads, strict=False))
        return (*padded, *grads[3:])
    ready = None if bias_grad else _prepare(call, q, k, v)
    if ready is None:
        return reference.backward(dout, q, k, v, out, lse, *rest)
    # Where a row sees no key, exp(-inf - 0) is the 0 that its weights are.
    stats = reference.finite(lse).unsqueeze(-1).expand(*lse.shape, STATS).contiguous()
    dy, y = (_operand(t, call.layout, 0).contiguous() for t in (dout, out))
    run = npu.op(f"npu_fusion_attention_grad{ready.version}")
    grads = run(
        ready.q, ready.k, ready.v, dy, ready.heads, LAYOUTS[call.layout],
        softmax_max=stats, softmax_sum=torch.ones_like(stats), attention_in=y,
        scale_value=ready.scale, **ready.keywords,
    )  # fmt: skip
    dq, dk, dv = (
        g.reshape(*t.shape[:-1], -1)[..., : t.shape[-1]].contiguous()
        for g, t in zip(grads, (q, k, v), strict=False)
    )
    dsink = q.new_empty(0)
    if call.sink is not None:
        delta = (dout.float() * out.float()).sum(-1)
        dsink = reference.sink_gradient(call.sink, *_as_bhs(call.layout, lse, delta))
    return dq, dk, dv, q.new_empty(0), dsink


def _without(spare: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Leave out the tokens at the end of a pack that belong to no sequence."""
    pairs = ((q, spare[0]), (k, spare[1]), (v, spare[1]))
    return tuple(t[: t.shape[0] - n] for t, n in pairs)


def _with(count: int, x: Tensor, value: float = 0.0) -> Tensor:
    """Put rows of a value in their place."""
    return torch.cat((x, x.new_full((count, *x.shape[1:]), value)))


def _prepare(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Prepared | None:
    """Return a call of the kernel, None when the written-out form has to serve."""
    heads = q.shape[1 if call.layout in ("bhsd", "thd") else 2]
    too_large = heads > HEADS or max(q.shape[-1], v.shape[-1]) > WIDTH
    if too_large or 0 in (q.numel(), k.numel(), v.numel()):
        return None
    how = masking(call, q, k)
    position = _position(call, q, k)
    if how is None or position is None or (traced(q) and position[0] == "_v2"):
        return None
    version, keywords = position
    version = "_v3" if traced(q) and not version else version
    bounds = ("pre_tokens", "next_tokens") if version == "_v2" else ("pre_tockens", "next_tockens")
    keywords |= dict(zip(bounds, (how.pre, how.next), strict=True)) | how.keywords
    if call.layout == PACKED:
        keywords["softmax_layout"] = "TND"
    # The kernel wants Dq = Dk >= Dv; zeros in q and k change no score.
    missing = max(0, v.shape[-1] - q.shape[-1])
    operands = [_operand(t, call.layout, m) for t, m in ((q, missing), (k, missing), (v, 0))]
    return Prepared(
        operands[0], operands[1], operands[2], heads, keywords, version, call.scale, how
    )


def _operand(x: Tensor, layout: str, missing: int) -> Tensor:
    x = F.pad(x, (0, missing)) if missing else x
    return x.flatten(2) if layout == "sbhd" else x


def _position(call: Call, q: Tensor, k: Tensor) -> tuple[str, dict[str, Any]] | None:
    """Return the kernel's version and its keywords for bias and ALiBi; None: not served."""
    if call.bias is None and call.slopes is None:
        return "", {}
    axis = {"bshd": 1, "sbhd": 0, "bhsd": 2, "thd": 0}[call.layout]
    rows, keys = q.shape[axis], k.shape[axis]
    if call.slopes is not None:
        if call.bias is not None or rows != keys:
            return None
        shift = call.slope_shift
        starts = {"q_start_idx": [max(0, -shift)], "kv_start_idx": [max(0, shift)]}
        kind = 3 if call.root else 2
        return "_v2", {"pse": call.slopes.float().contiguous(), "pse_type": kind, **starts}
    assert call.bias is not None
    heads = q.shape[1 if call.layout == "bhsd" else 2]
    bias = call.bias.reshape((1,) * (4 - call.bias.dim()) + tuple(call.bias.shape))
    batch = 1 if bias.shape[0] == 1 else -1
    bias = bias.expand(batch, heads, rows, keys).to(q.dtype).contiguous()
    if call.bias_factor == call.scale:
        return "", {"pse": bias}
    return "_v2", {"pse": bias * call.bias_factor, "pse_type": 0}


def _with_sink(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Let each head's sink take its share of every row."""
    assert call.sink is not None
    sink = call.sink.to(lse.dtype)
    total = torch.logaddexp(lse, sink if call.layout == PACKED else sink.view(1, -1, 1))
    share = _like_out(torch.exp(lse - total), call.layout)
    return (out.float() * share).to(out.dtype), total


def _like_out(x: Tensor, layout: str) -> Tensor:
    """Turn [B, H, S] ([T, H]) so that it broadcasts to an output of the layout."""
    order = {"bshd": (0, 2, 1), "sbhd": (2, 0, 1)}.get(layout)
    return (x if order is None else x.permute(order)).unsqueeze(-1)


def _as_bhs(layout: str, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as [B, H, S]; delta comes in the order of the output."""
    if layout == PACKED:
        return lse.t().unsqueeze(0), delta.t().unsqueeze(0)
    order = {"bshd": (0, 2, 1), "sbhd": (1, 2, 0), "bhsd": (0, 1, 2)}[layout]
    return lse, delta.permute(order)


def _supports(facts: Facts) -> str | None:
    if facts.option("dropout"):
        return "the kernel draws its dropout from a stream of its own"
    if facts.option("layout") == PACKED and facts.option("slopes"):
        return "no ALiBi for packed sequences"
    return npu.declines(facts)


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {"attention": Kernel(forward, backward, _supports)},
    npu.available,
)
