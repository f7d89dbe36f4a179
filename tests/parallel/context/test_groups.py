"""The executor on process groups: one launch of 8 ranks, groups of 1 to 8 of them."""

from bisect import bisect_right

import pytest
import torch
import torch.distributed as dist

from ms_ops.attention import attention
from ms_parallel.context import (
    AttnMask,
    ContextAttention,
    CPTopology,
    DistributedAttention,
    SeqLayout,
    context_attention,
    head_to_seq,
    kv_head_plan,
    seq_to_head,
)
from ms_parallel.context.build import divisors, plan_attention
from ms_parallel.context.trace import Ledger, check_trace
from support.context import Case, check_ledgers, error, make_plan, random_options
from support.mutation import Mutation
from support.plans import random_arguments
from support.ranks import run_ranks

SIZES = (1, 2, 3, 4, 6, 8)
CASES = 6


def seeds_of_sizes():
    """Seeds of random cases for every number of ranks."""
    found = {size: [] for size in SIZES}
    for seed in range(200):
        some = found.get(random_arguments(seed)["layout"].size)
        if some is not None and len(some) < CASES:
            some.append(seed)
    return found


SEEDS = seeds_of_sizes()
NO_LSE = Mutation(
    "no gradient", "ms_parallel.context.kernels:with_lse_gradient", "dlse is None", "True"
)


def attend(case, topology):
    """Run a case on a rank; return its error, what it sent and its events."""
    rank, layout = topology.rank, case.plan.layout
    topology.ledger, topology.log = Ledger(), []
    shards = case.shards(rank)
    out = context_attention(*shards, case.plan, topology, **case.options)
    forward, forward_log = topology.ledger, topology.log
    topology.ledger, topology.log = Ledger(), []
    grads = torch.autograd.grad(out, shards, layout.shard(case.dout, rank, 1))
    expected = [layout.shard(t, rank, 1) for t in case.whole()]
    logs = (forward_log, topology.log)
    return error([out, *grads], expected), (forward, topology.ledger), logs


def make_groups(size):
    """Make all groups that topologies of this size need; return those of this rank by name."""
    rank, ranks = dist.get_rank(), list(range(size))
    found = {"group": dist.new_group(ranks), "twin": dist.new_group(ranks)}
    for u in divisors(size)[1:-1]:
        for r in range(0, size, u):
            made = dist.new_group(ranks[r : r + u])
            found |= {("head", u): made} if r <= rank < r + u else {}
        for place in range(u):
            made = dist.new_group(ranks[place::u])
            found |= {("ring", u): made} if rank < size and rank % u == place else {}
    return found


def plans(groups, size):
    """Run random cases on a group, alternating between the two ways to post messages."""
    found = []
    for i, seed in enumerate(SEEDS[size]):
        arguments = random_arguments(seed) | {"grad_bytes": 8}
        plan = plan_attention(**arguments)
        u, p2p = plan.ulysses, ("batched", "dual_group")[i % 2]
        topology = CPTopology(
            groups["group"],
            u,
            p2p=p2p,
            head_group=groups.get(("head", u)),
            ring_group=groups.get(("ring", u)),
            twin_group=groups["twin"],
            check_plans=i == 0,
        )
        options = random_options(seed, plan.heads.q_heads)
        case = Case(plan, batch=1 + i % 2, seed=seed, options=options)
        found.append((seed, p2p, *attend(case, topology)))
    return found


def exchanges(group, rank):
    """Trade tokens for heads and back; return what came out and what should have."""
    size = dist.get_world_size(group)
    found = []
    for total, heads, dtype in ((17, 6, torch.bfloat16), (1, 4, torch.int64), (9, 3, torch.bool)):
        whole = torch.arange(2 * total * heads * 3).view(2, total, heads, 3).to(dtype)
        layout = SeqLayout.contiguous(total, size)
        mine = layout.shard(whole, rank, 1)
        traded = seq_to_head(mine, group, 1, 2, seq_lens=layout.lengths)
        first, last = kv_head_plan(heads, heads, size).q[rank]
        back = head_to_seq(traded, group, 1, 2, layout.lengths, kv_head_plan(heads, heads, size).q)
        found += [torch.equal(traded, whole[:, :, first:last]), torch.equal(back, mine)]
    # Key heads that several ranks get: the gradient is the sum of theirs.
    ranges = kv_head_plan(6, 2, size).kv
    x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    out = seq_to_head(x, group, 0, 1, head_counts=ranges)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    copies = [sum(a <= h < b for a, b in ranges) for h in range(2)]
    expected = torch.tensor(copies, dtype=torch.float64).view(1, 2, 1).expand(4, 2, 5)
    return [*found, torch.equal(grad, expected)]


