"""Calls of attention that ask torch_npu for each of its kernels and masks."""

from __future__ import annotations

import torch

import ms_ops
from ms_ops.testing import Sample, maker

NAMES = (
    "causal",
    "upper_left",
    "lower_right",
    "band",
    "upper_band",
    "prefix",
    "alibi",
    "alibi_behind",
    "alibi_sqrt",
    "unscaled_bias",
    "scaled_bias",
    "head_mask",
    "pack_without_keys",
    "pack_window",
    "pack_prefix",
    "pack_sink",
    "pack_spare",
)


def sample(name, dtype=torch.float32):
    """Return one of them by name."""
    make = maker(dtype, "cpu")

    def dense(rows=7, keys=7, heads=4):
        return make(2, rows, heads, 8), make(2, keys, 2, 8), make(2, keys, 2, 8)

    def pack(tokens=13, heads=4):
        return make(tokens, heads, 8), make(tokens, 2, 8), make(tokens, 2, 8)

    slopes = ms_ops.alibi_slopes(4)
    starts = {"layout": "thd", "cu_seqlens_q": torch.tensor([0, 4, 4, 13], dtype=torch.int32)}
    lower = {"causal": True, "window": (3, None)}
    prefix = ms_ops.MaskSpec(right=0, align="lower_right", prefix=(1, 2, 6))
    band = ms_ops.MaskSpec(left=2, right=1, align="lower_right")
    no_keys = {"cu_seqlens_k": torch.tensor([0, 0, 3, 13], dtype=torch.int32)}
    heads = make(1, 4, 7, 7, dtype=torch.float64) > -1
    heads[..., 0] = True
    calls = {
        "causal": (dense(), {"causal": True}),
        "upper_left": (dense(5, 9), {"causal": True, "causal_align": "upper_left"}),
        "lower_right": (dense(5, 9), {"causal": True}),
        "band": (dense(5, 9), {"mask": band}),
        "upper_band": (dense(5, 9), {"window": (2, 1), "causal_align": "upper_left"}),
        "prefix": (dense(5, 9), {"mask": ms_ops.MaskSpec(prefix=(1, 7), **vars_of(prefix))}),
        "alibi": (dense(), {"alibi_slopes": slopes, "causal": True, "kv_start": 2}),
        "alibi_behind": (dense(), {"alibi_slopes": slopes, "q_start": 3}),
        "alibi_sqrt": (dense(), {"alibi_slopes": slopes.expand(2, 4), "alibi_sqrt": True}),
        "unscaled_bias": (dense(), {"bias": make(7, 7)}),
        "scaled_bias": (dense(), {"bias": make(7, 7), "bias_scaled": True}),
        "head_mask": (dense(), {"mask": heads}),
        "pack_without_keys": (pack(), {**starts, **no_keys}),
        "pack_window": (pack(), {**starts, **lower}),
        "pack_prefix": (pack(), {**starts, "mask": prefix}),
        "pack_sink": (pack(), {**starts, "causal": True, "sink": make(4)}),
        "pack_spare": (pack(16), {**starts, "causal": True}),
    }
    args, kwargs = calls[name]
    return Sample(name, args, {"return_lse": True, **kwargs}, (0, 1, 2))


def vars_of(spec):
    """Return the parts of a mask that another one shares."""
    return {"right": spec.right, "align": spec.align}


def all_samples(dtype):
    """Every sample, as the shared cases yield theirs."""
    return [sample(name, dtype) for name in NAMES]
