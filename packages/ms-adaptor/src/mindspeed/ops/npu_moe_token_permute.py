"""`npu_moe_token_permute`: tokens in the order of their experts."""

from __future__ import annotations

from torch import Tensor

import ms_ops
from ms_ops.checks import fail


def npu_moe_token_permute(
    tokens: Tensor,
    indices: Tensor,
    num_out_tokens: int | None = None,
    padded_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (permuted tokens, row of each choice), see `ms_ops.moe_permute`.

    Args:
        tokens: [T, H].
        indices: [T, k] or [T], experts of each token.
        num_out_tokens: rows to keep; None or 0 for all.
        padded_mode: must be False; a fixed capacity is `ms_ops.moe_permute_map`.
    """
    refuse_padding("npu_moe_token_permute", padded_mode)
    return ms_ops.moe_permute(tokens, indices, num_out_tokens)


def refuse_padding(op: str, padded_mode: bool) -> None:
    """Raise ValueError in padded mode, which the index form does not have."""
    if padded_mode:
        need = "False; ms_ops.moe_permute_map(..., drop_and_pad=True) has a fixed capacity"
        fail(ValueError, op, "padded_mode", padded_mode, need)
