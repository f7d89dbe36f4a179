"""Attention on torch's own kernels, without a tensor of Sq x Sk.

On CPU this is torch's flash kernel: it takes grouped heads and any strides, returns the log-sum-exp
and has a backward op. What it lacks is arranged around it: channels of keys and values that differ
are padded with zeros, which is exact; other masks than the upper-left triangle, bias and ALiBi
become summands of blocks of rows. Packed sequences run one by one. Low-precision inputs are upcast
for the call: the kernel's own bf16 mode sums the gradients of a head group in bf16, so that its
error grows with the group, and was not faster where measured. CUDA tensors have kernels of their
own (`cuda.py`). Dropout, the gradient of a bias and other devices run the blocks written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import compute_dtype, upcast
from ..registry import Backend, Facts, Kernel
from . import cuda
from .blocks import cut, dense_backward, dense_forward, row_blocks, summand, summand_width
from .call import Call
from .layout import PACKED, from_bhsd, lse_from_bhs, lse_shape, lse_to_bhs, to_bhsd
from .pattern import Block, allowed
from .reference import finite, sink_gradient

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as the reference does."""
    call = Call(*rest)
    if q.device.type == "cuda":
        served = cuda.forward(call, q, k, v)
        if served is not None:
            return served
    if _one_by_one(call):
        return _packed_forward(call, q, k, v)
    query, key, value = (to_bhsd(t, call.layout) for t in (q, k, v))
    if _serves(q, k, v) and _plain(call, query.shape[2], key.shape[2]):
        out, lse = _flash_one(call, query, key, value)
    else:
        out, lse = _blocks_forward(call, query, key, value)
    if call.sink is not None:
        out, lse = _with_sink(out, lse, call.sink)
    out = from_bhsd(out.to(q.dtype), call.layout).contiguous()
    return out, lse_from_bhs(lse, call.layout).contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dbias, dsink) from the saved output and log-sum-exp."""
    call, bias_grad = Call(*rest[:-1]), rest[-1]
    if q.device.type == "cuda":
        served = cuda.backward(call, dout, q, k, v, out, lse, bias_grad)
        if served is not None:
            return served
    if _one_by_one(call):
        return _packed_backward(call, dout, q, k, v, out, lse)
    tensors = tuple(to_bhsd(t, call.layout) for t in (dout, q, k, v, out))
    lse = lse_to_bhs(lse, call.layout)
    dbias = q.new_empty(0)
    if _serves(q, k, v) and _plain(call, tensors[1].shape[2], tensors[2].shape[2]):
        grads = _flash_one_backward(call, tensors, lse)
    else:
        *grads, summed = _blocks_backward(call, tensors, lse, bias_grad)
        if bias_grad and call.bias is not None:
            dbias = summed.to(call.bias.dtype)
    dq, dk, dv = (
        from_bhsd(g.to(t.dtype), call.layout).contiguous()
        for g, t in zip(grads, (q, k, v), strict=True)
    )
    dsink = q.new_empty(0)
    if call.sink is not None:
        delta = (upcast(tensors[0]) * upcast(tensors[4])).sum(-1)
        dsink = sink_gradient(call.sink, lse, delta)
    return dq, dk, dv, dbias, dsink


def _one_by_one(call: Call) -> bool:
    """Whether the lengths of a pack can be read without waiting for a device or a tracer."""
    starts = (call.cu_q, call.cu_k)
    return call.layout == PACKED and all(
        type(c) is Tensor and c.device.type == "cpu" for c in starts
    )


def _serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Torch's CPU kernel divides by the sizes: an empty tensor ends the process."""
    return q.device.type == "cpu" and 0 not in (q.numel(), k.numel(), v.numel())


def _plain(call: Call, queries: int, keys: int) -> bool:
    """Whether one call of the flash kernel does it: dense, or its own triangle."""
    if call.mask is not None or call.bias is not None or call.slopes is not None:
        return False
    if call.dropout_p or call.prefix or call.layout == PACKED:
        return False
    # One query aligned to the last key sees all keys: a step of decoding.
    return not call.banded or (call.causal and (_triangle(call, queries, keys) or queries == 1))


