"""Exact cost of plans against the closed forms of their algorithms."""

from fractions import Fraction

import pytest

from ms_parallel.context.build import plan_attention
from ms_parallel.context.layout import SeqLayout
from ms_parallel.context.mask import AttnMask
from support.plans import random_plan

S, D, E, B = 96, 4, 2, 3


def plan_of(size, heads, **arguments):
    given = {"algorithm": "ring", "grad_bytes": E, "head_dims": (D, D), **arguments}
    return plan_attention(SeqLayout.zigzag(S, size), AttnMask.causal(), heads=heads, **given)


def bytes_of(size, heads):
    """Bytes of a rank's queries (or outputs), and of its keys (or values)."""
    return B * S // size * heads[0] * D * E, B * S // size * heads[1] * D * E


def copies(heads, places):
    """Copies of a key and value head that the places of a node need, on average."""
    group = heads[0] // heads[1]
    each = [heads[0] // places + (u < heads[0] % places) for u in range(places)]
    ends = [sum(each[:u]) for u in range(places + 1)]
    touched = [-(-ends[u + 1] // group) - ends[u] // group for u in range(places)]
    return Fraction(sum(touched), heads[1])


def total(plan):
    cost = plan.cost(E, B)
    return sum(c.forward_bytes for c in cost), sum(c.backward_bytes for c in cost)


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_ring(size):
    _, k = bytes_of(size, (8, 2))
    for window in (1, 2) if size in (4, 8) else (1,):
        for cost in plan_of(size, (8, 2), window=window).cost(E, B):
            assert cost.forward_bytes == (size - 1) * 2 * k
            assert cost.backward_bytes == 2 * (size - 1) * 2 * k
            assert (cost.forward_messages, cost.backward_messages) == (size - 1, 2 * size - 2)
            assert cost.collectives == 0
    for cost in plan_of(size, (8, 2), grad_bytes=2 * E).cost(E, B):
        assert cost.backward_bytes == (size - 1) * 2 * k + (size - 1) * 4 * k


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("window", [1, 2])
def test_kept_keys_and_values(size, window):
    if size % (2 * window):
        window = 1
    _, k = bytes_of(size, (8, 2))
    for keep, keys in (("kv", 2 * k), ("k", 2 * k + (size - 2) * k)):
        for cost in plan_of(size, (8, 2), kv_keep=keep, window=window).cost(E, B):
            assert cost.forward_bytes == (size - 1) * 2 * k
            assert cost.backward_bytes == keys + (size - 1) * 2 * k


@pytest.mark.parametrize(("size", "window"), [(4, 2), (8, 2), (8, 4), (6, 2), (6, 3)])
def test_hops_of_a_ring_of_rings(size, window):
    plan, windows = plan_of(size, (8, 2), window=window), size // window
    for node in range(size):
        for program, times in ((plan.forward, 1), (plan.backward, 2)):
            levels = [t.level for t in program.transfers if t.src == node]
            assert levels.count("inner") == times * windows * (window - 1)
            assert levels.count("outer") == times * (windows - 1)
    for t in plan.forward.transfers:
        assert (t.src // window == t.dst // window) == (t.level == "inner")
        if t.level == "outer":
            assert t.src % window == t.dst % window


@pytest.mark.parametrize("size", range(2, 17))
def test_pruned_ring_sends_three_quarters(size):
    layout, mask = SeqLayout.zigzag(8 * size, size), AttnMask.causal()
    given = {"heads": (1, 1), "head_dims": (1, 1), "grad_bytes": E}
    k = 8 * E
    windows = [w for w in range(1, size) if size % w == 0]
    for window in windows:
        plan = plan_attention(layout, mask, **given, window=window, pruned=True)
        forward, backward = total_of(plan)
        assert 4 * forward == 3 * size * (size - 1) * 2 * k
        assert backward == 2 * forward


def total_of(plan):
    cost = plan.cost(E)
    return sum(c.forward_bytes for c in cost), sum(c.backward_bytes for c in cost)


@pytest.mark.filterwarnings("ignore:plan_attention. kv_keep")
@pytest.mark.parametrize(
    ("heads", "size"),
    [((8, 8), 4), ((8, 8), 8), ((8, 4), 4), ((8, 2), 4), ((24, 6), 4), ((6, 6), 4), ((8, 1), 3)],
)
def test_head_exchange(heads, size):
    q, k = bytes_of(size, heads)
    rho, rest = copies(heads, size), Fraction(size - 1, size)
    plan = plan_of(size, heads, algorithm="ulysses")
    volume = size * rest * (2 * q + 2 * rho * k)
    assert total(plan) == (volume, volume)
    forward, backward = total(plan_of(size, heads, algorithm="ulysses", kv_keep="pre"))
    assert (forward, backward) == (volume, volume + size * rest * 2 * rho * k)
    keys = total(plan_of(size, heads, algorithm="ulysses", kv_keep="pre_k"))
    assert keys == (volume, volume + size * rest * rho * k)
    for cost in plan.cost(E, B):
        assert (cost.forward_messages, cost.backward_messages, cost.collectives) == (0, 0, 4)
        if heads[0] % size == 0 and rho == 1:
            assert cost.forward_bytes == cost.backward_bytes == volume / size


def test_sums_of_shared_heads_travel_as_sums():
    q, k = bytes_of(4, (24, 6))
    plan = plan_of(4, (24, 6), algorithm="ulysses", grad_bytes=4)
    assert copies((24, 6), 4) == Fraction(4, 3)
    exchange = 4 * Fraction(3, 4) * (2 * q + 2 * Fraction(4, 3) * k * 2)
    assert total(plan)[1] == exchange
    alone = plan_of(4, (8, 4), algorithm="ulysses", grad_bytes=4)
    assert total(alone)[0] == total(alone)[1]


@pytest.mark.parametrize(("places", "nodes"), [(2, 2), (2, 3), (4, 2), (2, 4)])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
def test_both(places, nodes, heads):
    size = places * nodes
    q, k = bytes_of(size, heads)
    rho, rest = copies(heads, places), Fraction(places - 1, places)
    plan = plan_of(size, heads, algorithm="usp", ulysses=places)
    exchange, ring = rest * (2 * q + 2 * rho * k), (nodes - 1) * 2 * rho * k
    for cost in plan.cost(E, B):
        assert cost.forward_bytes == exchange + ring
        assert cost.backward_bytes == exchange + 2 * ring
        assert (cost.forward_messages, cost.backward_messages) == (nodes - 1, 2 * nodes - 2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gathered_keys_and_values(size):
    _, k = bytes_of(size, (8, 2))
    for keep, again in (("last", 2 * k), ("k", k), ("kv", 0)):
        plan = plan_of(size, (8, 2), algorithm="allgather_kv", kv_keep=keep)
        for cost in plan.cost(E, B):
            assert cost.forward_bytes == (size - 1) * 2 * k
            assert cost.backward_bytes == (size - 1) * (2 * k + again)
            assert cost.collectives == 2 + (again > 0)


def test_compute_is_that_of_the_mask():
    for seed in range(60):
        plan = random_plan(seed)
        cost = plan.cost(E, B)
        places, cells = plan.ulysses, plan.mask.cells(plan.layout.total)
        assert sum(c.cells for c in cost) == places * cells
        d, dv = plan.head_dims
        heads = plan.heads.q_heads
        assert sum(c.forward_flops for c in cost) == 2 * B * cells * heads * (d + dv)
        assert sum(c.backward_flops for c in cost) == 2 * B * cells * heads * (3 * d + 2 * dv)


def test_zigzag_computes_the_same_everywhere():
    costs = plan_of(8, (8, 2)).cost(E, B)
    assert len({c.cells for c in costs}) == 1
    assert costs[0].flops == costs[0].forward_flops + costs[0].backward_flops


@pytest.mark.parametrize(("size", "left"), [(4, 5), (8, 8), (8, 12), (8, 20), (8, 25)])
def test_a_window_costs_the_keys_it_reaches(size, left):
    # Every node gets the `left` keys before its first query, whoever holds them, and no others.
    plan = plan_attention(
        SeqLayout.contiguous(8 * size, size), AttnMask.window(left), heads=(1, 1),
        head_dims=(1, 1), pruned=True,
    )  # fmt: skip
    got = dict.fromkeys(range(size), 0)
    for transfer in plan.forward.transfers:
        got[transfer.dst] += sum(b.stop - b.start for b in transfer.buffers)
    assert got == {node: min(left, 8 * node) for node in range(size)}
    assert len(plan.forward.steps[0]) == 1 + min(size - 1, -(-left // 8))


def test_documents_end_the_way_of_their_keys():
    # Documents no longer than a shard: traffic is O(1) a node, whatever P.
    for size in (4, 8, 16):
        total = 16 * size
        documents = (0, *range(8, total, 16), total)
        given = {"heads": (1, 1), "head_dims": (1, 1), "grad_bytes": E}
        layout, mask = SeqLayout.contiguous(total, size), AttnMask.causal(documents)
        for arguments in ({"pruned": True}, {"algorithm": "tasks"}):
            plan = plan_attention(layout, mask, **given, **arguments)
            assert {c.forward_bytes for c in plan.cost(E)} == {8 * 2 * E, 0}
            assert len(plan.forward.steps[0]) <= 3
