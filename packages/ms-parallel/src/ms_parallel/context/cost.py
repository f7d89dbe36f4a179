"""What a plan computes and sends, in integers that a measurement must meet exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .heads import Interval

if TYPE_CHECKING:
    from .plan import AttnPlan, Program, Transfer


@dataclass(frozen=True)
class CommCost:
    """What one rank sends and computes in one attention.

    Attributes:
        forward_bytes: bytes it sends, its own part of a collective excluded.
        backward_bytes: likewise.
        forward_messages: messages it sends to single ranks.
        backward_messages: likewise.
        collectives: all-to-alls, all-gathers and reduce-scatters, forward and backward.
        cells: pairs of query and key it attends to, of one row of the batch and one head.
        forward_flops: of the matrix products with those pairs.
        backward_flops: likewise, the scores computed again.
    """

    forward_bytes: int
    backward_bytes: int
    forward_messages: int
    backward_messages: int
    collectives: int
    cells: int
    forward_flops: int
    backward_flops: int

    @property
    def messages(self) -> int:
        """Forward and backward."""
        return self.forward_messages + self.backward_messages

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops


def plan_cost(plan: AttnPlan, element_bytes: int, batch: int = 1) -> tuple[CommCost, ...]:
    """Return the cost of every rank.

    Args:
        plan: the plan.
        element_bytes: bytes per element of queries, keys, values and outputs.
        batch: rows of the batch; all share the plan.
    """
    return tuple(_rank(plan, rank, element_bytes, batch) for rank in range(plan.layout.size))


def transfer_bytes(
    plan: AttnPlan, transfer: Transfer, place: int, element_bytes: int, batch: int = 1
) -> int:
    """Return the bytes of a message between ranks that are at `place` in their nodes.

    Keys and values, and queries and outputs on their way to a helper, travel as they are; partial
    gradients and outputs, with their log-sum-exp, in `plan.grad_bytes`.
    """
    d, dv = plan.head_dims
    q, kv = _width(plan.heads.q[place]), _width(plan.heads.kv[place])
    sums = plan.grad_bytes
    stats = max(4, sums)
    channels = {"": d + dv, "k": d, "v": dv}[transfer.key]
    row = {
        "kv": kv * channels * element_bytes,
        "dkv": kv * (d + dv) * sums,
        "q": q * d * element_bytes,
        "o": q * (dv * sums + stats),
        "qo": q * ((d + 2 * dv) * element_bytes + stats),
        "dq": q * d * sums,
    }
    return batch * sum(row[b.what] * (b.stop - b.start) for b in transfer.buffers)


def state_bytes(plan: AttnPlan, rank: int, element_bytes: int, batch: int = 1) -> int:
    """Return the bytes of keys and values that a rank keeps from forward for backward."""
    node, place = divmod(rank, plan.ulysses)
    (d, dv), heads = plan.head_dims, _width(plan.heads.kv[place])
    if plan.kv_keep in ("pre", "pre_k"):
        own = plan.layout.length(rank) * plan.heads.kv_heads
        arrived = plan.nodes.length(node) * heads
        values = own if plan.kv_keep == "pre" else arrived
        return batch * (own * d + values * dv) * element_bytes
    keys = values = plan.nodes.length(node)
    if plan.forward.gather:
        keys = plan.nodes.total if plan.kv_keep in ("k", "kv") else keys
        values = plan.nodes.total if plan.kv_keep == "kv" else values
    for transfer in plan.forward.transfers:
        if transfer.dst == node and transfer.buffers[0].what == "kv":
            rows = sum(b.stop - b.start for b in transfer.buffers)
            keys, values = keys + rows, values + rows
    for step in plan.forward.steps[node]:
        gone = sum(b.stop - b.start for b in step.free if b.what == "kv")
        keys -= gone
        values -= gone + sum(b.stop - b.start for b in step.free_v)
    return batch * heads * (keys * d + values * dv) * element_bytes


def _width(interval: Interval) -> int:
    return interval[1] - interval[0]


def _rank(plan: AttnPlan, rank: int, element_bytes: int, batch: int) -> CommCost:
    node, place = divmod(rank, plan.ulysses)
    forward = [t for t in plan.forward.transfers if t.src == node]
    backward = [t for t in plan.backward.transfers if t.src == node]
    cells = node_cells(plan.forward, node)
    d, dv = plan.head_dims
    products = 2 * batch * cells * _width(plan.heads.q[place])
    exchange = exchange_bytes(plan, rank, element_bytes, batch)
    gather = gather_bytes(plan, rank, element_bytes, batch)
    sent = [
        [transfer_bytes(plan, t, place, element_bytes, batch) for t in transfers]
        for transfers in (forward, backward)
    ]
    again = plan.kv_keep != "kv"
    collectives = 4 * (plan.ulysses > 1) + (2 + again) * plan.forward.gather
    return CommCost(
        exchange[0] + gather[0] + sum(sent[0]),
        exchange[1] + gather[1] + sum(sent[1]),
        # A place without heads has nothing to send.
        sum(size > 0 for size in sent[0]),
        sum(size > 0 for size in sent[1]),
        collectives,
        cells,
        products * (d + dv),
        products * (3 * d + 2 * dv),
    )


def node_cells(program: Program, node: int) -> int:
    """Number of pairs that a node attends to, whoever's queries they are."""
    return sum(block.cells for step in program.steps[node] for block in step.blocks)


