"""The merge of two attention results written out: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ...device import compute_dtype
from ...registry import Backend, Kernel

ORDERS = {"bshd": (0, 2, 1), "sbhd": (2, 0, 1), "bhsd": (0, 1, 2)}


def forward(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) over the keys of both parts."""
    dtype = compute_dtype(out1.dtype)
    # No key at all: the derivative of log(0 + 0) is undefined, that of a filled value is 0.
    empty = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    lse = torch.logaddexp(*(part.masked_fill(empty, 0.0) for part in (lse1, lse2)))
    lse = lse.masked_fill(empty, -torch.inf)
    w1, w2 = (weights(part, lse, layout) for part in (lse1, lse2))
    out = w1 * out1.to(dtype) + w2 * out2.to(dtype)
    return out.to(out1.dtype).contiguous(), lse.contiguous()


def backward(
    dout: Tensor,
    dlse: Tensor,
    out1: Tensor,
    lse1: Tensor,
    out2: Tensor,
    lse2: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dout1, dlse1, dout2, dlse2)."""
    dtype = compute_dtype(out1.dtype)
    dy = dout.to(dtype)
    # The rounded output would cost a cancelling difference its digits: it is formed again.
    ws = [weights(part, lse, layout) for part in (lse1, lse2)]
    whole = ws[0] * out1.to(dtype) + ws[1] * out2.to(dtype)
    grads: list[Tensor] = []
    for weight, part in zip(ws, (out1, out2), strict=True):
        inner = (dy * (part.to(dtype) - whole)).sum(-1, keepdim=True)
        rows = heads_first((weight * inner).squeeze(-1), layout)
        grads += [
            (weight * dy).to(part.dtype).contiguous(),
            (rows + heads_first(weight.squeeze(-1), layout) * dlse).contiguous(),
        ]
    return grads[0], grads[1], grads[2], grads[3]


def weights(part: Tensor, lse: Tensor, layout: str) -> Tensor:
    """Return exp(part - lse) shaped to multiply an output; 0 where there is no key at all."""
    weight = torch.exp(part - lse.masked_fill(lse == -torch.inf, 0.0))
    if layout not in ORDERS:
        return weight.unsqueeze(-1)
    return weight.permute(ORDERS[layout]).unsqueeze(-1)


def heads_first(rows: Tensor, layout: str) -> Tensor:
    """Return a number a query and head in the order of the log-sum-exp."""
    order = ORDERS.get(layout)
    return rows if order is None else rows.permute([order.index(i) for i in range(3)])


BACKEND = Backend("reference", 100, {"attention_merge": Kernel(forward, backward)})
