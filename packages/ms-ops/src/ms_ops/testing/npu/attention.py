"""torch_npu's fused attention as documented: layouts, sparse modes, mask polarity, statistics.

Scores are fp32; the weights of a row are rounded to the inputs' dtype before they meet the values.
Masks hold 1 where a query may NOT attend; lists of lengths are cumulative ends without the leading
0; statistics are fp32 with eight copies at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layouts import from_statistics, join, split, statistics
from .readings import reading
from .require import need, need_dtypes
from .sparse import Sparse, allowed

FAR = 2147483647


class Options(NamedTuple):
    """What forward and backward share, under one spelling."""

    heads: int
    layout: str
    scale: float
    sparse: Sparse
    ends: tuple[list[int], list[int]] | None
    pse: Tensor | None
    pse_type: int
    starts: tuple[int, int]
    inner_precise: int
    stats_layout: str


def forward_v1(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = FAR,
    next_tockens: int = FAR,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Any, ...]:
    """npu_fusion_attention."""
    _unused(padding_mask, sink, dropout_mask, keep_prob)
    sparse = Sparse(sparse_mode, atten_mask, pre_tockens, next_tockens, prefix)
    ends = _ends(actual_seq_qlen, actual_seq_kvlen)
    options = Options(head_num, input_layout, scale, sparse, ends, pse, 1, (0, 0), inner_precise,
                      softmax_layout)  # fmt: skip
    return (*_forward(query, key, value, options), 0, 0, 0)


def forward_v3(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """npu_fusion_attention_v3: lengths, seed and offset are tensors."""
    out = forward_v1(*args, **kwargs)[:4]
    return (*out, out[0].new_zeros(1, dtype=torch.int64), out[0].new_zeros(1, dtype=torch.int64))


def forward_v2(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **given: Any
) -> tuple[Any, ...]:
    """npu_fusion_attention_v2: the position term has a type."""
    return (*_forward(query, key, value, _named(head_num, input_layout, given)), 0, 0, 0)


def backward_v1(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    **given: Any,
) -> tuple[Any, ...]:
    """npu_fusion_attention_grad; what it returns for the position term is left open."""
    given = dict(given)
    for side in ("pre", "next"):
        given[f"{side}_tokens"] = given.pop(f"{side}_tockens", FAR)
    grads = _backward(query, key, value, dy, _named(head_num, input_layout, given), given)
    return (*grads, query.new_empty(0), query.new_empty(0))


def backward_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    **given: Any,
) -> tuple[Any, ...]:
    """npu_fusion_attention_grad_v2."""
    grads = _backward(query, key, value, dy, _named(head_num, input_layout, given), given)
    return (*grads, *(query.new_empty(0) for _ in range(4)))


def _named(heads: int, layout: str, given: dict[str, Any]) -> Options:
    _unused(*(given.get(n) for n in ("padding_mask", "sink", "dropout_mask")),
            given.get("keep_prob", 1.0))  # fmt: skip
    need("npu_fusion_attention", given.get("query_rope") is None, "no split rope")
    sparse = Sparse(
        given.get("sparse_mode", 0), given.get("atten_mask"), given.get("pre_tokens", FAR),
        given.get("next_tokens", FAR), given.get("prefix"),
    )  # fmt: skip
    starts = [(given.get(n) or [0])[0] for n in ("q_start_idx", "kv_start_idx")]
    return Options(
        heads,
        layout,
        given.get("scale", given.get("scale_value", 1.0)),
        sparse,
        _ends(given.get("actual_seq_qlen"), given.get("actual_seq_kvlen")),
        given.get("pse"),
        given.get("pse_type", 1),
        (starts[0], starts[1]),
        given.get("inner_precise", 0),
        given.get("softmax_layout", ""),
    )


def _unused(*given: Any) -> None:
    need("npu_fusion_attention", given[-1] == 1.0, "keep_prob 1: its stream is the vendor's")
    need("npu_fusion_attention", all(g is None for g in given[:-1]), "no mask for dropout, no sink")


def _ends(queries: Any, keys: Any) -> tuple[list[int], list[int]] | None:
    if queries is None or keys is None:
        return None
    lists = [e.tolist() if isinstance(e, Tensor) else list(e) for e in (queries, keys)]
    return lists[0], lists[1]


def _shapes(query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, ...]:
    """Return what forward does, without values."""
    batch, rows = {"SBH": (1, 0), "BNSD": (0, 2)}.get(o.layout, (0, 1))
    width, stats = value.shape[-1], [query.shape[batch], o.heads, query.shape[rows], 8]
    if o.layout in ("BSH", "SBH"):
        width = width * query.shape[-1] // key.shape[-1]
    both = (query.new_empty(stats, dtype=torch.float32) for _ in range(2))
    return (query.new_empty([*query.shape[:-1], width]), *both, query.new_empty(0))


def _forward(query: Tensor, key: Tensor, value: Tensor, o: Options) -> tuple[Tensor, ...]:
    op = "npu_fusion_attention"
    need_dtypes(op, query, key, value, o.pse if o.pse_type in (0, 1) else None)
    need(op, query.dim() == len(o.layout), f"{len(o.layout)} dimensions for {o.layout}")
    if query.device.type != "cpu":
        return _shapes(query, key, value, o)
    outs, tops, sums = [], [], []
    for q, k, v, seen, pse in _problems(query, key, value, o):
        scores, dead = _scores(q, k, seen, pse, o)
        if not q.shape[2]:
            top = scores.new_empty(*q.shape[:2], 0, 1)
        else:
            top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - torch.where(dead, 0.0, top))
        total = weights.sum(-1, keepdim=True)
        rounded = weights.to(query.dtype).float()
        out = (rounded @ _repeat(v, q)) / torch.where(total == 0, 1.0, total)
        if dead.any() and reading().empty_rows == "uniform":
            out = torch.where(dead, _repeat(v, q).mean(-2, keepdim=True), out)
            top, total = top.clamp(min=-1e38), torch.where(dead, float(k.shape[2]), total)
        outs.append(out)
        tops.append(top)
        sums.append(total)
    out = join(outs, o.layout).to(query.dtype)
    stats = (statistics(t, o.layout, o.stats_layout) for t in (tops, sums))
    return (out, *stats, query.new_empty(0))


def _backward(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, o: Options, given: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    op = "npu_fusion_attention_grad"
    need_dtypes(op, query, key, value, dy, given["attention_in"])
    if query.device.type != "cpu":
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    tops, sums = (
        from_statistics(given[n], o.layout, o.stats_layout, o.ends)
        for n in ("softmax_max", "softmax_sum")
    )
    grads: list[list[Tensor]] = [[], [], []]
    outputs = (split(t, o.layout, o.heads, o.ends, 0) for t in (dy, given["attention_in"]))
    parts = zip(_problems(query, key, value, o), *outputs, tops, sums, strict=True)
    for (q, k, v, seen, pse), g, y, top, total in parts:
        scores, _ = _scores(q, k, seen, pse, o)
        probs = torch.exp(scores - top) / total
        delta = (g * y).sum(-1, keepdim=True)
        dscores = probs * (g @ _repeat(v, q).transpose(-1, -2) - delta)
        grads[0].append(dscores @ _repeat(k, q) * o.scale)
        grads[1].append(_sum_groups(dscores.transpose(-1, -2) @ q, k) * o.scale)
        grads[2].append(_sum_groups(probs.transpose(-1, -2) @ g, v))
    dq, dk, dv = (join(g, o.layout).to(query.dtype) for g in grads)
    return dq, dk, dv


def _problems(query: Tensor, key: Tensor, value: Tensor, o: Options) -> list[tuple[Any, ...]]:
    """Return (q, k, v [B, N, S, D] fp32, what may be attended to, position term) by sequence."""
    op = "npu_fusion_attention"
    groups = o.heads
    if o.layout in ("BSH", "SBH"):
        groups = key.shape[-1] * o.heads // query.shape[-1]
    qs = split(query, o.layout, o.heads, o.ends, 0)
    ks, vs = (split(t, o.layout, groups, o.ends, 1) for t in (key, value))
    need(op, qs[0].shape[1] == o.heads, "head_num heads of the query")
    d, dv = qs[0].shape[-1], vs[0].shape[-1]
    need(op, ks[0].shape[-1] == d >= dv and d <= 768, "Dq = Dk >= Dv, at most 768")
    need(op, qs[0].shape[1] % ks[0].shape[1] == 0, "query heads a multiple of key heads")
    need(op, 0 not in (query.numel(), key.numel(), value.numel()), "tensors that are not empty")
    problems = []
    for i, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True)):
        need(op, o.layout != "TND" or not q.shape[2] or k.shape[2] > 0, "keys for every query")
        seen = allowed(o.sparse, q, k, i, len(qs), o.layout == "TND")
        if o.layout == "TND" and seen is not None:
            need(op, bool(seen.any(-1).all()), "no query without a key in a pack")
        problems.append((q, k, v, seen, _position(q, k, o)))
    return problems


def _position(q: Tensor, k: Tensor, o: Options) -> Tensor | None:
    """Return what is added to the scaled scores."""
    if o.pse is None:
        return None
    op, (rows, keys) = "npu_fusion_attention pse", (q.shape[2], k.shape[2])
    if o.pse_type in (0, 1):
        b, n = q.shape[:2]
        shapes = ((b, n, rows, keys), (b, n, 1, keys), (1, n, rows, keys))
        need(op, tuple(o.pse.shape) in shapes, "BNSS, BN1S or 1NSS")
        return o.pse.float() * (o.scale if o.pse_type == 1 else 1.0)
    need(op, o.pse.dtype is torch.float32 and rows == keys, "fp32 slopes, as many keys as queries")
    shift = o.starts[1] - o.starts[0]
    distance = (torch.arange(keys) - torch.arange(rows).unsqueeze(1) + shift).abs().float()
    distance = distance.sqrt() if o.pse_type == 3 else distance
    return -o.pse.view(-1, q.shape[1], 1, 1) * distance


def _scores(
    q: Tensor, k: Tensor, seen: Tensor | None, pse: Tensor | None, o: Options
) -> tuple[Tensor, Tensor]:
    """Return the scores and which rows have none."""
    scores = (q @ _repeat(k, q).transpose(-1, -2)) * o.scale
    if pse is not None:
        scores = scores + pse
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return scores, (scores == -math.inf).all(-1, keepdim=True)


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    batch, heads, rows, channels = grad.shape
    return grad.view(batch, like.shape[1], heads // like.shape[1], rows, channels).sum(2)


KERNELS = {
    "npu::npu_fusion_attention": forward_v1,
    "npu::npu_fusion_attention_grad": backward_v1,
    "npu::npu_fusion_attention_v2": forward_v2,
    "npu::npu_fusion_attention_grad_v2": backward_v2,
    "npu::npu_fusion_attention_v3": forward_v3,
    "npu::npu_fusion_attention_grad_v3": backward_v1,
}
