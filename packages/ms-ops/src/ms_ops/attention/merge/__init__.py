"""Join attention over two disjoint sets of keys into attention over both.

L = log(exp(L1) + exp(L2))          out = out1 exp(L1 - L) + out2 exp(L2 - L)
a row that sees no key in either part: out = 0, L = -inf
with w1 = exp(L1 - L):  dout1 = w1 dout,   dL1 = w1 (sum(dout * (out1 - out)) + dL)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...checks import check_choice, check_float, check_tensor, fail
from ...device import common_device, compute_dtype
from ...opdef import OpDef, define_op
from ...registry import Facts
from ..layout import LAYOUTS, PACKED, lse_shape

OP = "attention_merge"


def attention_merge(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, layout: str = "bshd"
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of attention over the keys of both parts.

    An algorithm that adds part after part keeps the first output in fp32 (`out.float()`) and passes
    it as `out1` each time: the sum is then rounded once, at the end.

    Args:
        out1: output over some keys, in `layout`: [B, S, H, D], [S, B, H, D], [B, H, S, D], or
            packed [T, H, D]; fp16, bf16, fp32 or fp64.
        lse1: its log-sum-exp, fp32 (fp64 for fp64), [B, H, S] or packed [T, H].
        out2: output over other keys; its dtype may be lower than that of `out1`.
        lse2: its log-sum-exp.
        layout: "bshd", "sbhd", "bhsd" or "thd".

    Returns:
        out in the dtype of `out1`, computed in fp32 and rounded once, and lse. Both have
        gradients with respect to all four tensors.

    Raises:
        TypeError: no tensor, or a dtype that does not fit.
        ValueError: unknown layout, or shapes that do not match.
        RuntimeError: tensors on different devices.
    """
    out, lse = OPERATOR(*prepare(out1, lse1, out2, lse2, layout=layout))
    return out, lse


def prepare(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, layout: str = "bshd"
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    named = {"out1": out1, "lse1": lse1, "out2": out2, "lse2": lse2}
    for name, tensor in named.items():
        check_tensor(OP, name, tensor)
        check_float(OP, name, tensor)
    check_choice(OP, "layout", layout, (*LAYOUTS, PACKED))
    need = 3 if layout == PACKED else 4
    if out1.dim() != need:
        fail(ValueError, OP, "out1", f"{out1.dim()} dimensions", f"{need}")
    if out2.shape != out1.shape:
        fail(ValueError, OP, "out2", tuple(out2.shape), f"{tuple(out1.shape)}, that of out1")
    for name in ("lse1", "lse2"):
        _check_lse(name, named[name], out1, layout)
    if out2.dtype != out1.dtype and out1.dtype != compute_dtype(out2.dtype):
        fail(TypeError, OP, "out2", out2.dtype, f"{out1.dtype}, or 16 bits beside an fp32 out1")
    common_device(OP, *named.values())
    return out1, lse1, out2, lse2, layout


def _check_lse(name: str, lse: Tensor, out: Tensor, layout: str) -> None:
    shape, dtype = lse_shape(out, layout), compute_dtype(out.dtype)
    if lse.dtype != dtype:
        fail(TypeError, OP, name, lse.dtype, f"{dtype}")
    if tuple(lse.shape) != tuple(shape):
        fail(ValueError, OP, name, tuple(lse.shape), f"{tuple(shape)}, a number a query and head")


def _facts(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, layout: str) -> Facts:
    options = (("layout", layout), ("second", str(out2.dtype)))
    return Facts(out1.device.type, out1.dtype, options)


def _backward_facts(
    dout: Tensor, dlse: Tensor, out1: Tensor, lse1: Tensor, out2: Tensor, *rest: Any
) -> Facts:
    return _facts(out1, lse1, out2, rest[0], rest[-1])


def _fake(out1: Tensor, lse1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return out1.new_empty(out1.shape), lse1.new_empty(lse1.shape)


def _backward_fake(dout: Tensor, dlse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in rest[:4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.layout, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = OPERATOR.backward(dout, dlse, *ctx.saved_tensors, ctx.layout, ctx.backend)
    return (*grads, None, None)


OPERATOR = define_op(
    OpDef(
        name=OP,
        family=__name__,
        prepare=prepare,
        schema="(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2, str layout)"
        " -> (Tensor, Tensor)",
        backward_schema="(Tensor dout, Tensor dlse, Tensor out1, Tensor lse1, Tensor out2,"
        " Tensor lse2, Tensor out, Tensor lse, str layout) -> (Tensor, Tensor, Tensor, Tensor)",
        facts=_facts,
        backward_facts=_backward_facts,
        fake=_fake,
        backward_fake=_backward_fake,
        save=_save,
        grad=_grad,
        flops=None,
        backward_flops=None,
    )
)

__all__ = ["attention_merge"]
