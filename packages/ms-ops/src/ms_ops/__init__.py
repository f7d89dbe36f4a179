"""Fused transformer operators: one reference, several backends, one test body."""

from __future__ import annotations

from typing import Any

from . import comm
from .activation import bias_swiglu, swiglu, weighted_swiglu
from .attention import (
    alibi_bias,
    alibi_slopes,
    attention,
    attention_backward,
    attention_merge,
    causal_mask,
    sequence_starts,
)
from .dropout_norm import dropout_add_norm
from .flops import register_flop_formulas
from .masks import MaskSpec, from_sparse_mode
from .matmul import (
    ffn,
    grouped_matmul,
    grouped_matmul_add_,
    matmul_add_,
    quant_grouped_matmul,
    weight_quant_grouped_matmul,
)
from .moe import moe_permute, moe_permute_map, moe_unpermute, moe_unpermute_map
from .norm import rms_norm, rms_norm_with_rstd
from .opdef import OPERATORS
from .optim import FusedAdamW, FusedEmaAdamW, fused_adamw_, fused_ema_adamw_
from .registry import (
    Backend,
    BackendError,
    Facts,
    Kernel,
    backend,
    operators,
    register_backend,
    report,
    set_backend,
    unregister_backend,
    verdicts,
)
from .rope import rope, rope_freqs
from .softmax import scaled_masked_softmax

__version__ = "0.1.0"


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Return one line a backend with its verdict on a call, in the order they are asked.

    Args:
        op: an operator's name, see `operators()`.
        *args: the arguments of the call, as the operator takes them.
        **kwargs: likewise.

    Raises:
        ValueError: unknown operator, or arguments that the operator refuses.
    """
    if op not in OPERATORS:
        raise ValueError(f"explain: op: got {op!r}, need one of {', '.join(operators())}")
    definition = OPERATORS[op].definition
    facts = definition.facts(*definition.prepare(*args, **kwargs))
    lines = [
        f"{v.backend} (priority {v.priority}): {v.reason or 'can serve'}"
        for v in verdicts(op, facts)
    ]
    return "\n".join(lines)


__all__ = [
    "Backend",
    "BackendError",
    "Facts",
    "FusedAdamW",
    "FusedEmaAdamW",
    "Kernel",
    "MaskSpec",
    "alibi_bias",
    "alibi_slopes",
    "attention",
    "attention_backward",
    "attention_merge",
    "backend",
    "bias_swiglu",
    "causal_mask",
    "comm",
    "dropout_add_norm",
    "explain",
    "ffn",
    "from_sparse_mode",
    "fused_adamw_",
    "fused_ema_adamw_",
    "grouped_matmul",
    "grouped_matmul_add_",
    "matmul_add_",
    "moe_permute",
    "moe_permute_map",
    "moe_unpermute",
    "moe_unpermute_map",
    "operators",
    "quant_grouped_matmul",
    "register_backend",
    "register_flop_formulas",
    "report",
    "rms_norm",
    "rms_norm_with_rstd",
    "rope",
    "rope_freqs",
    "scaled_masked_softmax",
    "sequence_starts",
    "set_backend",
    "swiglu",
    "unregister_backend",
    "verdicts",
    "weight_quant_grouped_matmul",
    "weighted_swiglu",
]
