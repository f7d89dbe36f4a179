"""`npu_fusion_attention` and its gradient, version 2: position terms in the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import ms_ops
from ms_ops.attention.layout import sizes

from . import attention_arguments as arguments

UNBOUNDED = 2147483647


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Sequence[int] | None = None,
    kv_start_idx: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Attend, by the signature of MindSpeed 2.0, on any device.

    Args:
        query: in `input_layout`, which is BSH, SBH, BSND, BNSD or TND.
        key: likewise; may have fewer heads.
        value: likewise.
        head_num: heads of the query.
        input_layout: the layout.
        pse: bias (`pse_type` 0 and 1) or ALiBi slopes, fp32 [heads] or [batch, heads] (2 and 3).
        padding_mask: must be None.
        atten_mask: bool or uint8, 1 where a key is left out; the compressed [2048, 2048] for
            modes 2, 3, 4, 7, 8, and [3072, 2048] for mode 6. None is dense attention.
        scale: factor of the scores.
        keep_prob: 1 minus the dropout probability.
        pre_tokens: how many keys before its own a query sees, in modes 0, 4, 7 and 8.
        next_tokens: how many after it.
        inner_precise: not read: rows without any key always give zeros.
        prefix: for mode 6, how many first keys all queries of a sequence see.
        actual_seq_qlen: ends of the packed sequences (TND), without a leading 0.
        actual_seq_kvlen: likewise of the keys.
        sparse_mode: 0 to 8, see `ms_ops.from_sparse_mode`.
        gen_mask_parallel: not read: there is no mask to generate.
        sync: not read likewise.
        pse_type: 0 adds the bias to the scaled scores, 1 before scaling; 2 subtracts slope times
            distance, 3 its square root.
        q_start_idx: [position of the first query] for types 2 and 3.
        kv_start_idx: likewise of the first key.

    Returns:
        (out, softmax_max, softmax_sum, softmax_out, seed, offset, numels). The statistics are
        fp32 [batch, heads, queries, 8], for TND [tokens, heads, 8], and carry no gradients; the
        pair is (log-sum-exp, 1), one of those with max + log(sum) = log-sum-exp. `softmax_out` is
        empty.

    Raises:
        TypeError: a wrong dtype.
        ValueError: arguments that do not fit together.
    """
    del inner_precise, gen_mask_parallel, sync
    arguments.check(query, head_num, input_layout, keep_prob, padding_mask)
    q, k, v = arguments.tensors(query, key, value, head_num, input_layout)
    options = arguments.options(
        q,
        k,
        input_layout,
        pse=pse,
        pse_type=pse_type,
        atten_mask=atten_mask,
        scale=scale,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        prefix=prefix,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
        sparse_mode=sparse_mode,
        q_start_idx=q_start_idx,
        kv_start_idx=kv_start_idx,
    )
    seed = int(torch.randint(0, 2**31, (1,))) if keep_prob < 1 else 0
    options |= _dropout(keep_prob, seed, 0, q.device)
    out, lse = ms_ops.attention(q, k, v, return_lse=True, **options)
    out = out.flatten(-2) if input_layout in ("BSH", "SBH") else out
    lse = lse.detach().float().unsqueeze(-1).expand(*lse.shape, arguments.STATS).contiguous()
    keys = sizes(k, options["layout"])[2]
    numels = lse[..., 0].numel() * keys if seed else 0
    return out, lse, torch.ones_like(lse), out.new_empty(0), seed, 0, numels


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_outputs: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    inner_precise: int = 0,
    seed: int = 1234,
    offset: int = 0,
    numels: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Sequence[int] | None = None,
    kv_start_idx: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dpse) from what `npu_fusion_attention` has returned.

    Args as there, and the output's gradient, the statistics, the output (`attention_in`), seed and
    offset. dpse is None without a bias: slopes have no gradient.

    Raises:
        TypeError: a wrong dtype, or statistics or output left out.
        ValueError: arguments that do not fit together.
    """
    del inner_precise, gen_mask_parallel, sync, softmax_in, numels
    arguments.check(query, head_num, input_layout, keep_prob, padding_mask)
    if softmax_max is None or softmax_sum is None or attention_in is None:
        raise TypeError(
            "npu_fusion_attention_grad: softmax_max, softmax_sum, attention_in: got None, need"
            " what npu_fusion_attention returned"
        )
    q, k, v = arguments.tensors(query, key, value, head_num, input_layout)
    options = arguments.options(
        q,
        k,
        input_layout,
        pse=pse,
        pse_type=pse_type,
        atten_mask=atten_mask,
        scale=scale,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        prefix=prefix,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
        sparse_mode=sparse_mode,
        q_start_idx=q_start_idx,
        kv_start_idx=kv_start_idx,
    )
    options |= _dropout(keep_prob, seed, offset, q.device)
    dy, y = (arguments.heads_apart(t, head_num, input_layout) for t in (grad_outputs, attention_in))
    lse = softmax_max[..., 0] + softmax_sum[..., 0].log()
    lse = lse.double() if q.dtype is torch.float64 else lse
    bias_grad = "bias" in options
    grads = ms_ops.attention_backward(dy, q, k, v, y, lse, bias_grad=bias_grad, **options)
    shaped = [g.reshape(t.shape) for g, t in zip(grads[:3], (query, key, value), strict=True)]
    return shaped[0], shaped[1], shaped[2], grads[3] if bias_grad else None


def _dropout(
    keep_prob: float, seed: int, offset: int, device: torch.device
) -> dict[str, float | Tensor]:
    if keep_prob == 1.0:
        return {}
    rng = torch.tensor([seed, offset], dtype=torch.int64, device=device)
    return {"dropout_p": 1.0 - keep_prob, "dropout_rng": rng}
