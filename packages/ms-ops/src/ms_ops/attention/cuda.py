"""Attention on torch's CUDA kernels, for fp16 and bf16.

The flash kernel takes grouped heads, packs, and bands aligned to the lower right. The
memory-efficient one takes a bias, in which masks go block by block of rows, and a triangle aligned
to the upper left. What neither takes gets None and is written out by the caller: fp32 and fp64,
dropout (the kernels have their own random numbers), ALiBi and scaled biases (they would be rounded
to 16 bits), the gradient of a bias, and packs that are not plain.

What the kernels want is arranged here: channels padded to a multiple of 8, which is exact; rows
without keys, whose log-sum-exp is +inf or undefined there; a log-sum-exp padded to 32 rows.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import LOW_PRECISION
from ..masks import UNBOUNDED
from .blocks import cut, row_blocks, summand, summand_width
from .call import Call
from .layout import PACKED, from_bhsd, lse_from_bhs, lse_to_bhs, to_bhsd
from .pattern import Block, allowed
from .reference import finite, sink_gradient

Route = Literal["flash", "efficient", "blocks"]

# Channels of the kernels' operands are multiples of this, rows of their log-sum-exps, of a bias.
CHANNELS, ROWS, COLUMNS = 8, 32, 16
# The flash kernel's most channels, and where its backward has the shared memory for so many.
WIDEST, WIDEST_ELSEWHERE = 256, 192
LARGE = ((8, 0), (9, 0), (10, 0))
# Older ones return the log-sum-exp of a pack padded to its longest sequence.
PACKS = torch.__version__ >= "2.7"

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
# The shape function of aten._efficient_attention_backward misses an argument (torch 2.13).
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (out, lse) as the operator does, None when no kernel serves the call."""
    chosen = route(call, q, k, v)
    if chosen == "blocks":
        return None
    run = {"flash": _flash_forward, "efficient": _efficient_forward}[chosen]
    out, lse = run(call, q, k, v)
    if call.sink is not None:
        sink = call.sink.to(lse.dtype).view(1, -1, 1)
        total = torch.logaddexp(lse, sink)
        factor = torch.exp(lse - finite(total)).unsqueeze(-1)
        out, lse = (out * factor).to(q.dtype), total
    out = from_bhsd(out, call.layout).contiguous()
    return out, lse_from_bhs(lse, call.layout).contiguous()


