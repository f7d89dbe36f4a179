"""Time of attention over a divided sequence: ours, other libraries, and without communication.

    python -m benchmarks context/speed --total 4096 --rounds 7

Before anything is timed, output and gradients of every contender are compared with one process in
fp64. Peers that need FlashAttention get a stand-in on the same CPU kernel as ours, so that what is
compared is communication, merging and scheduling; peers that are missing or cannot run are named
with the reason. "blocks only" is our ring without communication on all ranks, "blocks alone" the
same on rank 0 while the others wait: what no communication could be faster than.
"""

import argparse

import torch
import torch.distributed as dist
from contenders import OURS, PEERS, Setting, compute_only, ours
from ranks import environment, gate, inputs, interleave, on_ranks, ratios, step, truth, write

HEADS, DIMS = (8, 4), 64
BASE = "ring"


def documents(total):
    """Half, a quarter and two eighths: multiples of 2P, which some peers need."""
    return (0, total // 2, total * 3 // 4, total * 7 // 8, total)


def admitted(makers, setting, whole, expected):
    """Contenders that run and are right here, with their tensors; errors; why others do not."""
    from ms_profile import CommMeter

    rank, runs, errors, sent, refused = dist.get_rank(), {}, {}, {}, {}
    for name, make in makers.items():
        try:
            layout, call = make(setting)
            local = [layout.shard(x, rank, 1) for x in whole]
            with CommMeter() as meter:
                found = step(call, local[:3], local[3])
            wanted = [layout.shard(x, rank, 1) for x in expected]
            errors[name] = gate(name, found, wanted)
        except (ImportError, AssertionError, RuntimeError, TypeError, ValueError) as e:
            if name not in PEERS:
                raise
            refused[name] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            continue
        sent[name] = call.ledger.bytes if name not in PEERS else meter.total()
        runs[name] = lambda call=call, t=local: step(call, t[:3], t[3])
    return runs, errors, sent, refused


def compare(rank, size, total, rounds):
    return [compare_one(rank, size, total, packed, rounds) for packed in (False, True)]


def compare_one(rank, size, total, packed, rounds):
    setting = Setting(size, total, HEADS, DIMS, documents(total) if packed else ())
    whole = inputs(total, HEADS, DIMS, torch.bfloat16)
    makers = {**OURS, **({"usp 2 x 2": ours(algorithm="usp", ulysses=2)} if size == 4 else {})}
    found = admitted({**makers, **PEERS}, setting, whole, truth(whole, setting.documents))
    runs, errors, sent, refused = found
    local = [setting.zigzag.shard(x, rank, 1) for x in whole]
    blocks = compute_only(setting)
    runs["blocks only"] = lambda: blocks(*local)
    runs["blocks alone"] = lambda: blocks(*local)
    times = interleave(runs, rounds, alone=("blocks alone",))
    relative = ratios(times, BASE)
    return {
        "ranks": size,
        "mask": "packed" if packed else "causal",
        "tokens": total,
        "heads": HEADS,
        "channels": DIMS,
        "dtype": "bfloat16",
        "ring_ms": round(sorted(times[BASE])[len(times[BASE]) // 2] * 1e3, 1),
        "time_over_ring": {n: r for n, r in relative.items() if n != BASE},
        "percent_of_blocks_only": round(100 * relative["blocks only"]),
        "sent_bytes_of_rank_0": sent,
        "relative_error": {n: float(f"{e:.2g}") for n, e in errors.items()},
        "does_not_run": refused,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--total", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    head = {"environment": environment(), "rounds": options.rounds}
    rows = []
    for size in options.ranks:
        rows += on_ranks(compare, size, options.total, options.rounds)
        for row in rows[-2:]:
            print(row, flush=True)
        if not options.no_write:
            write("speed", {**head, "rows": rows})


if __name__ == "__main__":
    main()
