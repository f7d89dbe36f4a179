"""When a result is right: its error against the fp64 oracle, by tolerance class.

E1  elementwise and row-wise work, one rounding      E2  one rounding more
M   sums of many terms (matrix products, gradients summed over rows): at most twice the error of
    plain torch in the same dtype, and under a hard cap
MG  gradients of class M: the cap is twice as high, as the rounding of the saved output enters too
S   statistics kept in the compute dtype (rstd, log-sum-exp)
X   copies and integers: equal
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """Relative and absolute part of an elementwise bound."""

    rtol: float
    atol: float


E1 = {
    torch.bfloat16: Bound(4.0e-3, 1e-5),
    torch.float16: Bound(5.25e-4, 1e-6),
    torch.float32: Bound(1e-5, 1e-6),
    torch.float64: Bound(1e-12, 1e-12),
}
# Error allowed beyond that of plain torch, and at all, as a part of the largest reference value.
CAP = {
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}
STATISTICS = {
    torch.bfloat16: Bound(0.0, 1e-3),
    torch.float16: Bound(0.0, 1e-3),
    torch.float32: E1[torch.float32],
    torch.float64: E1[torch.float64],
}
UNIT = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


def max_error(got: Tensor, oracle: Tensor) -> float:
    """Return the largest absolute difference; equal infinities differ by 0, NaN by infinity."""
    wide = got.to(torch.float64)
    gap = torch.where(wide == oracle, 0.0, (wide - oracle).abs())
    return gap.nan_to_num(nan=float("inf")).max().item() if gap.numel() else 0.0


def roundings(got: Tensor, oracle: Tensor) -> float:
    """Return the error in units of one rounding of the largest reference value."""
    finite = oracle[oracle.isfinite()]
    top = finite.abs().max().item() if finite.numel() else 0.0
    return max_error(got, oracle) / (UNIT[got.dtype] * top) if top else 0.0


def assert_close(
    kind: str,
    name: str,
    got: Tensor,
    oracle: Tensor,
    plain: Tensor | None,
    inputs: torch.dtype,
) -> None:
    """Raise AssertionError, naming the tensor, unless `got` is within its class of `oracle`.

    Args:
        kind: "E1", "E2", "M", "MG", "S" or "X".
        name: what the tensor is, for the message.
        got: the result under test.
        oracle: the same in fp64.
        plain: plain torch's result in the dtype of `got`; needed for classes M and MG.
        inputs: the dtype of the call's inputs.
    """
    assert got.shape == oracle.shape, f"{name}: shape {got.shape}, need {oracle.shape}"
    if kind == "X":
        assert torch.equal(got.to(oracle.dtype), oracle), f"{name}: not equal"
        return
    if kind in ("M", "MG"):
        assert plain is not None, f"{name}: class {kind} needs plain torch's result"
        _assert_matmul(name, got, oracle, plain, CAP[got.dtype] * (2 if kind == "MG" else 1))
        return
    rtol, atol = STATISTICS[inputs] if kind == "S" else E1[got.dtype]
    rtol *= 2 if kind == "E2" else 1
    wide = got.to(torch.float64)
    near = (wide - oracle).abs() <= atol + rtol * oracle.abs()
    wrong = ~((wide == oracle) | (near & oracle.isfinite()))
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements outside class {kind} "
        f"(rtol {rtol:g}, atol {atol:g}), largest error {max_error(got, oracle):.3g}"
    )


def _assert_matmul(name: str, got: Tensor, oracle: Tensor, plain: Tensor, cap: float) -> None:
    if not oracle.numel():
        return
    # An error below E1's absolute part never counts: fp32 sums of few terms differ by their order.
    error, floor = max_error(got, oracle), E1[got.dtype].atol
    cap = cap * oracle.abs().max().item() + floor
    assert error <= cap, f"{name}: error {error:.3g} above the cap {cap:.3g}"
    if got.dtype is torch.float64:
        return  # The oracle and plain torch round like the result: their ratio says nothing.
    twice = 2 * max_error(plain, oracle) + floor
    assert error <= twice, f"{name}: error {error:.3g}, twice that of plain torch is {twice:.3g}"