def message(function, *args, **kwargs):
    """Return the text of the error that a call raises."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(group, rank):
    """Return the errors of wrong calls."""
    layout = SeqLayout.zigzag(16, 4)
    documents = (0, 8, 16) if rank == 2 else ()
    plan = make_plan(layout, AttnMask.causal(documents))
    q, k, v = Case(plan).shards(rank)
    checked = CPTopology(group, check_plans=True)
    topology = CPTopology(group)
    common = make_plan(layout, AttnMask.causal())
    deepspeed = DistributedAttention(attention, topology.group, gather_idx=1)
    return {
        "deepspeed": message(deepspeed, q[:, :, :3], k, v),
        "plan": message(context_attention, q, k, v, plan, checked),
        "shard": message(context_attention, q, k[:, :-1], v, common, topology),
        "batch": message(context_attention, q, k.expand(2, -1, -1, -1), v, common, topology),
        "heads": message(context_attention, q[:, :, :2], k, v, common, topology),
        "rng": message(context_attention, q, k, v, common, topology, dropout_p=0.1),
        "nodes": message(context_attention, q, k, v, common, CPTopology(group, 2)),
        "slopes": message(context_attention, q, k, v, common, topology, alibi_slopes=q[0, 0, 0]),
        "dtype": message(context_attention, *(t.float() for t in (q, k, v)), common, topology),
        "ulysses": message(CPTopology, group, 3),
        "window": message(CPTopology, group, 1, 3),
        "p2p": message(CPTopology, group, p2p="single"),
    }


def gradients(case, topology, weight, sink):
    """Return gradients of a rank's shards from output and log-sum-exp, and the whole sink's."""
    layout, rank = case.plan.layout, topology.rank
    shards = case.shards(rank)
    parts = context_attention(*shards, case.plan, topology, sink=sink, return_lse=True)
    douts = (layout.shard(case.dout, rank, 1), layout.shard(weight, rank, 2))
    *grads, dsink = torch.autograd.grad(parts, [*shards, sink], douts)
    dist.all_reduce(dsink)
    return [*grads, dsink]


def lse_gradients(group, rank):
    """Errors of gradients through the log-sum-exp: right ones, and without it."""
    layout, tail = SeqLayout.contiguous(18, 4), torch.arange(18).unsqueeze(1) >= 14
    mask = AttnMask.from_matrix(tail | torch.eye(18, dtype=torch.bool))
    weight = torch.randn(1, 4, 18, generator=torch.Generator().manual_seed(2)).double()
    sink = torch.linspace(-1, 1, 4).double().requires_grad_()
    exchange = make_plan(layout, mask, algorithm="usp", ulysses=2)
    helper = make_plan(layout, mask, algorithm="tasks")
    assert any(t.buffers[0].what == "qo" for t in helper.backward.transfers)
    right, wrong = [], []
    for plan in (exchange, helper):
        case, topology = Case(plan), CPTopology(group, plan.ulysses)
        leaves = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
        whole = attention(*leaves, mask=mask.matrix(18), sink=sink, return_lse=True)
        *wanted, dsink = torch.autograd.grad(whole, [*leaves, sink], (case.dout, weight))
        wanted = [*(layout.shard(t, rank, 1) for t in wanted), dsink]
        right.append(error(gradients(case, topology, weight, sink), wanted))
        with NO_LSE.applied():
            wrong.append(error(gradients(case, topology, weight, sink), wanted))
    return right, wrong


def modules(group, rank):
    """A module with everything fixed; the log-sum-exp; a repeated forward."""
    layout = SeqLayout.zigzag(18, 4)
    plan = make_plan(layout, AttnMask.causal(), algorithm="usp", ulysses=2)
    topology = CPTopology(group, 2)
    rng = {"dropout_p": 0.25, "dropout_rng": torch.tensor([3, 4])}
    case = Case(plan, options=rng)
    q, k, v = case.shards(rank)
    module = ContextAttention(plan, topology, dropout_p=0.25)
    out = module(q, k, v, dropout_rng=rng["dropout_rng"])
    plain, lse = context_attention(q, k, v, plan, topology, return_lse=True)
    scores = torch.einsum("bihd,bjhd->bhij", case.q, case.k.repeat_interleave(2, 2)) / 8**0.5
    whole = scores.masked_fill(~plan.mask.matrix(18), -torch.inf).logsumexp(-1)
    again = torch.utils.checkpoint.checkpoint(
        context_attention, q, k, v, plan, topology, use_reentrant=False, **rng
    )
    grads = [torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, again)]
    return {
        "module": error([out], [layout.shard(case.whole()[0], rank, 1)]),
        "evaluated": torch.equal(module.eval()(q, k, v), plain),
        "lse": error([lse], [layout.shard(whole, rank, 2)]),
        "replayed": all(torch.equal(a, b) for a, b in zip(*grads, strict=True)),
    }


def sizes(rank, world):
    """Run random cases and exchanges on groups of the first ranks."""
    groups = {size: make_groups(size) for size in SIZES}
    found = {}
    for size in SIZES[bisect_right(SIZES, rank) :]:
        found["plans", size] = plans(groups[size], size)
        if size > 1:
            found["exchanges", size] = exchanges(groups[size]["group"], rank)
    return found


def single(rank, world):
    """Run what one size is enough for."""
    found = {"refusals": refusals(None, rank), "modules": modules(None, rank)}
    return found | {"lse": lse_gradients(None, rank)}


@pytest.fixture(scope="module")
def outcome():
    return run_ranks(sizes, 8, timeout=120)


@pytest.fixture(scope="module")
def four():
    return run_ranks(single, 4)


@pytest.mark.parametrize("size", SIZES)
def test_values_bytes_and_events(outcome, size):
    ranks = [found["plans", size] for found in outcome[:size]]
    for runs in zip(*ranks, strict=True):
        seed, p2p = runs[0][:2]
        assert max(run[2] for run in runs) < 1e-10, f"seed {seed}"
        plan = plan_attention(**random_arguments(seed) | {"grad_bytes": 8})
        case = Case(plan, batch=1 + SEEDS[size].index(seed) % 2)
        check_ledgers(case, [run[3][0] for run in runs], [run[3][1] for run in runs])
        for direction in (0, 1):
            check_trace([run[4][direction] for run in runs], p2p, plan.ulysses)


@pytest.mark.parametrize("size", SIZES[1:])
def test_exchange_of_any_lengths_and_heads(outcome, size):
    assert all(all(found["exchanges", size]) for found in outcome[:size])


def test_refusals_name_what_and_where(four):
    for rank, found in enumerate(four):
        texts = found["refusals"]
        assert "mask at ranks [2]" in texts["plan"]
        assert "other plans than rank 0's" in texts["plan"]
        assert f"k: got (1, 3, 2, 8) at rank {rank}, need bshd" in texts["shard"]
        assert "(4, 2, 8)" in texts["shard"]
        assert "batch 1" in texts["batch"]
        assert texts["deepspeed"] == (
            "DistributedAttention: query: got 3 heads, need at least 4, one for each process"
        )
        assert texts["heads"].startswith(f"context_attention: q: got (1, 4, 2, 8) at rank {rank}")
        assert "dropout_rng: got None" in texts["rng"]
        assert "4 ranks in nodes of 2, need 4 ranks in nodes of 1" in texts["nodes"]
        assert "alibi_slopes: got (8,), need (4,)" in texts["slopes"]
        assert "grad_bytes 8, need 4" in texts["dtype"]
        assert "need one of [1, 2, 4]" in texts["ulysses"]
        assert "window: got 3 with 4 nodes" in texts["window"]
        assert "got 'single'" in texts["p2p"]


def test_modules_statistics_and_replay(four):
    for found in four:
        assert found["modules"]["module"] < 1e-10
        assert found["modules"]["lse"] < 1e-10
        assert found["modules"]["evaluated"]
        assert found["modules"]["replayed"]


def test_gradient_of_the_log_sum_exp(four):
    for found in four:
        right, wrong = found["lse"]
        assert max(right) < 1e-10
        assert min(wrong) > 1e-3
