"""The checks of `dropout_add_norm`, and what a call becomes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_float, check_same_dtype, check_tensor, fail
from ..device import LOW_PRECISION, common_device

OP = "dropout_add_norm"
NORMS = ("layer", "rms")


def prepare(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    p: float,
    eps: float,
    norm: str = "layer",
    row_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_mask: bool = False,
    training: bool = True,
    dropout_rng: Tensor | None = None,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_tensor(OP, "x", x)
    check_float(OP, "x", x)
    if x.dim() < 1:
        fail(ValueError, OP, "x", "0 dimensions", "1 or more")
    check_choice(OP, "norm", norm, NORMS)
    if not 0 <= p <= 1:
        fail(ValueError, OP, "p", p, "0 to 1")
    if eps < 0:
        fail(ValueError, OP, "eps", eps, "0 or more")
    _check_residual(x, residual)
    _check_weights(x, weight, bias, norm)
    _check_scales(x, row_scale, layer_scale)
    p = float(p) if training else 0.0
    rng = _rng(p, dropout_rng, x)
    common_device(OP, x, residual, weight, bias, row_scale, layer_scale, rng)
    tensors = (x, residual, weight, bias, row_scale, layer_scale, rng)
    return *tensors, p, float(eps), norm, bool(prenorm), bool(residual_in_fp32), bool(return_mask)


def _wide(x: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that may stand beside x: its own, and fp32 with 16 bits."""
    return (x.dtype, torch.float32) if x.dtype in LOW_PRECISION else (x.dtype,)


def _check_shape(argument: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        fail(ValueError, OP, argument, tuple(tensor.shape), f"{shape}, {meaning}")


def _check_residual(x: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    check_tensor(OP, "residual", residual)
    check_float(OP, "residual", residual, _wide(x))
    _check_shape("residual", residual, tuple(x.shape), "the shape of x")


def _check_weights(x: Tensor, weight: Tensor, bias: Tensor | None, norm: str) -> None:
    check_tensor(OP, "weight", weight)
    check_float(OP, "weight", weight, _wide(x))
    _check_shape("weight", weight, tuple(x.shape[-1:]), "the last dimension of x")
    if weight.numel() == 0:
        fail(ValueError, OP, "weight", tuple(weight.shape), "no empty dimension")
    if bias is None:
        return
    if norm == "rms":
        fail(ValueError, OP, "bias", "a tensor", "None with norm 'rms', which has no bias")
    check_tensor(OP, "bias", bias)
    check_same_dtype(OP, "bias", bias, "weight", weight)
    _check_shape("bias", bias, tuple(weight.shape), "the shape of weight")


def _check_scales(x: Tensor, row_scale: Tensor | None, layer_scale: Tensor | None) -> None:
    if row_scale is not None:
        check_tensor(OP, "row_scale", row_scale)
        check_same_dtype(OP, "row_scale", row_scale, "x", x)
        _check_shape("row_scale", row_scale, tuple(x.shape[:-1]), "one number a row of x")
    if layer_scale is not None:
        check_tensor(OP, "layer_scale", layer_scale)
        check_same_dtype(OP, "layer_scale", layer_scale, "x", x)
        _check_shape("layer_scale", layer_scale, tuple(x.shape[-1:]), "the last dimension of x")


def _rng(p: float, rng: Tensor | None, x: Tensor) -> Tensor | None:
    """Check seed and offset; draw them from torch's generator when dropout has none."""
    if rng is not None:
        check_tensor(OP, "dropout_rng", rng)
        if rng.dtype is not torch.int64 or tuple(rng.shape) != (2,):
            got = f"{rng.dtype} {tuple(rng.shape)}"
            fail(ValueError, OP, "dropout_rng", got, "torch.int64 (2,), seed and offset")
    if p == 0:
        return None
    if rng is None:
        return torch.randint(2**62, (2,), dtype=torch.int64, device=x.device)
    return rng
