"""Run context plans with all ranks in this process and compare with attention in one piece."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from ms_ops.attention import attention
from ms_parallel.context.build import plan_attention
from ms_parallel.context.simulate import Simulation, simulate_attention
from ms_parallel.context.trace import check_trace


@dataclass
class Case:
    """Whole tensors of an attention, and its options.

    Attributes:
        plan: for as many ranks as it likes.
        batch: rows of the batch.
        dtype: of the tensors.
        options: further arguments of `context_attention`.
    """

    plan: Any
    batch: int = 1
    dtype: torch.dtype = torch.float64
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        heads, (d, dv) = self.plan.heads, self.plan.head_dims
        rows = (self.batch, self.plan.layout.total)
        shapes = ((heads.q_heads, d), (heads.kv_heads, d), (heads.kv_heads, dv))
        drawn = [torch.randn(*rows, *s, generator=generator).to(self.dtype) for s in shapes]
        self.q, self.k, self.v = drawn
        dout = torch.randn(*rows, heads.q_heads, dv, generator=generator)
        self.dout = dout.to(self.dtype)

    def whole(self, dtype=None):
        """Return out, dq, dk, dv of attention in one piece, in fp64 or `dtype`."""
        dtype = torch.float64 if dtype is None else dtype
        leaves = [t.to(dtype).requires_grad_() for t in (self.q, self.k, self.v)]
        mask = self.plan.mask.matrix(self.plan.layout.total)
        out = attention(*leaves, mask=mask, **self.options)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout.to(dtype))]

    def shards(self, rank):
        """Return a rank's q, k and v, which require gradients."""
        layout = self.plan.layout
        parts = (layout.shard(t, rank, 1).clone() for t in (self.q, self.k, self.v))
        return [part.requires_grad_() for part in parts]

    def simulated(self, record=None):
        """Return the same from all ranks of the plan, put together."""
        layout = self.plan.layout
        ranks = range(layout.size)
        q, k, v = ([self.shards(r)[i] for r in ranks] for i in range(3))
        outs = simulate_attention(q, k, v, self.plan, record=record, **self.options)
        douts = [layout.shard(self.dout, r, 1) for r in ranks]
        grads = torch.autograd.grad(outs, [*q, *k, *v], douts)
        size = layout.size
        parts = (outs, *(grads[i * size : (i + 1) * size] for i in range(3)))
        return [layout.unshard([t.detach() for t in part], 1) for part in parts]


def random_options(seed, heads):
    """Return options of `context_attention`: biases and dropout by position, or none."""
    rng = random.Random(seed)
    options = {}
    if rng.random() < 0.2:
        options["alibi_slopes"] = torch.linspace(0.1, 0.9, heads)
        options["alibi_sqrt"] = rng.random() < 0.5
    if rng.random() < 0.1:
        options |= {"dropout_p": 0.3, "dropout_rng": torch.tensor([seed + 1, 7])}
        options["head_start"] = rng.choice((0, 3))
    if rng.random() < 0.2:
        options["scale"] = 0.2
    return options


def error(found, expected):
    """Return the largest difference."""
    pairs = zip(found, expected, strict=True)
    return max((float((a - b).detach().abs().max()) for a, b in pairs if a.numel()), default=0.0)


def check_case(case, tolerance=1e-10):
    """Assert that values, bytes, messages and the order of events are what they should be."""
    record = Simulation()
    found = case.simulated(record)
    wrong = error(found, case.whole())
    assert wrong < tolerance, f"error {wrong:.2e}"
    for logs in (record.forward_logs, record.backward_logs):
        check_trace(logs)
        check_trace(logs, "dual_group", case.plan.ulysses)
    check_ledgers(case, record.forward, record.backward)


def check_ledgers(case, forward, backward):
    """Assert that ranks have sent what the plan says, to the byte."""
    for rank, cost in enumerate(case.plan.cost(case.dtype.itemsize, case.batch)):
        sent, back = forward[rank], backward[rank]
        measured = (sent.bytes, back.bytes, sent.messages, back.messages)
        planned = (
            cost.forward_bytes, cost.backward_bytes, cost.forward_messages, cost.backward_messages
        )  # fmt: skip
        assert measured == planned, f"rank {rank}"
        assert sent.collectives + back.collectives == cost.collectives, f"rank {rank}"


def make_plan(layout, mask, heads=(4, 2), head_dims=(8, 8), grad_bytes=8, **options):
    """Return a plan for fp64."""
    return plan_attention(
        layout, mask, heads=heads, head_dims=head_dims, grad_bytes=grad_bytes, **options
    )
