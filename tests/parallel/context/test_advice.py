"""Estimated times against closed forms, and advice that follows from them."""

import pytest

from ms_parallel.context.advice import advise
from ms_parallel.context.build import plan_attention
from ms_parallel.context.cost import state_bytes
from ms_parallel.context.layout import SeqLayout
from ms_parallel.context.mask import AttnMask
from ms_parallel.context.timing import Link, Machine, estimate

S, D, E = 256, 8, 2
HEADS = (8, 2)


def plan_of(size=4, heads=HEADS, mask=None, layout=None, **arguments):
    layout = layout or SeqLayout.zigzag(S, size)
    given = {"heads": heads, "head_dims": (D, D), "grad_bytes": E, **arguments}
    return plan_attention(layout, mask or AttnMask.causal(), **given)


def test_a_ring_takes_the_longer_of_compute_and_message_each_step():
    size, rate = 4, 1e9
    s = S // size
    chunk = s // 2
    diagonal = 4 * D * HEADS[0] * (chunk * (chunk + 1) + chunk * chunk)
    step = 4 * D * HEADS[0] * s * s // 2
    message = s * HEADS[1] * 2 * D * E
    for bandwidth in (1e5, 3e6, 1e7, 1e9):
        for latency in (0.0, 1e-4):
            plan = plan_of(size)
            time = estimate(plan, Machine(rate, Link(bandwidth, latency)), E)
            sent = message / bandwidth + latency
            steps = [diagonal / rate, *[step / rate] * (size - 1)]
            expected = sum(max(c, sent) for c in steps[:-1]) + steps[-1]
            assert time.forward_s == pytest.approx(expected)
            assert time.compute_s == pytest.approx(sum(steps) * 3.5)
            assert time.collective_s == 0
            assert time.exposed_s >= -1e-12


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
def test_messages_hide_where_the_shard_is_long_enough(heads):
    # Zigzag: s >= 2 F / (B g); full masks: s >= F / (B g). Two bytes per element.
    group, size, rate = heads[0] // heads[1], 4, 1e9
    s = S // size
    for mask, factor in ((AttnMask.causal(), 2), (AttnMask.full(), 1)):
        edge = factor * rate / (s * group)
        for times, hidden in ((1.01, True), (0.9, False)):
            plan = plan_of(size, heads, mask, kv_keep="kv")
            machine = Machine(rate, Link(edge * times))
            time = estimate(plan, machine, E)
            forward = estimate(plan, Machine(rate, Link(1e18)), E).forward_s
            assert (time.forward_s == pytest.approx(forward)) == hidden


def test_outer_messages_have_a_window_of_steps_to_hide_in():
    machine = Machine(1e9, Link(1e9), Link(3e6), domain=4)
    flat, windows = (estimate(plan_of(8, (8, 8), window=w), machine, E) for w in (1, 4))
    assert windows.total_s < flat.total_s
    assert windows.compute_s == flat.compute_s


def test_collectives_are_not_hidden():
    plan = plan_of(4, algorithm="ulysses")
    (cost, *_), bandwidth, latency = plan.cost(E), 1e7, 1e-5
    time = estimate(plan, Machine(1e9, Link(bandwidth, latency)), E)
    expected = (cost.forward_bytes + cost.backward_bytes) / bandwidth + 4 * latency
    assert time.collective_s == pytest.approx(expected)
    assert time.total_s == pytest.approx(time.compute_s + expected)
    assert time.exposed_s == pytest.approx(expected)
    gather = plan_of(4, algorithm="allgather_kv")
    time = estimate(gather, Machine(1e9, Link(bandwidth, latency), block_s=1e-3), E)
    (cost, *_) = gather.cost(E)
    expected = (cost.forward_bytes + cost.backward_bytes) / bandwidth + 6 * latency
    assert time.collective_s == pytest.approx(expected)
    blocks = max(len(steps[0].blocks) for steps in gather.forward.steps)
    assert time.compute_s == pytest.approx(cost.flops / 1e9 + 2 * blocks * 1e-3)