def exchange_bytes(
    plan: AttnPlan, rank: int, element_bytes: int, batch: int = 1
) -> tuple[int, int]:
    """Return what a rank sends in the head exchanges of forward and of backward.

    Forward: queries, keys and values from tokens to heads, outputs back. Backward: gradients of
    outputs, then of queries, keys and values back; once more those of keys and values that are kept
    as they were before (`kv_keep` "pre" both, "pre_k" keys). Gradients of keys and values travel
    like the input where every head is at one place, and as partial sums, in `grad_bytes`, where
    heads are shared.
    """
    node, place = divmod(rank, plan.ulysses)
    own, q, kv = plan.layout.length(rank), plan.heads.q[place], plan.heads.kv[place]
    others = plan.nodes.length(node) - own
    d, dv = plan.head_dims
    q_out = own * (plan.heads.q_heads - _width(q))
    kv_out = own * (sum(map(_width, plan.heads.kv)) - _width(kv)) * element_bytes
    q_back, kv_back = others * _width(q), others * _width(kv) * (d + dv)
    sums = plan.grad_bytes if plan.heads.shared else element_bytes
    forward = (q_out * d + q_back * dv) * element_bytes + kv_out * (d + dv)
    backward = (q_out * dv + q_back * d) * element_bytes + kv_back * sums
    again = {"pre": d + dv, "pre_k": d}.get(plan.kv_keep, 0)
    return batch * forward, batch * (backward + kv_out * again)


def gather_bytes(plan: AttnPlan, rank: int, element_bytes: int, batch: int = 1) -> tuple[int, int]:
    """Return what a rank sends to gather keys and values, and to scatter their gradients.

    It sends its node's keys and values of its heads to every other node; in backward once more
    what was not kept, and to every other node that one's gradients.
    """
    if not plan.forward.gather:
        return 0, 0
    node, place = divmod(rank, plan.ulysses)
    d, dv = plan.head_dims
    own = plan.nodes.length(node) * _width(plan.heads.kv[place]) * batch
    others = (plan.nodes.total - plan.nodes.length(node)) * _width(plan.heads.kv[place]) * batch
    copies = (plan.nodes.size - 1) * own * element_bytes
    again = {"last": d + dv, "k": dv}.get(plan.kv_keep, 0)
    return copies * (d + dv), copies * again + others * (d + dv) * plan.grad_bytes
