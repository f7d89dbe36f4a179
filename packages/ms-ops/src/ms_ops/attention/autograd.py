"""What tracers and autograd need to know of the attention operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import compute_dtype
from ..opdef import OPERATORS
from ..registry import Facts
from .arguments import OP
from .call import TENSORS, Call
from .layout import lse_shape


def facts(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Facts:
    """Return what a backend may know of a call."""
    call = Call(*rest)
    options = (
        ("causal", call.corner if call.causal else ""),
        ("window", len(call.window)),
        ("corner", call.corner),
        ("prefix", bool(call.prefix)),
        ("mask", call.mask is not None),
        ("bias", call.bias is not None),
        ("slopes", "" if call.slopes is None else "root" if call.root else "linear"),
        ("sink", call.sink is not None),
        ("dropout", call.dropout_p > 0),
        ("layout", call.layout),
    )
    return Facts(q.device.type, q.dtype, options)


def backward_facts(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> Facts:
    """Return the same of a backward call."""
    return facts(q, k, v, *rest[:-1])


def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return outputs of the right shape, stride and dtype."""
    out = q.new_empty([*q.shape[:-1], v.shape[-1]])
    return out, q.new_empty(lse_shape(q, rest[-1]), dtype=compute_dtype(q.dtype))


def backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Return the same of a backward call."""
    bias, sink, bias_grad = rest[0], rest[1], rest[-1]
    dbias = bias.new_empty(bias.shape) if bias_grad and bias is not None else q.new_empty(0)
    dsink = q.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), dbias, dsink)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what backward needs."""
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.backend = inputs[3 + TENSORS : -1], inputs[-1]
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3 : 3 + TENSORS])


def grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return gradients of all tensors from those of (out, lse)."""
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    given: tuple[Tensor, ...] = (dout, q, k, v, out)
    if dlse is not None:
        given = _with_lse_gradient(dout, q, k, v, out, dlse, ctx.numbers[-1])
    bias_grad = bool(ctx.needs_input_grad[3])
    grads = OPERATORS[OP].backward(*given, lse, *tensors, *ctx.numbers, bias_grad, ctx.backend)
    dv = grads[2][..., : v.shape[-1]]
    dbias = grads[3] if bias_grad else None
    dsink = grads[4] if ctx.needs_input_grad[4] else None
    rest = [None] * (TENSORS - 2 + len(ctx.numbers) + 1)
    return (grads[0], grads[1], dv, dbias, dsink, *rest)


def _with_lse_gradient(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dlse: Tensor, layout: str
) -> tuple[Tensor, ...]:
    """Return (dout, q, k, v, out) with two channels more, whose effect is the gradient of lse.

    ds = p * (dp - delta + dlse). A channel with value 0, output 1 and output gradient -dlse changes
    delta = sum(dout * out) by -dlse and nothing else; a second one carries what rounding to a low
    precision takes from the first.
    """
    order = {"bshd": (0, 2, 1), "sbhd": (2, 0, 1)}.get(layout)
    rows = (dlse if order is None else dlse.permute(order)).unsqueeze(-1)
    coarse = rows.to(dout.dtype)
    fine = (rows - coarse.to(rows.dtype)).to(dout.dtype)
    zeros = v.new_zeros([*v.shape[:-1], 2])
    ones = out.new_ones([*out.shape[:-1], 2])
    return (
        torch.cat((dout, -coarse, -fine), -1),
        q,
        k,
        torch.cat((v, zeros), -1),
        torch.cat((out, ones), -1),
    )