@pytest.mark.filterwarnings("ignore:plan_attention. kv_keep")
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_kept_keys_and_values_by_the_table(size):
    layout = SeqLayout.zigzag(48, size)
    k = 48 // size * HEADS[1] * D * E
    extra = {"last": 0, "k": (size - 2) * k, "kv": (size - 2) * 2 * k}
    for keep, more in extra.items():
        plan = plan_of(layout=layout, kv_keep=keep)
        assert {state_bytes(plan, r, E) for r in range(size)} == {2 * k + more}
    for keep, copies in {"last": 2, "k": 1 + size, "kv": 2 * size}.items():
        plan = plan_of(layout=layout, kv_keep=keep, algorithm="allgather_kv")
        assert {state_bytes(plan, r, E) for r in range(size)} == {copies * k}
    plan = plan_of(layout=layout, kv_keep="pre", algorithm="ulysses")
    assert {state_bytes(plan, r, E, 3) for r in range(size)} == {3 * 2 * k}
    plan = plan_of(layout=layout, kv_keep="pre_k", algorithm="ulysses")
    values = [48 * D * E * (last - first) for first, last in plan.heads.kv]
    assert [state_bytes(plan, r, E, 3) for r in range(size)] == [3 * (k + v) for v in values]


def tried(advice):
    return (advice.choice, *advice.others)


def test_advice_is_the_fastest_that_fits():
    machine = Machine(1e9, Link(5e6, 1e-5), Link(1e6, 1e-4), domain=4)
    given = {"heads": HEADS, "head_dims": (D, D), "grad_bytes": E}
    layout = SeqLayout.zigzag(S, 8)
    advice = advise(layout, AttnMask.causal(), machine, **given)
    limit = max(c.state_bytes for c in tried(advice) if c.arguments["kv_keep"] == "last")
    for choice in tried(advice):
        plan = plan_attention(layout, AttnMask.causal(), **given, **choice.arguments)
        assert estimate(plan, machine, E) == choice.time
        if choice.state_bytes <= limit:
            assert float(f"{choice.time.total_s:.3g}") >= float(f"{advice.choice.time.total_s:.3g}")
    names = [c.name for c in tried(advice)]
    assert len(set(names)) == len(names)
    assert str(advice).startswith(" ")
    assert all(name in str(advice) for name in names)
    assert advice.reason.startswith(advice.choice.name)
    richer = advise(layout, AttnMask.causal(), machine, **given, spare_bytes=10**9)
    assert richer.choice.time.total_s <= advice.choice.time.total_s


@pytest.mark.parametrize(
    ("heads", "link", "algorithm"),
    [((8, 8), Link(1e6), "ulysses"), ((8, 1), Link(1e8), "ring"), ((1, 1), Link(1e6), "ring")],
)
def test_the_ratio_of_heads_decides(heads, link, algorithm):
    # Many keys and values to move: exchange heads. Few, or one head: move those round.
    advice = advise(
        SeqLayout.zigzag(S, 4), AttnMask.causal(), Machine(1e9, link), heads=heads,
        head_dims=(D, D), even_heads=True,
    )  # fmt: skip
    assert advice.choice.arguments["algorithm"] == algorithm
    if advice.choice.arguments["algorithm"] == "ulysses":
        assert "the best of ring" in advice.reason


def test_tasks_are_advised_where_tiles_are_empty():
    documents = tuple(range(0, S + 1, S // 8))
    machine = Machine(1e9, Link(2e5, 1e-5))
    advice = advise(
        SeqLayout.contiguous(S, 4), AttnMask.causal(documents), machine, heads=(1, 1),
        head_dims=(D, D),
    )  # fmt: skip
    assert advice.choice.time.exposed_s == pytest.approx(0, abs=1e-12)
    assert advice.choice.sent_bytes == 0
    assert "tasks" in {c.arguments["algorithm"] for c in tried(advice)}


def test_bad_machines():
    with pytest.raises(ValueError, match="need rates above 0"):
        Machine(0, Link(1.0))
    with pytest.raises(ValueError, match="slow: got None, need a link between domains"):
        Machine(1.0, Link(1.0), domain=8)


def test_the_best_of_several_layouts():
    # Two long documents: a zigzag of each is balanced, one of the whole is not.
    documents, machine = (0, 160, S), Machine(1e9, Link(1e12))
    layouts = (SeqLayout.zigzag(S, 4), SeqLayout.zigzag_docs(documents, 4))
    advice = advise(layouts, AttnMask.causal(documents), machine, heads=HEADS, head_dims=(D, D))
    alone = [
        advise(one, AttnMask.causal(documents), machine, heads=HEADS, head_dims=(D, D))
        for one in layouts
    ]
    times = [a.choice.time.total_s for a in alone]
    assert advice.choice.time.total_s == min(times)
    assert "layout 0: " in str(advice)
    assert "layout 1: " in str(advice)
    assert "layout" not in str(alone[0])
