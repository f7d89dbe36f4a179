"""`npu_dropout_add_layer_norm`: dropout, sum with the residual and layer norm in one."""

from __future__ import annotations

from torch import Tensor

import ms_ops


def npu_dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Return out, or (out, sum, mask) as far as asked for, see `ms_ops.dropout_add_norm`.

    Args:
        x0: [..., H].
        residual: [..., H] or None.
        weight: [H].
        bias: [H] or None.
        dropout_p: probability to drop.
        epsilon: added to the variance.
        rowscale: [...], one factor a row of x0.
        layerscale: [H], one factor a column.
        prenorm: return the sum before the norm.
        residual_in_fp32: without a residual, that sum is fp32.
        return_dropout_mask: return bool [..., H], True where kept (all True without dropout).
    """
    return ms_ops.dropout_add_norm(
        x0,
        residual,
        weight,
        bias,
        p=dropout_p,
        eps=epsilon,
        norm="layer",
        row_scale=rowscale,
        layer_scale=layerscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        return_mask=return_dropout_mask,
    )
