"""Error of bf16 attention to fp64 as one sequence is divided among 1 to 32 ranks.

    python -m benchmarks context/precision

Ranks are simulated in one process. "ours" accumulates in fp32 and rounds once; "rounded each step"
is the same zigzag ring with output, dQ and the travelling dK and dV rounded to bf16 after each
step, as implementations do that keep them in the input's dtype. Errors are norms of the difference
by the norm of the fp64 result. Ours must be flat: at most 1.3 times that of one rank, at any P.
"""

import argparse

import torch
from ranks import attend, environment, inputs, step, write

import ms_ops
from ms_parallel.context import AttnMask, SeqLayout, plan_attention, simulate_attention

TENSORS = ("out", "dq", "dk", "dv")
HEADS, DIMS = (2, 1), 64


def ours(whole, size):
    total = whole[0].shape[1]
    layout = SeqLayout.zigzag(total, size)
    plan = plan_attention(layout, AttnMask.causal(), heads=HEADS, head_dims=(DIMS, DIMS))

    def call(*qkv):
        shards = ([layout.shard(x, r, 1) for r in range(size)] for x in qkv)
        return layout.unshard(simulate_attention(*shards, plan), 1)

    return step(call, whole[:3], whole[3])


def rounded(x):
    return x.bfloat16().float()


def rounded_ring(whole, size):
    """The zigzag ring, each partial result in fp32, what is kept from step to step in bf16."""
    q, k, v, dout = (x.float() for x in whole)
    layout = SeqLayout.zigzag(q.shape[1], size)
    at = [layout.local_index(rank) for rank in range(size)]
    outs, stats = [], []
    for rank in range(size):
        out = lse = None
        for owner in ((rank - t) % size for t in range(size)):
            mask = at[rank][:, None] >= at[owner][None, :]
            qkv = (q[:, at[rank]], k[:, at[owner]], v[:, at[owner]])
            part, more = ms_ops.attention(*qkv, mask=mask, return_lse=True)
            if out is None:
                out, lse = rounded(part), more
            else:
                out, lse = ms_ops.attention_merge(out, lse, part, more)
                out = rounded(out)
        outs.append(out)
        stats.append(lse)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for t in range(size):
        for rank in range(size):
            owner = (rank - t) % size
            mask = at[rank][:, None] >= at[owner][None, :]
            given = (dout[:, at[rank]], q[:, at[rank]], k[:, at[owner]], v[:, at[owner]])
            grads = ms_ops.attention_backward(*given, outs[rank], stats[rank], mask=mask)
            for total, rows, grad in zip(
                (dq, dk, dv), (at[rank], at[owner], at[owner]), grads, strict=True
            ):
                total[:, rows] = rounded(total[:, rows] + grad)
    return [layout.unshard(outs, 1), dq, dk, dv]


def errors(found, exact):
    return {
        name: float(f"{((a.double() - b).norm() / b.norm()).item():.3g}")
        for name, a, b in zip(TENSORS, found, exact, strict=True)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--total", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16, 32])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    whole = inputs(options.total, HEADS, DIMS, torch.bfloat16)
    exact = step(attend, [x.double() for x in whole[:3]], whole[3].double())
    head = {"environment": environment(), "tokens": options.total, "heads": HEADS, "channels": DIMS}
    rows = []
    for size in options.ranks:
        found = {"ours": ours(whole, size), "rounded each step": rounded_ring(whole, size)}
        rows.append({"ranks": size, **{name: errors(x, exact) for name, x in found.items()}})
        print(rows[-1], flush=True)
        for name in TENSORS:
            now, one = (r["ours"][name] for r in (rows[-1], rows[0]))
            assert now <= 1.3 * one, f"{name}: {now} at {size} ranks, {one} at {options.ranks[0]}"
        if not options.no_write:
            write("precision", {**head, "rows": rows})


if __name__ == "__main__":
    main()
