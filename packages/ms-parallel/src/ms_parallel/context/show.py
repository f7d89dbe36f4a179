"""A plan for people: a table of its steps and its cost, and plain data for tools."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from .cost import plan_cost

if TYPE_CHECKING:
    from .mask import AttnMask
    from .plan import AttnPlan, Program, Step

MOST_NODES = 8


def plan_table(plan: AttnPlan, element_bytes: int = 2) -> str:
    """Return the plan as text: what it is, a line a step and direction, what it costs.

    A cell of the table says whose keys a node computes with, for how many pairs, and to whom it
    starts to send (`>`). Of more than 8 nodes the first are shown.

    Args:
        plan: the plan.
        element_bytes: bytes per element for the cost.
    """
    lines = [headline(plan)]
    for name in ("forward", "backward"):
        lines += ["", *_program_table(name, getattr(plan, name))]
    return "\n".join([*lines, "", *_cost_lines(plan, element_bytes)])


def headline(plan: AttnPlan) -> str:
    """Return what a plan is in one or two lines."""
    size, nodes, w = plan.layout.size, plan.nodes.size, plan.window
    ring = f" in windows of {w}" if w > 1 else ""
    lengths = plan.layout.lengths
    held = f"{min(lengths)}" if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    q, kv, (d, dv) = plan.heads.q_heads, plan.heads.kv_heads, plan.head_dims
    return (
        f"{plan.algorithm}: {size} processes, {nodes} nodes of {plan.ulysses}{ring}, "
        f"{mask_words(plan.mask)} mask\n"
        f"{plan.layout.total} tokens, {held} a process; {q} heads, {kv} of keys and values, "
        f"{d} + {dv} channels; keeps {plan.kv_keep}, sums of {plan.grad_bytes} bytes"
    )


def mask_words(mask: AttnMask) -> str:
    """Return what a mask is in a few words."""
    if mask.dense is not None:
        return "dense"
    if (mask.left, mask.right) == (None, None):
        kind = "full"
    elif (mask.left, mask.right) == (None, 0):
        kind = "causal"
    else:
        left, right = ("all" if b is None else b for b in (mask.left, mask.right))
        kind = f"window ({left}, {right})"
    if mask.documents:
        kind += f", {len(mask.documents) - 1} documents"
    return kind


def _program_table(name: str, program: Program) -> list[str]:
    shown = program.steps[:MOST_NODES]
    rows = [[name, *(f"node {n}" for n in range(len(shown)))]]
    for t in range(len(shown[0])):
        rows.append([str(t), *(_cell(n, s[t], program) for n, s in enumerate(shown))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    if program.gather:
        lines.append("keys and values are gathered before the step")
    return [line.rstrip() for line in lines]


def _cell(node: int, step: Step, program: Program) -> str:
    parts = []
    pairs: dict[tuple[int, int], int] = {}
    for block in step.blocks:
        key = block.q_owner, block.kv_owner
        pairs[key] = pairs.get(key, 0) + block.cells
    for (q, kv), cells in pairs.items():
        parts.append(f"k{kv}:{cells}" if q == node else f"q{q}k{kv}:{cells}")
    for index in step.post:
        transfer = program.transfers[index]
        if transfer.src == node:
            what = transfer.buffers[0].what
            parts.append(f">{transfer.dst}" + ("" if what == "kv" else f":{what}"))
    return " ".join(parts) or "-"


def _cost_lines(plan: AttnPlan, element_bytes: int) -> list[str]:
    cost = plan_cost(plan, element_bytes)
    lines = [f"a process and row of the batch, {element_bytes} bytes per element: mean (most)"]
    for words, name in (
        ("bytes sent forward", "forward_bytes"),
        ("bytes sent backward", "backward_bytes"),
        ("messages", "messages"),
        ("pairs attended to", "cells"),
    ):
        values = [getattr(c, name) for c in cost]
        mean = sum(values) / len(values)
        lines.append(f"{words:20} {mean:>14,.0f} ({max(values):,})")
    return [*lines, f"{'collectives':20} {cost[0].collectives:>14,}"]


def plan_dict(plan: AttnPlan) -> dict[str, Any]:
    """Return the plan as lists, strings and numbers. A matrix is given by its digest."""
    out: dict[str, Any] = {
        name: getattr(plan, name)
        for name in ("algorithm", "ulysses", "window", "kv_keep", "grad_bytes")
    }
    out["head_dims"] = list(plan.head_dims)
    out["layout"], out["nodes"] = _plain(asdict(plan.layout)), _plain(asdict(plan.nodes))
    dense = plan.mask.dense
    out["mask"] = {
        "left": plan.mask.left,
        "right": plan.mask.right,
        "documents": list(plan.mask.documents),
        "dense": None if dense is None else dense.digest,
    }
    out["heads"] = _plain(asdict(plan.heads))
    out["forward"], out["backward"] = _plain(asdict(plan.forward)), _plain(asdict(plan.backward))
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def plan_digests(plan: AttnPlan) -> dict[str, str]:
    """Return a digest of every field, the same in all processes: which field differs, if any."""
    return {
        f.name: hashlib.sha256(repr(getattr(plan, f.name)).encode()).hexdigest()
        for f in fields(plan)
    }
