"""`npu_moe_token_unpermute`: the weighted sum of each token's rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import ms_ops
from mindspeed.ops.npu_moe_token_permute import refuse_padding


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """Return [T, H], see `ms_ops.moe_unpermute`.

    Args:
        permuted_tokens: [rows, H].
        sorted_indices: [T * k], the row of each choice.
        probs: [T, k], None for k = 1 and weight 1.
        padded_mode: must be False.
        restore_shape: read in padded mode only, so not read.
    """
    refuse_padding("npu_moe_token_unpermute", padded_mode)
    return ms_ops.moe_unpermute(permuted_tokens, sorted_indices, probs)
