"""Scaled dot-product attention.

s = scale * q k^T, -inf where a query may not attend      out = softmax(s) v
lse = logsumexp of a row of s (natural logarithm)
delta = sum(dout * out), p = exp(s - lse), ds = p * (dout v^T - delta)
dq = scale * ds k,  dk = scale * ds^T q,  dv = p^T dout; dk and dv summed over a head group
a row with no key to attend to: out = 0, lse = -inf, gradients 0
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

from torch import Tensor

from ..checks import check_choice, check_float, check_same_dtype, check_tensor, fail
from ..device import autocast_dtype, common_device, compute_dtype
from ..opdef import OpDef, define_op
from ..registry import Facts
from .flops import backward_flops, forward_flops
from .layout import CAUSAL, LAYOUTS, causal_mask, sizes

Layout = Literal["bshd", "sbhd", "bhsd"]
Align = Literal["lower_right", "upper_left"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = ...,
    causal: bool = ...,
    causal_align: Align = ...,
    mask: Tensor | None = ...,
    scale: float | None = ...,
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
    mask: Tensor | None = ...,
    scale: float | None = ...,
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
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with dense or causal scores, grouped heads, and an optional boolean mask.

    Args:
        q: queries in `layout`: [B, Sq, H, D], [Sq, B, H, D] or [B, H, Sq, D]; fp16, bf16, fp32
            or fp64, any strides.
        k: keys, same layout, with Hk heads; Hk divides H.
        v: values, same layout, with Hk heads of Dv channels; Dv may differ from D.
        layout: "bshd", "sbhd" or "bhsd".
        causal: a query attends to no key after it.
        causal_align: how the triangle lies when Sq != Sk: "lower_right" aligns the last query
            with the last key (decoding with a cache), "upper_left" the first with the first.
        mask: bool, broadcasts to [B, H, Sq, Sk], True where a query may attend (as in
            torch.nn.functional.scaled_dot_product_attention). Combined with `causal` by "and".
        scale: factor of the scores, 1/sqrt(D) when None.
        return_lse: return the log-sum-exp of the scores too.

    Returns:
        out like q with Dv channels, contiguous; with `return_lse` (out, lse), lse fp32 (fp64 for
        fp64) [B, H, Sq], not differentiable. Backward saves q, k, v, out, lse and the mask.

    Raises:
        TypeError: an argument that is no tensor, dtypes that differ, a mask that is not bool.
        ValueError: unknown layout or alignment, shapes that do not match.
        RuntimeError: tensors on different devices.
    """
    args = prepare(
        q,
        k,
        v,
        layout=layout,
        causal=causal,
        causal_align=causal_align,
        mask=mask,
        scale=scale,
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
    layout: Layout = "bshd",
    causal: bool = False,
    causal_align: Align = "lower_right",
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) for an output and log-sum-exp that come from outside.

    For algorithms that see only some of the keys at a time: `out` and `lse` [B, H, Sq] are those
    over all keys, and the gradients of the parts add up.
    """
    q, k, v, mask, corner, factor, layout = prepare(
        q,
        k,
        v,
        layout=layout,
        causal=causal,
        causal_align=causal_align,
        mask=mask,
        scale=scale,
    )
    grads: tuple[Tensor, Tensor, Tensor] = OPERATOR.backward(
        dout, q, k, v, out, lse, mask, corner, factor, layout, ""
    )
    return grads


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bshd",
    causal: bool = False,
    causal_align: str = "lower_right",
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments, apply the autocast policy and return the custom op's arguments."""
    _check_tensors(q, k, v)
    cast = autocast_dtype(q.device.type)
    if cast is not None:
        q, k, v = (t.to(cast) for t in (q, k, v))
    check_same_dtype("attention", "k", k, "q", q)
    check_same_dtype("attention", "v", v, "q", q)
    check_choice("attention", "layout", layout, tuple(LAYOUTS))
    check_choice("attention", "causal_align", causal_align, CAUSAL[1:])
    _check_shapes(q, k, v, layout)
    if mask is not None:
        _check_mask(mask, q, k, layout)
    common_device("attention", q, k, v, mask)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return q, k, v, mask, causal_align if causal else "", factor, layout


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor("attention", argument, tensor)
        check_float("attention", argument, tensor)
        if tensor.dim() != 4:
            fail(ValueError, "attention", argument, f"{tensor.dim()} dimensions", "4")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    op = "attention"
    batch, heads, _, channels = sizes(q, layout)
    k_batch, groups, keys, k_channels = sizes(k, layout)
    if channels == 0:
        fail(ValueError, op, "q", tuple(q.shape), "at least one channel")
    if k_channels != channels:
        fail(ValueError, op, "k", f"{k_channels} channels", f"{channels}, those of q")
    if k_batch != batch:
        fail(ValueError, op, "k", f"batch {k_batch}", f"{batch}, that of q")
    if sizes(v, layout)[:3] != (batch, groups, keys):
        got, need = sizes(v, layout)[:3], (batch, groups, keys)
        fail(ValueError, op, "v", f"(batch, heads, sequence) {got}", f"{need}, those of k")
    if groups == 0 or heads % groups:
        fail(ValueError, op, "k", f"{groups} heads", f"a divisor of the {heads} heads of q")


def _check_mask(mask: Tensor, q: Tensor, k: Tensor, layout: str) -> None:
    check_tensor("attention", "mask", mask)
    if str(mask.dtype) != "torch.bool":
        fail(TypeError, "attention", "mask", mask.dtype, "torch.bool, True where a query attends")
    batch, heads, rows, _ = sizes(q, layout)
    full = (batch, heads, rows, sizes(k, layout)[2])
    tail = full[4 - mask.dim() :] if mask.dim() <= 4 else ()
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape, tail, strict=True)):
        need = f"a shape that broadcasts to (batch, heads, queries, keys) {full}"
        fail(ValueError, "attention", "mask", tuple(mask.shape), need)


def _facts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: str, scale: float, layout: str
) -> Facts:
    options = (("causal", causal), ("mask", mask is not None), ("layout", layout))
    return Facts(q.device.type, q.dtype, options)


def _backward_facts(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> Facts:
    return _facts(q, k, v, *rest)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = sizes(q, rest[-1])
    out = q.new_empty([*q.shape[:-1], v.shape[-1]])
    return out, q.new_empty((batch, heads, rows), dtype=compute_dtype(q.dtype))


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale, ctx.layout, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, mask)


def _grad(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, mask = ctx.saved_tensors
    grads = OPERATOR.backward(
        dout, q, k, v, out, lse, mask, ctx.causal, ctx.scale, ctx.layout, ctx.backend
    )
    return (*grads, None, None, None, None, None)


OPERATOR = define_op(
    OpDef(
        name="attention",
        family=__name__,
        prepare=prepare,
        schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, str causal, float scale, str layout)"
        " -> (Tensor, Tensor)",
        backward_schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        " Tensor? mask, str causal, float scale, str layout) -> (Tensor, Tensor, Tensor)",
        facts=_facts,
        backward_facts=_backward_facts,
        fake=_fake,
        backward_fake=_backward_fake,
        save=_save,
        grad=_grad,
        flops=forward_flops,
        backward_flops=backward_flops,
    )
)

__all__ = ["Align", "Layout", "attention", "attention_backward", "causal_mask"]
