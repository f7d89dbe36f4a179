"""Random context plans: the cases that planner and executor are both tested on."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import torch

from ms_parallel.context.build import divisors, plan_attention
from ms_parallel.context.heads import kv_head_plan
from ms_parallel.context.layout import SeqLayout
from ms_parallel.context.mask import AttnMask


def random_documents(rng, most=24):
    """Boundaries of a few documents; some are empty."""
    lengths = [rng.choice((0, 1, 2, rng.randint(3, most))) for _ in range(rng.randint(1, 5))]
    return tuple(accumulate(lengths, initial=0))


def random_mask(rng, documents):
    """Full, causal, windows, any of them with documents, or a matrix."""
    total = documents[-1]
    if rng.random() < 0.2:
        generator = torch.Generator().manual_seed(rng.randrange(10**6))
        matrix = torch.rand(total, total, generator=generator) < rng.choice((0.05, 0.5, 1.0))
        return AttnMask.from_matrix(matrix.tril() if rng.random() < 0.5 else matrix)
    left, right = rng.choice(((None, None), (None, 0), (None, 0), (5, 0), (2, 3), (None, 2)))
    return AttnMask(left, right, documents if rng.random() < 0.6 else ())


def random_layout(rng, documents, size):
    """Every layout there is, and uneven contiguous ones with ranks that hold nothing."""
    total = documents[-1]
    kind = rng.choice(("contiguous", "zigzag", "zigzag_docs", "uneven"))
    if kind == "zigzag_docs":
        return SeqLayout.zigzag_docs(documents, size)
    if kind == "uneven":
        ends = [0, *sorted(rng.randint(0, total) for _ in range(size - 1)), total]
        order = list(pairwise(ends))
        rng.shuffle(order)
        return SeqLayout.from_segments([[part] for part in order])
    return getattr(SeqLayout, kind)(total, size)


def random_arguments(seed):
    """Return the arguments of `plan_attention` for a case of its own.

    Sizes are small; every combination of algorithm, U, w, heads, mask, layout and policy is as
    likely as the conflict rules let it be.
    """
    rng = random.Random(seed)
    nodes, ulysses = rng.choice((1, 2, 2, 3, 4, 4, 6, 8)), rng.choice((1, 1, 2, 3, 4))
    documents = random_documents(rng)
    layout = random_layout(rng, documents, nodes * ulysses)
    algorithm = "usp" if nodes > 1 < ulysses else "ulysses" if ulysses > 1 else "ring"
    if nodes > 1 and rng.random() < 0.4:
        algorithm = rng.choice(("allgather_kv", "tasks", "tasks"))
    ring = algorithm in ("ring", "usp")
    heads = rng.choice(((4, 4), (8, 2), (6, 3), (5, 1), (24, 6)))
    shared = nodes == 1 < ulysses and kv_head_plan(*heads, ulysses).shared
    keep = rng.choice(("last", "pre", "pre_k")) if shared else "last"
    return {
        "layout": layout,
        "mask": random_mask(rng, documents),
        "heads": heads,
        "head_dims": rng.choice(((4, 4), (6, 4))),
        "algorithm": algorithm,
        "ulysses": ulysses,
        "window": rng.choice(divisors(nodes)[:-1] or [1]) if ring else 1,
        "kv_keep": rng.choice(("last", "k", "kv")) if nodes > 1 else keep,
        "pruned": ring and rng.random() < 0.4,
        "budget": rng.choice((None, 2, 3, 9)) if algorithm == "tasks" else None,
        "grad_bytes": rng.choice((2, 4, 8)),
    }


def random_plan(seed):
    """Return the plan of a random case."""
    return plan_attention(**random_arguments(seed))


def counts(plan, program):
    """Return int [S, S]: how often a program computes each pair, from its blocks alone."""
    total = plan.layout.total
    out = torch.zeros(total, total, dtype=torch.int64)
    d = torch.arange(total) - torch.arange(total).unsqueeze(1)
    left = total if plan.mask.left is None else plan.mask.left
    right = total if plan.mask.right is None else plan.mask.right
    seen = {
        "full": torch.ones(total, total, dtype=torch.bool),
        "causal": d <= 0,
        "band": (d >= -left) & (d <= right),
        "dense": plan.mask.matrix(total),
    }
    for steps in program.steps:
        for block in (b for step in steps for b in step.blocks):
            rows = plan.nodes.local_index(block.q_owner)[block.q0 : block.q1].unsqueeze(1)
            keys = plan.nodes.local_index(block.kv_owner)[block.k0 : block.k1]
            out[rows, keys] += seen[block.kind][rows, keys].long()
    return out
