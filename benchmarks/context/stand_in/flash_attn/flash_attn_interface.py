"""What context-parallel libraries call of FlashAttention, with plain causal or full masks.

Tensors are [B, s, H, D] (lse [B, H, s]), with lengths [T, H, D] (lse [H, T]). Options that these
benchmarks never use are refused.
"""

from ms_ops import attention, attention_backward


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    _plain(q, k, causal, dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    out, lse = attention(q, k, v, scale=softmax_scale, causal=causal, return_lse=True)
    return out, lse, None, None


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
):
    _plain(q, k, causal, dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    lse = softmax_lse.contiguous()
    grads = attention_backward(dout, q, k, v, out, lse, scale=softmax_scale, causal=causal)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    _plain(q, k, causal, dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    packed = _packed(cu_seqlens_q, cu_seqlens_k)
    out, lse = attention(q, k, v, scale=softmax_scale, causal=causal, return_lse=True, **packed)
    return out, lse.transpose(0, 1).contiguous(), None, None


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
):
    _plain(q, k, causal, dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    lse = softmax_lse.transpose(0, 1).contiguous()
    packed = _packed(cu_seqlens_q, cu_seqlens_k)
    grads = attention_backward(
        dout, q, k, v, out, lse, scale=softmax_scale, causal=causal, **packed
    )
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **options):
    """Attention with autograd, [B, s, H, D]."""
    options = {name: value for name, value in options.items() if name not in QUIET}
    return attention(q, k, v, scale=softmax_scale, causal=causal, dropout_p=dropout_p, **options)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *_, causal=False, **options):
    """Attention inside documents, [T, H, D]."""
    options = {name: value for name, value in options.items() if name not in QUIET}
    return attention(q, k, v, causal=causal, **_packed(cu_seqlens_q, cu_seqlens_k), **options)


QUIET = ("window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs")


def _packed(cu_seqlens_q, cu_seqlens_k):
    return {"layout": "thd", "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}


def _plain(q, k, causal, dropout_p, window, softcap, alibi_slopes):
    if dropout_p or softcap or alibi_slopes is not None or window not in ((-1, -1), (-1, 0)):
        raise NotImplementedError("stand-in of flash_attn: causal or full masks, nothing else")
    if causal and q.shape[-3] != k.shape[-3]:
        raise NotImplementedError("stand-in of flash_attn: a causal tile that is not square")
