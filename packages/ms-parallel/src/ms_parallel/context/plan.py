"""What every process computes and sends in a context-parallel attention: plain, immutable data.

P processes hold one sequence. They form R nodes of U consecutive ranks: rank c is place c % U of
node c // U. Inside a node the sequence is traded for heads (the head exchange), so that a process
then holds all tokens of its node, in the order of the sequence, for some of the heads. Between the
nodes keys and values move, piece by piece, as the node's program says; U = 1 is a plain ring,
R = 1 plain Ulysses. The programs of the U places of a node are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from .cost import CommCost, plan_cost
from .heads import HeadPlan
from .layout import SeqLayout
from .mask import AttnMask
from .show import plan_dict, plan_digests, plan_table

# "kv": keys and values; "dkv": the partial sums of their gradients;
# "q": queries for a node that works for another; "o": what it gives back (output and
# log-sum-exp); "dq": in backward, likewise: "qo" goes (queries, output, its gradient,
# log-sum-exp), "dq" comes back.
What = Literal["kv", "dkv", "q", "o", "qo", "dq"]
Kind = Literal["full", "causal", "band", "dense"]


@dataclass(frozen=True, order=True, slots=True)
class Buffer:
    """A named piece of data on a node: rows [start, stop) of what `owner` holds.

    Rows count tokens of the owner node in its local order.
    """

    what: What
    owner: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message between two nodes.

    Attributes:
        index: its number in the program of the whole plan; both ends name it by that.
        src: node that sends.
        dst: node that receives.
        buffers: what it carries, in this order.
        level: which link it is meant for: "inner" and "outer" of a two-level ring, else "ring".
        key: "" for K and V together, "k" or "v" for one of them (keep policies).
    """

    index: int
    src: int
    dst: int
    buffers: tuple[Buffer, ...]
    level: Literal["ring", "inner", "outer"] = "ring"
    key: Literal["", "k", "v"] = ""


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of the score matrix that one node computes in one step.

    Attributes:
        q_owner: node whose queries they are: the node itself, or the one it works for.
        q0: first row in the owner's local order.
        q1: the row after the last.
        kv_owner: node whose keys they are.
        k0: first key in that node's local order.
        k1: the key after the last.
        kind: "full": every pair; "causal": square, the diagonal included; "band": pairs within
            the mask's window; "dense": as the given matrix says.
        q_pos: position of row q0 in the sequence; the following rows follow it.
        k_pos: position of key k0 likewise.
        cells: number of pairs that are attended to.
    """

    q_owner: int
    q0: int
    q1: int
    kv_owner: int
    k0: int
    k1: int
    kind: Kind
    q_pos: int
    k_pos: int
    cells: int


@dataclass(frozen=True, slots=True)
class Step:
    """What a node does in one step, in this order.

    1. `wait`: until these receives are there; 2. `post`: start these sends and receives (the same
    order at both ends of a pair); 3. `blocks`: compute; 4. `wait_after`: until these receives are
    there (partial gradients, outputs computed elsewhere), add them to its own; 5. `free`: buffers
    not needed any more, `free_v`: likewise, but of keys and values only the values. A transfer
    that is posted in step t carries what its sender has after `wait` of step t. Nothing is freed
    before the step after which the receiver of a transfer that reads it has it.

    Keys of a block lie in one buffer. What forward does not free is the state for backward.

    In backward, `blocks` adds to the gradients of keys and values of `kv_owner`, which are kept
    as a buffer "dkv" until a transfer carries them to the next node.
    """

    wait: tuple[int, ...] = ()
    post: tuple[int, ...] = ()
    blocks: tuple[Block, ...] = ()
    wait_after: tuple[int, ...] = ()
    free: tuple[Buffer, ...] = ()
    free_v: tuple[Buffer, ...] = ()


@dataclass(frozen=True)
class Program:
    """All steps of all nodes in one direction; `steps[node][t]`, every node has as many."""

    steps: tuple[tuple[Step, ...], ...]
    transfers: tuple[Transfer, ...]
    # Instead of transfers: every node's K and V are gathered before the one step, and the
    # gradients are summed and scattered after it.
    gather: bool = False


@dataclass(frozen=True)
class AttnPlan:
    """The whole plan. Hashable; equal plans are interchangeable between processes.

    Attributes:
        algorithm: "ulysses", "ring", "usp" (both), "allgather_kv" or "tasks".
        layout: which process holds which tokens.
        nodes: the same for the R nodes, each in the order of the sequence.
        mask: which keys a query may attend to.
        ulysses: U, processes of a node.
        window: w, nodes of an inner ring.
        heads: which heads a place of a node attends with.
        head_dims: channels of queries and keys, and of values.
        kv_keep: what stays from forward for backward: "last", "k", "kv", or with R = 1 "pre" (keys
            and values before the exchange) or "pre_k" (keys before it, values after it).
        grad_bytes: bytes per element of travelling gradients of keys and values.
        forward: program of the nodes.
        backward: likewise.
    """

    algorithm: str
    layout: SeqLayout
    nodes: SeqLayout
    mask: AttnMask
    ulysses: int
    window: int
    heads: HeadPlan
    head_dims: tuple[int, int]
    kv_keep: Literal["last", "k", "kv", "pre", "pre_k"]
    grad_bytes: int
    forward: Program
    backward: Program

    def __hash__(self) -> int:
        """Hash what the programs follow from: cheap, and equal for equal plans."""
        return hash((self.algorithm, self.layout, self.mask, self.ulysses, self.window, self.heads))

    def cost(self, element_bytes: int, batch: int = 1) -> tuple[CommCost, ...]:
        """Return what every rank sends and computes, in exact integers.

        Args:
            element_bytes: bytes per element of queries, keys and values.
            batch: rows of the batch.
        """
        return plan_cost(self, element_bytes, batch)

    def __str__(self) -> str:
        """Return a table of the steps, and the cost."""
        return plan_table(self)

    def as_dict(self) -> dict[str, Any]:
        """Return lists, strings and numbers, for JSON."""
        return plan_dict(self)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digest of every field by its name, equal in all processes that hold equal plans."""
        return plan_digests(self)
