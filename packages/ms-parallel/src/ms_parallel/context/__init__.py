"""Attention over a sequence that several processes hold.

A plan (`plan_attention`) says what every process computes and sends; `context_attention` runs it,
`simulate_attention` runs all its processes in one.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> module that defines it; imported on first use.
_PUBLIC: dict[str, str] = {
    "Advice": "advice",
    "AttnMask": "mask",
    "AttnPlan": "plan",
    "CPTopology": "topology",
    "CommCost": "cost",
    "ContextAttention": "attention",
    "DenseMask": "mask",
    "DistributedAttention": "hosts",
    "Estimate": "timing",
    "HeadPlan": "heads",
    "Ledger": "trace",
    "Link": "timing",
    "Machine": "timing",
    "PlanError": "proof",
    "SeqLayout": "layout",
    "Simulation": "simulate",
    "advise": "advice",
    "check_trace": "trace",
    "context_attention": "attention",
    "documents_from_positions": "documents",
    "documents_from_tokens": "documents",
    "estimate": "timing",
    "head_to_seq": "exchange",
    "kv_head_plan": "heads",
    "optimize_layout": "adaptive",
    "plan_attention": "build",
    "plan_dict": "show",
    "plan_digests": "show",
    "plan_svg": "picture",
    "plan_table": "show",
    "seq_to_head": "exchange",
    "shard_batch": "documents",
    "simulate_attention": "simulate",
    "transformers_attention": "hosts",
    "verify": "proof",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
