"""Context attention compiled, checkpointed, under autocast, and under torch's own checks."""

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ms_parallel.context import AttnMask, CPTopology, SeqLayout, context_attention, seq_to_head
from ms_parallel.context.digest import plan_key
from ms_parallel.context.trace import Ledger
from support.context import Case, make_plan
from support.ranks import run_ranks

OPTIONS = ({}, {"kv_keep": "k"}, {"algorithm": "ulysses", "kv_keep": "pre_k"})


def block(plan, topology):
    """A function with products before and after attention."""

    def run(q, k, v, weight):
        out = context_attention(q * 2, k @ weight, v, plan, topology, alibi_slopes=SLOPES)
        return out @ weight

    return run


SLOPES = torch.linspace(0.1, 0.4, 4)


def grads_of(function, leaves):
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def compiled(plan, topology, leaves):
    function = block(plan, topology)
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    pairs = zip(grads_of(whole, leaves), grads_of(function, leaves), strict=True)
    return [torch.equal(a, b) for a, b in pairs]


def exchanged(group, leaves):
    """The exchange alone, compiled and not: uneven heads, with gradients."""

    def run(x):
        return seq_to_head(x * 2, group, 1, 2, head_counts=(1, 3)).square()

    x = leaves[0]
    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    pairs = zip(grads_of(whole, [x]), grads_of(run, [x]), strict=True)
    return [torch.equal(a, b) for a, b in pairs]


def keep_attention(ctx, op, *args, **kwargs):
    name = torch.ops.ms_parallel.context_attention.default
    return CheckpointPolicy.MUST_SAVE if op is name else CheckpointPolicy.PREFER_RECOMPUTE


def replayed(plan, topology, leaves):
    """Bytes of forward and backward: plain, recomputed, and recomputed but for attention."""
    function = block(plan, topology)
    found, sent = [], []
    contexts = {"context_fn": lambda: create_selective_checkpoint_contexts(keep_attention)}
    for extra in (None, {}, contexts):
        topology.ledger = Ledger()
        call = function
        if extra is not None:
            call = lambda *x, e=extra: checkpoint(function, *x, use_reentrant=False, **e)  # noqa: E731
        found.append(grads_of(call, leaves))
        sent.append(topology.ledger.bytes)
    same = [torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)]
    return same, sent


def checked(plan, topology, leaves):
    """Check schema, aliases, derivative and fake of both operators."""
    settings = (plan_key(plan), topology.key, 0.3, False, 0.0, 0, "bshd", True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.ms_parallel.context_attention.default
    arguments = (*leaves[:3], SLOPES, None, leaves[3][0, :4].float(), *settings)
    results = torch.library.opcheck(op, arguments, test_utils=tests)
    with torch.autocast("cpu", torch.bfloat16):
        small = [t.float() for t in leaves[:3]]
        same = {"ulysses": plan.ulysses, "algorithm": plan.algorithm}
        narrow = make_plan(plan.layout, plan.mask, (4, 1), grad_bytes=4, **same)
        out = context_attention(*small, narrow, topology)
        grads = torch.autograd.grad(out.float().sum(), leaves[:3])
    cast = out.dtype is torch.bfloat16 and all(g.isfinite().all() for g in grads)
    return [*(result == "SUCCESS" for result in results.values()), cast]


def body(rank, world):
    layout = SeqLayout.zigzag(18, world)
    found = []
    for options in OPTIONS:
        plan = make_plan(layout, AttnMask.causal((0, 5, 18)), (4, 1), **options)
        topology = CPTopology(None, plan.ulysses)
        case = Case(plan, batch=2)
        torch.manual_seed(1)
        leaves = [*case.shards(rank), torch.randn(8, 8, dtype=torch.float64, requires_grad=True)]
        given = (plan, topology, leaves)
        cost = plan.cost(8, 2)[rank]
        found.append(
            {
                "compiled": [
                    *compiled(*given),
                    *exchanged(None, leaves),
                    *exchanged(topology.group, leaves),
                ]
                if not options
                else [],
                "replayed": replayed(*given),
                "checked": checked(*given),
                "cost": (cost.forward_bytes, cost.backward_bytes),
            }
        )
    return found


def test_compiled_replayed_and_faked():
    for found in run_ranks(body, 2, timeout=120):
        assert len(found[0]["compiled"]) == 9
        for case in found:
            assert all(case["compiled"])
            assert all(case["checked"])
            same, sent = case["replayed"]
            assert all(same)
            forward, backward = case["cost"]
            assert sent == [forward + backward, 2 * forward + backward, forward + backward]
