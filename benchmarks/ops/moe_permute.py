"""Permutation by expert and its inverse against the unfused functions of Megatron-LM.

    python -m benchmarks ops/moe_permute --threads 1

Forward and backward, one interleaved run; results are compared before anything is timed.
"""

import argparse
import json
import statistics

import torch
from driver import environment, interleave, write
from megatron.core.transformer.moe import moe_utils

import ms_ops

# Tokens, channels, experts of a token, experts.
SHAPES = ((2048, 256, 2, 8), (2048, 1024, 2, 8), (4096, 512, 8, 64), (4096, 256, 4, 256))


def routing(tokens, k, experts):
    indices = torch.rand(tokens, experts).topk(k, 1).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, indices, True)
    return routing_map, torch.rand(tokens, experts) * routing_map


def grads(out, leaves, dy):
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


def contenders(shape, dtype):
    """Return, for each task, one function a contender; each returns its tensors."""
    tokens, width, k, experts = shape
    torch.manual_seed(5)
    routing_map, probs = routing(tokens, k, experts)
    probs.requires_grad_()
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    rows = torch.randn(tokens * k, width).to(dtype).requires_grad_()
    row_grad, out_grad = torch.randn_like(rows), torch.randn_like(x)
    ours = ms_ops.moe_permute_map(x.detach(), routing_map, None, tokens * k)[2]
    theirs = moe_utils.permute(x.detach(), routing_map)[2]

    def our_permute():
        out = ms_ops.moe_permute_map(x, routing_map, None, tokens * k)[0]
        return grads(out, [x], row_grad)

    def their_permute():
        return grads(moe_utils.permute(x, routing_map)[0], [x], row_grad)

    def our_sum(weights):
        out = ms_ops.moe_unpermute_map(rows, ours, routing_map, weights)
        return grads(out, [rows] if weights is None else [rows, weights], out_grad)

    def their_sum(weights):
        out = moe_utils.unpermute(rows, theirs, x.shape, weights, routing_map)
        return grads(out, [rows] if weights is None else [rows, weights], out_grad)

    return {
        "permute": (our_permute, their_permute),
        "combine": (lambda: our_sum(None), lambda: their_sum(None)),
        "weighted combine": (lambda: our_sum(probs), lambda: their_sum(probs)),
    }


def gate(ours, theirs, dtype, name):
    """Compare tensors; both round, so that they agree within a few roundings."""
    rtol = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for mine, other in zip(ours, theirs, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(
            mine,
            other,
            rtol=rtol,
            atol=rtol * scale,
            check_dtype=False,
            msg=lambda m: f"{name} {m}",
        )


def measure(shape, dtype, rounds):
    row = {"shape": dict(zip(("T", "H", "k", "E"), shape, strict=True))}
    row["dtype"] = str(dtype).removeprefix("torch.")
    for name, (ours, theirs) in contenders(shape, dtype).items():
        gate(ours(), theirs(), dtype, name)
        times = interleave({"ms_ops": ours, "megatron": theirs}, rounds)
        ratio = statistics.median(
            a / b for a, b in zip(times["megatron"], times["ms_ops"], strict=True)
        )
        row[name] = {
            "times_as_fast_as_megatron": round(ratio, 2),
            "median_ms": {n: round(statistics.median(t) * 1e3, 2) for n, t in times.items()},
        }
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
        write(
            "moe_permute", {"environment": environment(), "rounds": options.rounds, "rows": result}
        )
