"""The process groups of a context-parallel attention: P ranks as R nodes of U places."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .trace import Ledger, Log

P2P = Literal["batched", "dual_group"]
_KNOWN: dict[str, CPTopology] = {}


class CPTopology:
    """P ranks of a group as R = P / U nodes of U consecutive ranks.

    Rank c of the group is place c % U of node c // U. All ranks make it together. The groups of a
    node and of a ring are made when they are first needed, by their members alone; torch then
    needs every member to be in equally many groups. Hand them in where that is not so.

    Args:
        group: a process group, or a one-dimensional `DeviceMesh`; None for the default group.
        ulysses: U, ranks that trade tokens for heads.
        window: w, nodes of an inner ring; divides R.
        p2p: "batched" starts the messages of a step on one group; "dual_group" uses two groups
            over the same ranks, one for each parity of the sending node, so that communicators
            that work in order send and receive at the same time.
        head_group: the ranks of this node in order, if such a group exists.
        ring_group: the ranks of this place in all nodes in order, likewise.
        twin_group: a second group of all ranks for "dual_group", likewise.
        check_plans: compare every plan with those of the other ranks at its first use, so that
            different ones are an error instead of a hang.

    `ledger` counts what attention sends through these groups; a list put into `log` receives the
    events of every call (see `trace`).

    Raises:
        ValueError: U does not divide P, w does not divide R, an unknown mode, or a mesh of more
            than one dimension.
        RuntimeError: this process is not in the group.
    """

    def __init__(
        self,
        group: Any = None,
        ulysses: int = 1,
        window: int = 1,
        p2p: P2P = "batched",
        *,
        head_group: Any = None,
        ring_group: Any = None,
        twin_group: Any = None,
        check_plans: bool = False,
    ) -> None:
        self.group = _process_group(group)
        self.size: int = dist.get_world_size(self.group)
        self.rank: int = dist.get_rank(self.group)
        if self.rank < 0:
            raise RuntimeError("CPTopology: group: this process is not one of its ranks")
        self.ulysses, self.window, self.p2p = ulysses, window, p2p
        self._check()
        self.ring = self.size // ulysses
        self.node, self.place = divmod(self.rank, ulysses)
        self._given = (head_group, ring_group)
        # By parity of the sender. Made now, by all: a rank without messages never needs it.
        twin = self.group
        if p2p == "dual_group" and self.size > 1:
            twin = self._new_group(self._global) if twin_group is None else twin_group
        self.pair_groups = (self.group, twin)
        self.check_plans = check_plans
        self.checked: set[str] = set()
        self.ledger = Ledger()
        self.log: Log | None = None
        # Compiled code names the groups by this.
        self.key = f"{self.group.group_name}/{ulysses}/{window}/{p2p}"
        _KNOWN[self.key] = self

    def _check(self) -> None:
        divisors = [n for n in range(1, self.size + 1) if self.size % n == 0]
        if self.ulysses not in divisors:
            got = f"{self.ulysses} with {self.size} ranks"
            raise ValueError(f"CPTopology: ulysses: got {got}, need one of {divisors}")
        ring = self.size // self.ulysses
        legal = [n for n in divisors if ring % n == 0]
        if self.window not in legal:
            got = f"{self.window} with {ring} nodes"
            raise ValueError(f"CPTopology: window: got {got}, need one of {legal}")
        if self.p2p not in ("batched", "dual_group"):
            need = "'batched' or 'dual_group'"
            raise ValueError(f"CPTopology: p2p: got {self.p2p!r}, need {need}")

    def __repr__(self) -> str:
        """Say what is where."""
        shape = f"{self.size} ranks, {self.ring} nodes of {self.ulysses}, windows of {self.window}"
        return f"CPTopology({shape}, {self.p2p}; this is rank {self.rank})"

    def node_of(self, rank: int) -> int:
        """Return the node of a rank of the group."""
        return rank // self.ulysses

    def global_rank(self, rank: int) -> int:
        """Return what torch.distributed calls a rank of the group."""
        return self._global[rank]

    @cached_property
    def _global(self) -> list[int]:
        ranks: list[int] = dist.get_process_group_ranks(self.group)
        return ranks

    @cached_property
    def head_group(self) -> Any:
        """The group of this node's ranks."""
        first = self.node * self.ulysses
        return self._sub_group(self._given[0], range(first, first + self.ulysses))

    @cached_property
    def ring_group(self) -> Any:
        """The group of the ranks with this rank's place, one a node."""
        return self._sub_group(self._given[1], range(self.place, self.size, self.ulysses))

    def _sub_group(self, given: Any, ranks: range) -> Any:
        if given is not None:
            return given
        if len(ranks) == self.size:
            return self.group
        return self._new_group([self._global[r] for r in ranks])

    def _new_group(self, ranks: list[int]) -> Any:
        backend = dist.get_backend(self.group)
        return dist.new_group(ranks, backend=backend, use_local_synchronization=True)


def topology_of(key: str) -> CPTopology:
    """Return the topology that has this key in this process.

    Raises:
        KeyError: none was made.
    """
    if key not in _KNOWN:
        raise KeyError(f"no CPTopology of this process has the key {key!r}")
    return _KNOWN[key]


def group_name(group: Any) -> str:
    """Return the name of a process group, by which compiled code holds it."""
    name: str = _process_group(group).group_name
    return name


def group_of(name: str) -> Any:
    """Return the process group of a name."""
    # What torch's own functional collectives go by.
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


def _process_group(group: Any) -> Any:
    if group is None:
        return dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):
        return group
    if getattr(group, "ndim", 1) != 1:
        got = f"a mesh of {group.ndim} dimensions"
        raise ValueError(f"CPTopology: group: got {got}, need one: mesh['name']")
    return group.get_group()


__all__ = ["CPTopology", "group_name", "group_of", "topology_of"]