def _triangle(call: Call, queries: int, keys: int) -> bool:
    """Whether the mask is the kernel's own triangle."""
    return call.causal and (queries == keys or call.corner == "upper_left")


def _flash_one(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    width = max(q.shape[-1], v.shape[-1])
    query, key, value = (_operand(t, width) for t in (q, k, v))
    causal = _triangle(call, query.shape[2], key.shape[2])
    out, lse = _flash(query, key, value, 0.0, causal, scale=call.scale)
    return out[..., : v.shape[-1]], lse


def _flash_one_backward(call: Call, tensors: tuple[Tensor, ...], lse: Tensor) -> list[Tensor]:
    q, k, v = tensors[1:4]
    width = max(q.shape[-1], v.shape[-1])
    dy, query, key, value, y = (_operand(t, width) for t in tensors)
    if call.sink is not None:
        lse = finite(lse)
    causal = _triangle(call, query.shape[2], key.shape[2])
    grads = _flash_backward(dy, query, key, value, y, lse, 0.0, causal, scale=call.scale)
    return [g[..., : t.shape[-1]] for g, t in zip(grads, (q, k, v), strict=True)]


def _operand(x: Tensor, width: int) -> Tensor:
    x = upcast(x)
    missing = width - x.shape[-1]
    x = F.pad(x, (0, missing)) if missing else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    flash = _serves(q, k, v) and not call.dropout_p
    outs, sums = [], []
    for block in row_blocks(call, q, k, summand_width(call, q, flash)):
        query, key, value = (upcast(t) for t in cut(block, q, k, v))
        if flash and _serves(query, key, value):
            out, lse = _flash_block(call, block, query, key, value)
        else:
            out, lse = dense_forward(call, block, query, key, value)
        outs.append(out)
        sums.append(lse)
    if not outs:
        dtype = compute_dtype(q.dtype)
        return q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=dtype), q.new_zeros(
            q.shape[:3], dtype=dtype
        )
    return (outs[0], sums[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(sums, 2))


def _flash_block(
    call: Call, block: Block, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    width = max(q.shape[-1], v.shape[-1])
    query, key, value = (_operand(t, width) for t in (q, k, v))
    bias = summand(call, block, query)
    out, lse = _flash(query, key, value, 0.0, False, attn_mask=bias, scale=call.scale)
    seen = allowed(call, block)
    if seen is not None:
        # The kernel gives rows without any key the log-sum-exp 0.
        lse = lse.masked_fill(~seen.any(-1).expand(lse.shape), -math.inf)
    return out[..., : v.shape[-1]], lse


def _blocks_backward(
    call: Call, tensors: tuple[Tensor, ...], lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout, q, k, v, out = tensors
    flash = _serves(q, k, v) and not call.dropout_p and not bias_grad
    dtype = compute_dtype(q.dtype)
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    dbias = torch.zeros(_shape(call.bias, bias_grad), dtype=dtype, device=q.device)
    lse, dqs = finite(lse), []
    for block in row_blocks(call, q, k, summand_width(call, q, flash)):
        query, key, value = cut(block, q, k, v)
        dy, y = (cut(block, t, k, v)[0] for t in (dout, out))
        part = tuple(upcast(t) for t in (dy, query, key, value, y))
        rows = cut(block, lse, k, v)[0]
        if flash and _serves(query, key, value):
            grads = _flash_block_backward(call, block, part, rows)
        else:
            *grads, dscores = dense_backward(call, block, part, rows)
            if bias_grad:
                _add_bias_gradient(call, block, dscores, dbias)
        dqs.append(grads[0])
        for total, grad in ((dk, grads[1]), (dv, grads[2])):
            total[:, :, block.k0 : block.k1] += grad
    dq = torch.cat(dqs, 2) if dqs else torch.zeros(q.shape, dtype=dtype, device=q.device)
    return dq, dk, dv, dbias


def _shape(bias: Tensor | None, bias_grad: bool) -> tuple[int, ...]:
    return tuple(bias.shape) if bias is not None and bias_grad else (0,)


def _flash_block_backward(
    call: Call, block: Block, part: tuple[Tensor, ...], lse: Tensor
) -> list[Tensor]:
    q, k, v = part[1:4]
    width = max(q.shape[-1], v.shape[-1])
    dy, query, key, value, y = (_operand(t, width) for t in part)
    bias = summand(call, block, query)
    grads = _flash_backward(
        dy, query, key, value, y, lse.contiguous(), 0.0, False, attn_mask=bias, scale=call.scale
    )
    return [g[..., : t.shape[-1]] for g, t in zip(grads, (q, k, v), strict=True)]


def _add_bias_gradient(call: Call, block: Block, dscores: Tensor, dbias: Tensor) -> None:
    """Add a block's part to the gradient of a bias that may be broadcast."""
    whole = dbias.view((1,) * (4 - dbias.dim()) + tuple(dbias.shape))
    rows = slice(block.q0, block.q1) if whole.shape[2] != 1 else slice(None)
    keys = slice(block.k0, block.k1) if whole.shape[3] != 1 else slice(None)
    place = whole[:, :, rows, keys]
    place += dscores.sum_to_size(place.shape) * call.bias_factor


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Lower the weights by what the sink takes: out * exp(lse - lse with sink)."""
    total = torch.logaddexp(lse, sink.to(lse.dtype).view(1, -1, 1))
    return out * torch.exp(lse - finite(total)).unsqueeze(-1), total


def _sequences(call: Call, heads: int) -> Iterator[tuple[slice, slice, Call]]:
    """Yield the tokens of each packed sequence and the call that it is alone."""
    assert call.cu_q is not None
    assert call.cu_k is not None
    starts_q, starts_k = call.cu_q.tolist(), call.cu_k.tolist()
    count = len(starts_q) - 1
    slopes = None if call.slopes is None else call.slopes.reshape(-1)[-heads:]
    for i in range(count):
        window = list(call.bounds(i, count)) if call.window else []
        alone = call._replace(
            cu_q=None,
            cu_k=None,
            layout="bshd",
            slopes=slopes,
            window=window,
            prefix=call.prefix[i : i + 1] if len(call.prefix) > 1 else call.prefix,
            starts=[call.starts[0] + starts_q[i], call.starts[1] + starts_k[i], call.starts[2]],
        )
        yield slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1]), alone


def _packed_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_zeros((*q.shape[:2], v.shape[-1]))
    lse = q.new_full(lse_shape(q, call.layout), -math.inf, dtype=compute_dtype(q.dtype))
    if call.sink is not None:
        lse.copy_(call.sink.expand_as(lse))
    for rows, keys, alone in _sequences(call, q.shape[1]):
        if rows.start == rows.stop:
            continue
        part = (t.unsqueeze(0) for t in (q[rows], k[keys], v[keys]))
        one, sums = forward(*part, *alone)
        out[rows], lse[rows] = one[0], sums[0].transpose(0, 1)
    return out, lse


def _packed_backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    dsink = q.new_empty(0) if call.sink is None else torch.zeros_like(call.sink)
    for rows, keys, alone in _sequences(call, q.shape[1]):
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        part = (t.unsqueeze(0) for t in (dout[rows], q[rows], k[keys], v[keys], out[rows]))
        sums = lse[rows].transpose(0, 1).unsqueeze(0).contiguous()
        found = backward(*part, sums, *alone, False)
        for grad, tokens, one in zip(grads, (rows, keys, keys), found[:3], strict=True):
            grad[tokens] = one[0]
        if call.sink is not None:
            dsink += found[4]
    return grads[0], grads[1], grads[2], q.new_empty(0), dsink


def _supports(facts: Facts) -> str | None:
    if facts.device == "npu":
        return "torch's own kernels for NPU tensors belong to the backend 'npu'"
    return None


BACKEND = Backend("portable", 90, {"attention": Kernel(forward, backward, _supports)})