def backward(
    call: Call,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Return (dq, dk, dv, dbias, dsink), None when no kernel serves the call."""
    chosen = route(call, q, k, v)
    if chosen == "blocks" or bias_grad:
        return None
    rows = lse_to_bhs(lse, call.layout)
    run = {"flash": _flash_grads, "efficient": _efficient_grads}[chosen]
    grads = run(call, (dout, q, k, v, out), rows)
    dq, dk, dv = (from_bhsd(g.to(q.dtype), call.layout).contiguous() for g in grads)
    dsink = q.new_empty(0)
    if call.sink is not None:
        delta = (dout.float() * out.float()).sum(-1, keepdim=True)
        dsink = sink_gradient(call.sink, rows, to_bhsd(delta, call.layout).squeeze(-1))
    return dq, dk, dv, q.new_empty(0), dsink


def route(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Route:
    """Say which kernel serves a call; a function of shapes and options alone."""
    if call.dropout_p or q.dtype not in LOW_PRECISION or not _capable(q):
        return "blocks"
    if 0 in (q.numel(), k.numel(), v.numel()) or (call.layout == PACKED and not PACKS):
        return "blocks"
    plain = call.bias is None and call.mask is None and call.slopes is None
    if plain and _is_flash_band(call, q, k) and _padded(q, v) <= _widest(q):
        return "flash"
    return "efficient" if _is_exact(call, q) else "blocks"


def _is_exact(call: Call, q: Tensor) -> bool:
    """Whether what is added to the scores is the same in q's dtype, which the kernel reads."""
    if call.layout == PACKED or call.slopes is not None:
        return False
    return call.bias is None or (call.bias.dtype == q.dtype and call.bias_factor == 1.0)


def _is_flash_band(call: Call, q: Tensor, k: Tensor) -> bool:
    """Whether the mask is a band around the flash kernel's diagonal, that of the lower right."""
    if not call.banded:
        return True
    if call.prefix or len(call.window) > 2 or min(call.window) < 0:
        return False
    if call.corner == "lower_right":
        return True
    same = to_bhsd(q, call.layout).shape[2] == to_bhsd(k, call.layout).shape[2]
    return same and call.layout != PACKED


def _capable(q: Tensor) -> bool:
    """Whether the device runs the kernels; tensors without one are taken to be on one that does."""
    if torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(q.device) >= (8, 0)


def _widest(q: Tensor) -> int:
    if not torch.cuda.is_available():
        return WIDEST
    large = torch.cuda.get_device_capability(q.device) in LARGE
    return WIDEST if large else WIDEST_ELSEWHERE


def _padded(q: Tensor, v: Tensor) -> int:
    """Return the channels of the kernels' operands."""
    width = max(q.shape[-1], v.shape[-1])
    return -(-width // CHANNELS) * CHANNELS


def _operand(x: Tensor, width: int) -> Tensor:
    """Return x with neighbouring channels, and zeros up to `width` of them."""
    missing = width - x.shape[-1]
    x = F.pad(x, (0, missing)) if missing else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _sequence_first(x: Tensor, layout: str) -> Tensor:
    """View x as the flash kernel takes it: [B, S, H, D], packed [T, H, D]."""
    return x if layout == PACKED else to_bhsd(x, layout).transpose(1, 2)


def _flash_options(call: Call, q: Tensor, k: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the flash kernel's arguments from `cum_seq_q` to `is_causal`, and its keywords."""
    left, right = call.window if call.banded else (UNBOUNDED, UNBOUNDED)
    causal = left == UNBOUNDED and right == 0
    starts: tuple[Any, ...] = (None, None, q.shape[1], k.shape[1])
    if call.layout == PACKED:
        assert call.cu_q is not None
        assert call.cu_k is not None
        # The longest sequence is not known without waiting for the device: a pack is no shorter.
        starts = (call.cu_q.int(), call.cu_k.int(), q.shape[0], k.shape[0])
    options: dict[str, Any] = {"scale": call.scale}
    if call.banded and not causal:
        options["window_size_left"] = -1 if left == UNBOUNDED else left
        options["window_size_right"] = -1 if right == UNBOUNDED else right
    return (*starts, 0.0, causal), options


def _flash_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    width = _padded(q, v)
    query, key, value = (_operand(_sequence_first(t, call.layout), width) for t in (q, k, v))
    arguments, options = _flash_options(call, query, key)
    out, lse = _flash(query, key, value, *arguments, False, **options)[:2]
    # A row without any key has the log-sum-exp +inf there.
    lse = lse.masked_fill(lse == math.inf, -math.inf)
    out = out.narrow(-1, 0, v.shape[-1])
    if call.layout != PACKED:
        return out.transpose(1, 2), lse
    beyond = _beyond(call.cu_q, query)
    out = out.masked_fill(beyond.view(-1, 1, 1), 0.0)
    return out.transpose(0, 1).unsqueeze(0), lse.masked_fill(beyond, -math.inf).unsqueeze(0)


def _flash_grads(call: Call, tensors: tuple[Tensor, ...], lse: Tensor) -> list[Tensor]:
    q, k, v = tensors[1:4]
    width = _padded(q, v)
    dy, query, key, value, out = (_operand(_sequence_first(t, call.layout), width) for t in tensors)
    arguments, options = _flash_options(call, query, key)
    # exp(score - inf) = 0: rows without keys have no gradients.
    sums = lse.masked_fill(lse == -math.inf, math.inf).contiguous()
    sums = sums.squeeze(0) if call.layout == PACKED else sums
    rng = torch.empty(2, dtype=torch.uint64, device=q.device)
    found = _flash_backward(
        dy, query, key, value, out, sums, *arguments, rng, rng.new_empty(()), **options
    )
    grads = [g.narrow(-1, 0, t.shape[-1]) for g, t in zip(found, (q, k, v), strict=True)]
    if call.layout != PACKED:
        return [g.transpose(1, 2) for g in grads]
    rows, keys = _beyond(call.cu_q, query), _beyond(call.cu_k, key)
    pairs = zip(grads, (rows, keys, keys), strict=True)
    clean = (g.masked_fill(beyond.view(-1, 1, 1), 0.0) for g, beyond in pairs)
    return [g.transpose(0, 1).unsqueeze(0) for g in clean]


def _beyond(starts: Tensor | None, x: Tensor) -> Tensor:
    """Return bool [T], True for tokens that belong to no sequence: kernels leave them unwritten."""
    assert starts is not None
    return torch.arange(x.shape[0], device=x.device) >= starts.narrow(0, -1, 1)


def _whole(call: Call) -> bool:
    """Whether the memory-efficient kernel does a call at once: no bias, and its own triangle."""
    if call.bias is not None or call.mask is not None:
        return False
    return not call.banded or (call.causal and call.corner == "upper_left")


def _heads_alike(x: Tensor, heads: int) -> Tensor:
    """Repeat [B, Hk, S, D] for every head of a group."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _efficient_operands(
    call: Call, block: Block, q: Tensor, k: Tensor, v: Tensor
) -> tuple[list[Tensor], Tensor | None, bool]:
    """Return q, k, v of a block [B, H, S, D], its bias, and whether it is the kernel's triangle."""
    heads, width = q.shape[1], _padded(q, v)
    operands = [_operand(_heads_alike(t, heads), width) for t in (q, k, v)]
    if _whole(call):
        return operands, None, call.banded
    bias = summand(call, block, q)
    if bias is None:
        return operands, None, False
    # Rows of a bias start at multiples of 16 elements.
    keys = bias.shape[-1]
    bias = F.pad(bias, (0, -keys % COLUMNS)).narrow(-1, 0, keys)
    return operands, bias.expand(q.shape[0], heads, q.shape[2], keys), False


def _blocks_of(call: Call, q: Tensor, k: Tensor) -> list[Block]:
    if _whole(call):
        call = call._replace(window=[])
        return list(row_blocks(call, q, k, 0))
    return list(row_blocks(call, q, k, summand_width(call, q, True)))


def _efficient_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = (to_bhsd(t, call.layout) for t in (q, k, v))
    outs, sums = [], []
    for block in _blocks_of(call, query, key):
        part = cut(block, query, key, value)
        if block.k0 == block.k1:
            outs.append(part[0].new_zeros((*part[0].shape[:3], v.shape[-1])))
            sums.append(torch.full(part[0].shape[:3], -math.inf, device=q.device))
            continue
        operands, bias, triangle = _efficient_operands(call, block, *part)
        out, lse = _efficient(*operands, bias, True, 0.0, triangle, scale=call.scale)[:2]
        out, lse = out.narrow(-1, 0, v.shape[-1]), lse.narrow(-1, 0, part[0].shape[2])
        seen = allowed(call, block)
        if seen is not None:
            # What the kernel gives for rows without any key is not documented.
            none = ~seen.any(-1).expand(lse.shape)
            lse = lse.masked_fill(none, -math.inf)
            out = out.masked_fill(none.unsqueeze(-1), 0.0)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _efficient_grads(call: Call, tensors: tuple[Tensor, ...], lse: Tensor) -> list[Tensor]:
    dout, q, k, v, out = (to_bhsd(t, call.layout) for t in tensors)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=q.device) for t in (k, v))
    dqs = []
    for block in _blocks_of(call, q, k):
        query, key, value = cut(block, q, k, v)
        dy, y = (cut(block, t, k, v)[0] for t in (dout, out))
        if block.k0 == block.k1:
            dqs.append(torch.zeros_like(query))
            continue
        operands, bias, triangle = _efficient_operands(call, block, query, key, value)
        dy, y = (_operand(t, operands[0].shape[-1]) for t in (dy, y))
        sums = finite(cut(block, lse, k, v)[0])
        sums = F.pad(sums, (0, -query.shape[2] % ROWS)).contiguous()
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        wanted = [True, True, True, False]
        found = _efficient_backward(
            dy, *operands, bias, y, sums, seed, seed, 0.0, wanted, triangle, scale=call.scale
        )
        dqs.append(found[0].narrow(-1, 0, q.shape[-1]))
        for total, grad in ((dk, found[1]), (dv, found[2])):
            by_group = grad.float().unflatten(1, (k.shape[1], -1)).sum(2)
            place = total.narrow(2, block.k0, key.shape[2])
            place.add_(by_group.narrow(-1, 0, total.shape[-1]))
    return [torch.cat(dqs, 2), dk, dv]
