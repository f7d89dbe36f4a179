"""Bytes that every algorithm sends: counted, predicted, and by formula.

    python -m benchmarks context/traffic

Attention runs forward and backward, on 2 and 4 gloo ranks (in fp32) and with 8 simulated ones;
what every rank counted as sent must equal `plan.cost()` to the byte, or the benchmark fails.
Rows give the mean over the ranks in units of k, the bytes of one rank's keys, and what the table
of docs/context/index.md says in the same units. `pruned` is the sum over ranks by that of the full
ring; at 16 and more ranks it is as `plan.cost()` predicts.
"""

import argparse
from fractions import Fraction

import torch
import torch.distributed as dist
from ranks import environment, inputs, on_ranks, step, write

from ms_parallel.context import (
    AttnMask,
    CPTopology,
    SeqLayout,
    Simulation,
    context_attention,
    plan_attention,
    simulate_attention,
)

HEADS, DIMS, TOTAL, BYTES = (16, 4), 8, 256, 4
MOST = 8  # simulated ranks
ALGORITHMS = {
    "ulysses": {"algorithm": "ulysses"},
    'ulysses, keep "pre"': {"algorithm": "ulysses", "kv_keep": "pre"},
    'ulysses, keep "pre_k"': {"algorithm": "ulysses", "kv_keep": "pre_k"},
    "ring": {},
    'ring, keep "k"': {"kv_keep": "k"},
    'ring, keep "kv"': {"kv_keep": "kv"},
    "ring of rings, w = 2": {"window": 2},
    "ring, pruned": {"pruned": True},
    "usp, U = 2": {"algorithm": "usp", "ulysses": 2},
    "allgather_kv": {"algorithm": "allgather_kv"},
    'allgather_kv, keep "kv"': {"algorithm": "allgather_kv", "kv_keep": "kv"},
}


def formula(name, size):
    """(forward, backward) in units of k, gradients of keys and values in fp32; None: no form."""
    q, p = Fraction(HEADS[0], HEADS[1]), size
    ulysses = 2 if name.startswith("usp") else p
    rho = Fraction(max(ulysses, HEADS[1]), HEADS[1])
    inner = Fraction(ulysses - 1, ulysses) * (2 * q + 2 * rho)
    again = Fraction(ulysses - 1, ulysses) * 2 * rho
    ring, r = 2 * (p - 1), p // ulysses
    return {
        "ulysses": (inner, inner),
        'ulysses, keep "pre"': (inner, inner + again),
        'ulysses, keep "pre_k"': (inner, inner + again / 2),
        "ring": (ring, 2 * ring),
        'ring, keep "k"': (ring, 2 + (p - 2) + ring),
        'ring, keep "kv"': (ring, 2 + ring),
        "ring of rings, w = 2": (ring, 2 * ring),
        "ring, pruned": (Fraction(3, 4) * ring, Fraction(3, 4) * 2 * ring),
        "usp, U = 2": (inner + (r - 1) * 2 * rho, inner + 2 * (r - 1) * 2 * rho),
        "allgather_kv": (ring, 2 * ring),
        'allgather_kv, keep "kv"': (ring, ring),
    }[name]


def possible(size):
    """Options of the algorithms that are something of their own on so many ranks."""
    wide = size > HEADS[1]  # every head is at more than one place
    return {
        name: options
        for name, options in ALGORITHMS.items()
        if size % 4 == 0 or not ("w = 2" in name or "usp" in name)
        if size > 2 or "keep" not in name or name.startswith(("allgather", "ulysses"))
        if wide or "pre" not in name
        if not (wide and name == "ulysses" and size > HEADS[0])
    }


def plan_of(size, options, documents=()):
    layout = SeqLayout.zigzag(TOTAL, size)
    mask = AttnMask.causal(documents)
    return plan_attention(layout, mask, heads=HEADS, head_dims=(DIMS, DIMS), **options)


def check(plan, forward, backward):
    for rank, (cost, f, b) in enumerate(zip(plan.cost(BYTES), forward, backward, strict=True)):
        assert f == cost.forward_bytes, f"rank {rank}: forward sent {f}, predicted {cost}"
        assert b == cost.backward_bytes, f"rank {rank}: backward sent {b}, predicted {cost}"


def row(name, size, forward, backward, how):
    unit = TOTAL // size * HEADS[1] * DIMS * BYTES
    found = [Fraction(sum(sent), size * unit) for sent in (forward, backward)]
    told = formula(name, size)
    assert found == [*told], f"{name}, {size} ranks: sent {found}, the formula says {told}"
    return {
        "algorithm": name,
        "ranks": size,
        "by": how,
        "forward_k": round(float(found[0]), 3),
        "backward_k": round(float(found[1]), 3),
        "busiest_over_mean": round(max(forward) * size / max(sum(forward), 1), 2),
    }


def over_gloo(rank, size):
    rows, whole = [], inputs(TOTAL, HEADS, DIMS)
    for name, options in possible(size).items():
        plan = plan_of(size, options)
        topology = CPTopology(ulysses=plan.ulysses, window=plan.window)
        mine = [plan.layout.shard(x, rank, 1) for x in whole]
        leaves = [x.detach().requires_grad_() for x in mine[:3]]
        out = context_attention(*leaves, plan, topology)
        forward = topology.ledger.bytes
        out.backward(mine[3])
        counts = [None] * size
        dist.all_gather_object(counts, (forward, topology.ledger.bytes - forward))
        sent = [[c[i] for c in counts] for i in (0, 1)]
        check(plan, *sent)
        rows.append(row(name, size, *sent, "gloo"))
    return rows


def simulated(plan):
    whole = inputs(TOTAL, HEADS, DIMS)
    size, record = plan.layout.size, Simulation()
    shards = [[plan.layout.shard(x, r, 1) for r in range(size)] for x in whole]

    def call(*flat):
        parts = [flat[i * size : (i + 1) * size] for i in range(3)]
        return torch.cat(simulate_attention(*parts, plan, record=record), 1)

    step(call, [x for part in shards[:3] for x in part], torch.cat(shards[3], 1))
    sent = [[ledger.bytes for ledger in way] for way in (record.forward, record.backward)]
    check(plan, *sent)
    return sent


def pruned():
    """Bytes of pruned rings by those of full ones, all ranks, both directions; measured."""
    rows = []
    quarter = TOTAL // 4
    masks = {
        "causal": (),
        "4 documents": tuple(range(0, TOTAL + 1, quarter)),
        "16 documents": tuple(range(0, TOTAL + 1, quarter // 4)),
    }
    for size in (2, 4, 8, 16, 32):
        for name, documents in masks.items():
            plans = [plan_of(size, {"pruned": way}, documents) for way in (True, False)]
            if size <= MOST:
                sent, full = (sum(map(sum, simulated(plan))) for plan in plans)
            else:
                sent, full = (
                    sum(c.forward_bytes + c.backward_bytes for c in plan.cost(BYTES))
                    for plan in plans
                )
            rows.append({"ranks": size, "mask": name, "pruned_over_full": round(sent / full, 4)})
            print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    rows = [found for size in (2, 4) for found in on_ranks(over_gloo, size)]
    rows += [
        row(name, MOST, *simulated(plan_of(MOST, algorithm)), "simulated")
        for name, algorithm in possible(MOST).items()
    ]
    for line in rows:
        print(line, flush=True)
    content = {"environment": environment(), "heads": HEADS, "rows": rows, "pruned": pruned()}
    if not options.no_write:
        write("traffic", content)


if __name__ == "__main__":
    main()
