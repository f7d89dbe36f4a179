"""Scaled dot-product attention.

s = scale * q k^T + bias - slope |j - i|, -inf where a query may not attend
lse = logsumexp of a row of s (natural logarithm), the sink included
p = exp(s - lse)            out = (p * keep / (1 - dropout_p)) v
delta = sum(dout * out),    dp = (dout v^T) * keep / (1 - dropout_p),    ds = p * (dp - delta)
dq = scale * ds k,          dk = scale * ds^T q,    dv = (p * keep / (1 - dropout_p))^T dout
dk and dv summed over a head group, dbias = ds, dsink = - sum(exp(sink - lse) * delta)
a row with no key to attend to: out = 0, lse = -inf, gradients 0
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..masks import Align, MaskSpec
from ..opdef import OpDef, define_op
from . import autograd
from .alibi import alibi_bias, alibi_slopes
from .arguments import Layout, Window, prepare
from .call import SCHEMA, Call
from .flops import backward_flops, forward_flops
from .layout import causal_mask
from .merge import attention_merge
from .starts import sequence_starts


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = ...,
    causal: bool = ...,
    causal_align: Align = ...,
    window: Window | None = ...,
    mask: Tensor | MaskSpec | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    scale: float | None = ...,
    bias: Tensor | None = ...,
    bias_scaled: bool = ...,
    sink: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    alibi_sqrt: bool = ...,
    dropout_p: float = ...,
    dropout_rng: Tensor | None = ...,
    q_start: int = ...,
    kv_start: int = ...,
    head_start: int = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = ...,
    causal: bool = ...,
    causal_align: Align = ...,
    window: Window | None = ...,
    mask: Tensor | MaskSpec | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    scale: float | None = ...,
    bias: Tensor | None = ...,
    bias_scaled: bool = ...,
    sink: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    alibi_sqrt: bool = ...,
    dropout_p: float = ...,
    dropout_rng: Tensor | None = ...,
    q_start: int = ...,
    kv_start: int = ...,
    head_start: int = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = "bshd",
    causal: bool = False,
    causal_align: Align = "lower_right",
    window: Window | None = None,
    mask: Tensor | MaskSpec | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    bias_scaled: bool = False,
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    head_start: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend, with every mask, bias and layout that training uses.

    Args:
        q: queries in `layout`: [B, Sq, H, D], [Sq, B, H, D], [B, H, Sq, D], or packed
            [Tq, H, D]; fp16, bf16, fp32 or fp64, any strides.
        k: keys, same layout, with Hk heads; Hk divides H.
        v: values, same layout, with Hk heads of Dv channels; Dv may differ from D.
        layout: "bshd", "sbhd", "bhsd" or "thd".
        causal: a query attends to no key after it.
        causal_align: how triangle and window lie when Sq != Sk: "lower_right" aligns the last
            query with the last key (decoding with a cache), "upper_left" the first with the first.
        window: (left, right), how many keys before and after its own a query sees; None: all.
        mask: a `MaskSpec`; or bool, broadcasts to [B, H, Sq, Sk], True where a query may attend
            (as in torch.nn.functional.scaled_dot_product_attention), combined with `causal` and
            `window` by "and". Packed sequences take a `MaskSpec` only.
        cu_seqlens_q: int32 or int64 [N + 1], layout "thd": token at which each of N sequences
            starts, from 0, and the one after the last. Tokens beyond it give zeros.
        cu_seqlens_k: likewise of the keys; those of the queries when None.
        scale: factor of q k^T, 1/sqrt(D) when None.
        bias: added to the scaled scores, broadcasts to [B, H, Sq, Sk]; has a gradient. Not for
            packed sequences.
        bias_scaled: multiply the bias by `scale` too.
        sink: [H], the score of a key without a value that every query also sees: its weight is
            lost. Has a gradient.
        alibi_slopes: fp32 [H] or [B, H], constant: subtract slope * |j + kv_start - i - q_start|,
            i and j counted within the sequence.
        alibi_sqrt: subtract slope times the square root of that distance.
        dropout_p: probability to drop a weight (training only: the caller decides).
        dropout_rng: int64 [2], seed and offset: the same pair drops the same weights, whatever
            block of the score matrix a call sees. Drawn from torch's generator when None.
        q_start: position of the first query in a longer sequence, for ALiBi, dropout, and masks
            aligned to the upper left; a `MaskSpec` brings its own.
        kv_start: position of the first key likewise.
        head_start: number of the first head among all heads, for dropout.
        return_lse: return the log-sum-exp of the scores too.

    Returns:
        out like q with Dv channels, contiguous; with `return_lse` (out, lse), lse fp32 (fp64 for
        fp64) [B, H, Sq] or packed [Tq, H]; both have gradients. Backward saves q, k, v, out, lse
        and the tensors given.

    Raises:
        TypeError: an argument that is no tensor, dtypes that differ, a mask that is not bool.
        ValueError: unknown layout or alignment, shapes that do not match, options that exclude
            each other.
        RuntimeError: tensors on different devices.
    """
    args = prepare(
        q,
        k,
        v,
        layout=layout,
        causal=causal,
        causal_align=causal_align,
        window=window,
        mask=mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        bias=bias,
        bias_scaled=bias_scaled,
        sink=sink,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        dropout_p=dropout_p,
        dropout_rng=dropout_rng,
        q_start=q_start,
        kv_start=kv_start,
        head_start=head_start,
    )
    out, lse = OPERATOR(*args)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    bias_grad: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return (dq, dk, dv) for an output and log-sum-exp that come from outside.

    For algorithms that see only some of the keys at a time: `out` and `lse` are those over all
    keys, and the gradients of the parts add up.

    Args:
        dout: gradient of the output, like `out`.
        q: as in `attention`.
        k: some of the keys.
        v: their values.
        out: the output over all keys.
        lse: its log-sum-exp.
        bias_grad: return the gradient of the bias as the fourth.
        **options: as in `attention`. With dropout, `dropout_rng` is needed. The gradient of a sink
            is no sum over parts and is not returned.

    Raises:
        ValueError: `bias_grad` without a bias, dropout without its seed and offset, and all that
            `attention` raises.
    """
    if bias_grad and options.get("bias") is None:
        raise ValueError("attention: bias_grad: got True without a bias, need a bias or False")
    if options.get("dropout_p") and options.get("dropout_rng") is None:
        raise ValueError("attention: dropout_rng: got None, need the seed and offset of forward")
    args = prepare(q, k, v, **options)
    call = Call(*args[3:])._replace(sink=None)  # The sink is in the log-sum-exp.
    grads = OPERATOR.backward(dout, *args[:3], out, lse, *call, bias_grad, "")
    found: tuple[Tensor, ...] = grads[: 4 if bias_grad else 3]
    return found


OPERATOR = define_op(
    OpDef(
        name="attention",
        family=__name__,
        prepare=prepare,
        schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
        backward_schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        f" {SCHEMA}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        facts=autograd.facts,
        backward_facts=autograd.backward_facts,
        fake=autograd.fake,
        backward_fake=autograd.backward_fake,
        save=autograd.save,
        grad=autograd.grad,
        flops=forward_flops,
        backward_flops=backward_flops,
    )
)

__all__ = [
    "Align",
    "Layout",
    "MaskSpec",
    "alibi_bias",
    "alibi_slopes",
    "attention",
    "attention_backward",
    "attention_merge",
    "causal_mask",
    "sequence_starts",
]
