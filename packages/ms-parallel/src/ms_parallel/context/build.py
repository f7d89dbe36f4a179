"""From a layout, a mask and an algorithm to a plan."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Literal, NamedTuple

from ms_ops.checks import check_choice, fail

from .gather import gather_program
from .heads import kv_head_plan
from .layout import SeqLayout
from .mask import AttnMask
from .plan import AttnPlan, Program
from .routes import Keep, ring_programs
from .tasks import BUDGET, task_programs
from .tiles import Tiles

Algorithm = Literal["ring", "ulysses", "usp", "allgather_kv", "tasks"]
KvKeep = Literal["last", "k", "kv", "pre", "pre_k"]
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "ulysses", "usp", "allgather_kv", "tasks")
KEEPS: tuple[KvKeep, ...] = ("last", "k", "kv", "pre", "pre_k")
BEFORE = ("pre", "pre_k")
_NAME = "plan_attention"


def plan_attention(
    layout: SeqLayout,
    mask: AttnMask,
    *,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    algorithm: Algorithm = "ring",
    ulysses: int = 1,
    window: int = 1,
    kv_keep: KvKeep = "last",
    pruned: bool = False,
    budget: int | None = None,
    grad_bytes: int = 4,
    uneven: bool = True,
) -> AttnPlan:
    """Return the plan of an attention over the processes of `layout`.

    The same arguments give the same object: the last 32 plans are kept by them.

    Args:
        layout: which process holds which tokens; its size is P.
        mask: which keys a query may attend to.
        heads: query heads and key and value heads of one process (its tensor-parallel part).
        head_dims: channels of queries and keys, and of values.
        algorithm: "ring": keys and values visit the processes; "ulysses": tokens are traded for
            heads; "usp": both, in nodes of `ulysses` consecutive ranks; "allgather_kv": keys and
            values are gathered, after the trade where `ulysses` > 1; "tasks": each tile that is
            not empty is computed by the owner of its queries or of its keys, who gets what it
            needs from the other (for irregular masks; see `optimize_layout`).
        ulysses: U, ranks of a node. P for "ulysses", where it may be left out.
        window: w, nodes of an inner ring of a ring of rings.
        kv_keep: what stays for backward. "last": what arrived last (ring), or what came out of the
            exchange or, of "allgather_kv" and "tasks", what was there before; "kv": all; "k": keys;
            "pre": without a ring, keys and values before the exchange, which is then repeated;
            "pre_k": keys before it, values after it, and only keys are exchanged again.
        pruned: keys and values visit only nodes that need them.
        budget: of "tasks": units a node may move in a round, 2 for keys and values, 1 for queries,
            1 for outputs; None for 6.
        grad_bytes: bytes per element of travelling gradients of keys and values and other partial
            sums: 4 for float32, 8 for float64.
        uneven: whether shards and numbers of heads may differ between processes.

    Raises:
        ValueError: arguments that contradict one another; the text names both.
    """
    size = layout.size
    check_choice(_NAME, "algorithm", algorithm, ALGORITHMS)
    check_choice(_NAME, "kv_keep", kv_keep, KEEPS)
    check_choice(_NAME, "grad_bytes", grad_bytes, (2, 4, 8))
    if algorithm == "ulysses" and ulysses == 1:
        ulysses = size
    _check_sizes(size, algorithm, ulysses)
    _check_window(size // ulysses, algorithm, window)
    _check_keep(size, size // ulysses, algorithm, kv_keep, pruned)
    if budget is not None and algorithm != "tasks":
        fail(ValueError, _NAME, "budget", budget, f'None with algorithm "{algorithm}"')
    if min(head_dims) < 1:
        fail(ValueError, _NAME, "head_dims", head_dims, "1 or more channels")
    if not uneven:
        _check_even(layout, mask, heads, ulysses)
    mask.check(layout.total)
    if kv_keep in BEFORE and not kv_head_plan(*heads, ulysses).shared:
        text = f'"{kv_keep}" keeps no less here than "last", and sends more'
        alone = "no place shares a head with another"
        warnings.warn(f"plan_attention: kv_keep: {text}: {alone}", stacklevel=2)
    keep: Keep = "last" if kv_keep == "pre" or kv_keep == "pre_k" else kv_keep
    program = _Route(algorithm, window, keep, pruned, budget)
    return _plan(layout, mask, heads, head_dims, ulysses, kv_keep, grad_bytes, program)


class _Route(NamedTuple):
    """What the programs follow from, beside layout and mask."""

    algorithm: Algorithm
    window: int
    keep: Keep
    pruned: bool
    budget: int | None


@lru_cache(maxsize=32)
def _plan(
    layout: SeqLayout,
    mask: AttnMask,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    ulysses: int,
    kv_keep: KvKeep,
    grad_bytes: int,
    route: _Route,
) -> AttnPlan:
    head_plan = kv_head_plan(*heads, ulysses)
    nodes = layout.grouped(ulysses)
    return AttnPlan(
        route.algorithm, layout, nodes, mask, ulysses, route.window, head_plan, head_dims,
        kv_keep, grad_bytes, *_programs(nodes, mask, route),
    )  # fmt: skip


@lru_cache(maxsize=16)
def _programs(nodes: SeqLayout, mask: AttnMask, route: _Route) -> tuple[Program, Program]:
    tiles = _tiles(nodes, mask)
    if route.algorithm == "allgather_kv":
        program = gather_program(tiles)
        return program, program
    if route.algorithm == "tasks":
        return task_programs(tiles, BUDGET if route.budget is None else route.budget, route.keep)
    return ring_programs(tiles, route.window, route.keep, route.pruned)


@lru_cache(maxsize=4)
def _tiles(nodes: SeqLayout, mask: AttnMask) -> Tiles:
    """Keep the tiles, which all algorithms share."""
    return Tiles(nodes, mask)


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _check_sizes(size: int, algorithm: Algorithm, ulysses: int) -> None:
    legal = divisors(size)
    if ulysses not in legal:
        need = f"a divisor of the {size} processes: {legal}"
        fail(ValueError, _NAME, "ulysses", ulysses, need)
    if algorithm == "ring" and ulysses != 1:
        need = '1 with algorithm "ring", or algorithm "usp"'
        fail(ValueError, _NAME, "ulysses", ulysses, need)
    if algorithm == "ulysses" and ulysses != size:
        need = f'{size}, all processes, with algorithm "ulysses", or algorithm "usp"'
        fail(ValueError, _NAME, "ulysses", ulysses, need)
    if algorithm == "usp" and ulysses in (1, size):
        inner = legal[1:-1]
        need = f'one of {inner} with algorithm "usp" and {size} processes'
        if not inner:
            need = f'algorithm "ring" or "ulysses": {size} processes are no nodes of more than one'
        fail(ValueError, _NAME, "ulysses", ulysses, need)
    if algorithm == "allgather_kv" and ulysses == size > 1:
        need = f'less than all {size} processes with algorithm "allgather_kv", or "ulysses"'
        fail(ValueError, _NAME, "ulysses", ulysses, need)


def _check_window(nodes: int, algorithm: Algorithm, window: int) -> None:
    legal = divisors(nodes)[:-1] or [1]
    if window not in legal:
        need = f"one of {legal}: a divisor of the ring's {nodes} nodes, smaller than they"
        fail(ValueError, _NAME, "window", window, need)
    if window != 1 and algorithm not in ("ring", "usp"):
        need = f'1 with algorithm "{algorithm}": windows are of a ring'
        fail(ValueError, _NAME, "window", window, need)


def _check_keep(size: int, nodes: int, algorithm: Algorithm, kv_keep: KvKeep, pruned: bool) -> None:
    if kv_keep != "last" and size == 1:
        need = '"last" with 1 process: nothing travels'
        fail(ValueError, _NAME, "kv_keep", repr(kv_keep), need)
    if kv_keep in ("k", "kv") and nodes == 1:
        need = '"last", "pre" or "pre_k" with algorithm "ulysses": nothing visits'
        fail(ValueError, _NAME, "kv_keep", repr(kv_keep), need)
    if kv_keep in BEFORE and nodes > 1:
        need = f'"last", "k" or "kv" between nodes: "{kv_keep}" is for algorithm "ulysses"'
        fail(ValueError, _NAME, "kv_keep", repr(kv_keep), need)
    if pruned and algorithm not in ("ring", "usp"):
        need = f'False with algorithm "{algorithm}": only a ring is pruned'
        fail(ValueError, _NAME, "pruned", pruned, need)


def _check_even(layout: SeqLayout, mask: AttnMask, heads: tuple[int, int], ulysses: int) -> None:
    if len(set(layout.lengths)) > 1:
        need = f"a multiple of {layout.size} processes (twice that for zigzag), or uneven=True"
        fail(ValueError, _NAME, "layout", f"{layout.total} tokens, {layout.lengths}", need)
    if heads[0] % ulysses:
        legal = [d for d in divisors(layout.size) if heads[0] % d == 0]
        nearest = min(legal, key=lambda d: abs(d - ulysses))
        need = f"query heads that ulysses = {ulysses} divides ({nearest} does), or uneven=True"
        fail(ValueError, _NAME, "heads", f"{heads[0]} query heads", need)
