"""Which heads a place of a node attends with after the head exchange."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from ms_ops.checks import fail

Interval = tuple[int, int]


@dataclass(frozen=True)
class HeadPlan:
    """Ranges of heads of the U places of a node.

    Attributes:
        q: query heads [first, last) of every place: a partition of all of them.
        kv: key and value heads that those touch. Ranges of neighbours may share a head: then it
            is sent to both, and its gradients are summed at its owner.
    """

    q: tuple[Interval, ...]
    kv: tuple[Interval, ...]

    @property
    def q_heads(self) -> int:
        """Number of query heads before the exchange."""
        return self.q[-1][1]

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads before the exchange."""
        return max(b for _, b in self.kv)

    @property
    def shared(self) -> bool:
        """Whether a key and value head is at more than one place."""
        return sum(b - a for a, b in self.kv) > self.kv_heads


def kv_head_plan(q_heads: int, kv_heads: int, places: int) -> HeadPlan:
    """Return the head ranges for any numbers of heads: as even as can be, no copy too many.

    Query heads per place differ by at most one; a place gets exactly the key and value heads that
    its query heads read. Places beyond the number of query heads get none.

    Args:
        q_heads: query heads of one process before the exchange.
        kv_heads: key and value heads likewise; each serves q_heads / kv_heads query heads.
        places: U, processes that exchange.

    Raises:
        ValueError: the query heads are no multiple of the key and value heads.
    """
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        need = "query heads that are a multiple of the key and value heads"
        fail(ValueError, "kv_head_plan", "q_heads, kv_heads", (q_heads, kv_heads), need)
    if places < 1:
        fail(ValueError, "kv_head_plan", "places", places, "1 or more")
    group = q_heads // kv_heads
    base, rest = divmod(q_heads, places)
    ends = list(accumulate((base + (u < rest) for u in range(places)), initial=0))
    q = tuple(pairwise(ends))
    kv = tuple((a // group, -(-b // group)) if a < b else (kv_heads, kv_heads) for a, b in q)
    return HeadPlan(q, kv)
