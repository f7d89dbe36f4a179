"""A rank's view of one attention: sizes, how scores are formed, which tokens lie where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ms_ops.checks import fail
from ms_ops.device import compute_dtype

from .heads import Interval
from .kernels import Scoring, expansion
from .lower import notes
from .pack import Move, Places
from .plan import AttnPlan
from .store import Shapes


@dataclass(frozen=True)
class Job:
    """A rank's view of one attention.

    Attributes:
        plan: the whole plan.
        rank: this process.
        shapes: of its tensors after the head exchange.
        scoring: how scores are formed.
        device: where everything is.
    """

    plan: AttnPlan
    rank: int
    shapes: Shapes
    scoring: Scoring
    device: torch.device

    @property
    def node(self) -> int:
        """The node of this rank."""
        return self.rank // self.plan.ulysses

    @property
    def place(self) -> int:
        """Its place in the node."""
        return self.rank % self.plan.ulysses

    @property
    def rows(self) -> int:
        """Tokens of the node."""
        return self.plan.nodes.length(self.node)

    @property
    def ranges(self) -> tuple[Sequence[Interval], Sequence[Interval], Sequence[Interval]]:
        """Head ranges of every place, of queries, keys and values."""
        return self.plan.heads.q, self.plan.heads.kv, self.plan.heads.kv

    @property
    def exchanged(self) -> bool:
        """Whether the node's tensors are others than the process's own."""
        own = self.plan.layout.shards[self.rank]
        return self.plan.ulysses > 1 or own != self.plan.nodes.shards[self.node]

    def places(self) -> Places:
        """Return where the tokens of the node's places stand in its order."""
        known, key = notes(self.plan), ("places", self.rank)
        if key not in known:
            known[key] = self._places()
        found: Places = known[key]
        return found

    def _places(self) -> Places:
        plan, first = self.plan, self.node * self.plan.ulysses
        whole = plan.nodes.segments(self.node)
        moves: list[tuple[Move, ...]] = []
        for rank in range(first, first + plan.ulysses):
            runs = []
            for row, start, stop in plan.layout.segments(rank):
                base = next(n - a for n, a, b in whole if a <= start and stop <= b)
                runs.append((base + start, row, stop - start))
            moves.append(tuple(runs))
        return Places(tuple(moves), self.place)


def make_job(
    plan: AttnPlan, rank: int, like: Tensor, batch: int, scoring: Scoring | None = None
) -> Job:
    """Return the job of a rank.

    Args:
        plan: the plan.
        rank: which process.
        like: a tensor with the dtype and on the device of the inputs.
        batch: B.
        scoring: for all query heads before the exchange; None where nothing is computed.
    """
    place = rank % plan.ulysses
    (q0, q1), (k0, k1) = plan.heads.q[place], plan.heads.kv[place]
    shapes = Shapes(
        batch, q1 - q0, k1 - k0, plan.head_dims, like.dtype, compute_dtype(like.dtype),
        _grad_dtype(plan, like.dtype),
    )  # fmt: skip
    if scoring is None:
        return Job(plan, rank, shapes, Scoring(1.0), like.device)
    own = replace(
        scoring,
        bounds=(plan.mask.left, plan.mask.right),
        slopes=None if scoring.slopes is None else scoring.slopes[q0:q1],
        head_start=scoring.head_start + q0,
        expand=_expansion(plan, place, like.device),
    )
    return Job(plan, rank, shapes, own, like.device)


def _expansion(plan: AttnPlan, place: int, device: torch.device) -> Tensor | None:
    known, key = notes(plan), ("expand", place, device)
    if key not in known:
        with torch.inference_mode(False):
            known[key] = expansion(plan.heads, place, device)
    found: Tensor | None = known[key]
    return found


def _grad_dtype(plan: AttnPlan, dtype: torch.dtype) -> torch.dtype:
    wide = compute_dtype(dtype)
    found = {dtype.itemsize: dtype, wide.itemsize: wide}.get(plan.grad_bytes)
    if found is None:
        need = f"{wide.itemsize} (or {dtype.itemsize}) bytes for {dtype}: plan_attention(grad_bytes"
        fail(ValueError, "context_attention", "plan", f"grad_bytes {plan.grad_bytes}", f"{need}=)")
    return found


__all__ = ["Job", "make_job"]
