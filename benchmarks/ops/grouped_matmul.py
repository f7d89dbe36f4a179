"""Grouped products, forward and backward, against one product a group and padded batched products.

    python -m benchmarks ops/grouped_matmul --threads 1

Results are compared before anything is timed; each pair runs interleaved.
"""

import argparse
import json
import statistics

import torch
from driver import environment, interleave, write

import ms_ops

# Rows, groups, columns of x, columns of y, whether all groups have one size.
SHAPES = (
    (256, 8, 64, 128, True),
    (512, 8, 256, 512, False),
    (512, 8, 256, 512, True),
    (2048, 8, 512, 512, False),
    (2048, 64, 256, 256, False),
    (2048, 64, 256, 256, True),
    (1024, 8, 250, 510, False),
)


def sizes_of(rows, groups, equal):
    if equal:
        return [rows // groups] * groups
    share = torch.softmax(torch.randn(groups), 0)
    return torch.multinomial(share, rows, True).bincount(minlength=groups).tolist()


def loop(x, weight, sizes):
    return torch.cat([a @ b for a, b in zip(x.split(sizes), weight.unbind(0), strict=True)])


def padded(x, weight, sizes):
    parts = torch.nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True)
    y = torch.bmm(parts, weight)
    return torch.cat([part[:size] for part, size in zip(y, sizes, strict=True)])


def measure(shape, dtype, rounds):
    rows, groups, inner, outer, equal = shape
    torch.manual_seed(3)
    sizes = sizes_of(rows, groups, equal)
    ends = torch.tensor(sizes).cumsum(0)
    x = torch.randn(rows, inner).to(dtype).requires_grad_()
    weight = torch.randn(groups, inner, outer).to(dtype).requires_grad_()
    dy = torch.randn(rows, outer).to(dtype)

    def step(forward):
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]

    runs = {
        "ms_ops": lambda: step(lambda: ms_ops.grouped_matmul(x, weight, ends)),
        "loop": lambda: step(lambda: loop(x, weight, sizes)),
        "padded": lambda: step(lambda: padded(x, weight, sizes)),
    }
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, other in zip(runs["ms_ops"](), runs["loop"](), strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * scale)
    row = {
        "shape": dict(zip(("T", "E", "K", "N", "equal"), shape, strict=True)),
        "dtype": str(dtype).removeprefix("torch."),
        "times_as_fast_as": {},
        "median_ms": {},
    }
    # Pair by pair: what follows the padded product pays for the memory that it gave back.
    for peer in ("loop", "padded"):
        times = interleave({name: runs[name] for name in ("ms_ops", peer)}, rounds)
        ratios = (b / a for a, b in zip(times["ms_ops"], times[peer], strict=True))
        row["times_as_fast_as"][peer] = round(statistics.median(ratios), 2)
        row["median_ms"][peer] = [round(statistics.median(t) * 1e3, 2) for t in times.values()]
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = []
    for kind in (torch.float32, torch.bfloat16):
        for size in SHAPES:
            result.append(measure(size, kind, options.rounds))
            print(json.dumps(result[-1]), flush=True)
    if not options.no_write:
        content = {"environment": environment(), "rounds": options.rounds, "rows": result}
        write("grouped_matmul", content)
