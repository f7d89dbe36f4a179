"""What torch_npu's documents leave open, as probes: small calls whose results answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...masks import compressed_causal


def answers(device: str) -> dict[str, Any]:
    """Run all probes on a device; one that raises is answered with its error."""
    found: dict[str, Any] = {}
    for name, probe in PROBES.items():
        try:
            found[name] = probe(device)
        except Exception as error:  # an operator that is not there is an answer too
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def empty_rows(device: str) -> dict[str, Any]:
    """Maximum, sum and output of a query without keys, by inner_precise."""
    q, k, v = (_noise(device, 1, n, 1, 16) for n in (4, 2, 2))
    result = {}
    for precise in (0, 2):
        out, top, total = torch.ops.npu.npu_fusion_attention(
            q, k, v, 1, "BSND", atten_mask=compressed_causal(device), scale=0.25,
            sparse_mode=3, inner_precise=precise,
        )[:3]  # fmt: skip
        result[f"inner_precise={precise}"] = {
            "maximum": _number(top[0, 0, 0, 0]),
            "sum": _number(total[0, 0, 0, 0]),
            "output_is_zero": bool((out[0, 0] == 0).all()),
        }
    return result


def row_maximum(device: str) -> dict[str, Any]:
    """Whether the maximum under a causal mode is that of the row, or a bound above it."""
    q, k, v = (_noise(device, 1, 300, 1, 16) for _ in range(3))
    top = torch.ops.npu.npu_fusion_attention(
        q, k, v, 1, "BSND", atten_mask=compressed_causal(device), scale=0.25, sparse_mode=2
    )[1]
    scores = (q[0, :, 0].float().cpu() @ k[0, :, 0].float().cpu().t()) * 0.25
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return {"largest_gap": _number((top[0, 0, :, 0].cpu() - scores.amax(-1)).abs().max())}


def rope_backward_without_x(device: str) -> dict[str, Any]:
    """Whether the gradient of x depends on what stands in the place of x."""
    x, dy = _noise(device, 4, 1, 2, 64), _noise(device, 4, 1, 2, 64).flip(0)
    cos, sin = _noise(device, 4, 1, 1, 64), _noise(device, 4, 1, 1, 64).flip(0)
    run = torch.ops.npu.npu_rotary_mul_backward
    same = torch.equal(run(dy, x, cos, sin)[0], run(dy, dy, cos, sin)[0])
    return {"same_without_x": same}


def swiglu_half(device: str) -> dict[str, Any]:
    """Largest relative error of fp16 SwiGLU: 2^-11 means fp32 inside."""
    x = _noise(device, 64, 256, dtype=torch.float16)
    got = torch.ops.npu.npu_swiglu(x, dim=-1).double().cpu()
    gate, up = x.double().cpu().chunk(2, -1)
    truth = gate * torch.sigmoid(gate) * up
    error = (got - truth).abs() / truth.abs()
    return {"relative_error": _number(error[truth.abs() > 1e-3].max())}


def grouped_add(device: str) -> dict[str, Any]:
    """Whether accumulation of grouped weight gradients is right, and an empty group kept."""
    total, x, dy = (
        torch.ones(3, 32, 16, device=device),
        _noise(device, 8, 32),
        _noise(device, 8, 16),
    )
    x, dy = x.bfloat16(), dy.bfloat16()
    ends = torch.tensor([3, 3, 8], device=device)
    torch.ops.npu.npu_grouped_matmul_add_(total, x, dy, ends)
    wide = x.double().cpu(), dy.double().cpu()
    truth = torch.stack([wide[0][a:b].t() @ wide[1][a:b] + 1 for a, b in ((0, 3), (3, 3), (3, 8))])
    error = _number((total.double().cpu() - truth).abs().max())
    return {"largest_error": error, "seconds": _grouped_seconds(device)}


def _grouped_seconds(device: str) -> dict[str, float]:
    """Time of the accumulation, and of a grouped product that is added after."""
    rows, groups, width = 1024, 8, 256
    x, dy = (_noise(device, rows, width).roll(i, 0).bfloat16() for i in (0, 1))
    total = torch.zeros(groups, width, width, device=device)
    ends = torch.arange(1, groups + 1, device=device) * (rows // groups)

    def product() -> Tensor:
        run = torch.ops.npu.npu_grouped_matmul
        weights = run([x.t()], [dy], group_list=ends, split_item=3, group_type=2)[0]
        return total.add_(weights)

    calls = {
        "in place": lambda: torch.ops.npu.npu_grouped_matmul_add_(total, x, dy, ends),
        "product and sum": product,
    }
    return {name: _seconds(call, total[0]) for name, call in calls.items()}


def masked_softmax(device: str) -> dict[str, Any]:
    """What the softmax puts into a row that is all masked, and whether it takes sizes by 16."""
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool, device=device)
    mask[0, 0, 0] = True
    run, x = torch.ops.npu.npu_scaled_masked_softmax, _noise(device, 1, 1, 32, 32)
    row = run(x, mask, 1.0, False)[0, 0, 0]

    def sixteens() -> bool:
        y = run(x[..., :16].contiguous(), mask[..., :16].contiguous(), 1.0, False)
        return bool(torch.allclose(y[0, 0, 1], torch.softmax(x[0, 0, 1, :16], -1), atol=1e-5))

    return {"masked row": _number(row[0]), "rows of 16 are right": _tried(sixteens)}


def wide_product(device: str) -> dict[str, Any]:
    """Error and time of torch's product of bf16 matrices into fp32, beside one of fp32 copies."""
    x, dy = (_noise(device, 512, 512).roll(shift, 0).bfloat16() for shift in (0, 1))
    total = torch.zeros(512, 512, device=device)
    truth = dy.double().cpu().t() @ x.double().cpu()
    torch.addmm(total, dy.t(), x, out_dtype=torch.float32, out=total)
    error = (total.double().cpu() - truth).abs().max() / truth.abs().max()
    calls: dict[str, Callable[[], Any]] = {
        "out_dtype": lambda: torch.addmm(total, dy.t(), x, out_dtype=torch.float32, out=total),
        "copies": lambda: total.addmm_(dy.t().float(), x.float()),
    }
    seconds = {name: _seconds(call, total) for name, call in calls.items()}
    return {"relative_error": _number(error), "seconds": seconds}


def _seconds(call: Callable[[], Any], result: Tensor) -> float:
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        # Reading a value waits for the device.
        float(result[0, 0])
        taken.append(time.perf_counter() - start)
    return sorted(taken)[2]


def permute_dtypes(device: str) -> dict[str, Any]:
    """Which dtypes the permutation of tokens takes."""
    indices = torch.tensor([[1, 0], [0, 2]], device=device)
    result = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tokens = _noise(device, 2, 16, dtype=dtype)
        permuted = torch.ops.npu.npu_moe_token_permute(tokens, indices, 4, False)[0]
        result[str(dtype).removeprefix("torch.")] = torch.equal(permuted[0], tokens[0])
    return {**result, "choices": {str(n): _tried(partial(_permutes, device, n)) for n in CHOICES}}


def _permutes(device: str, choices: int) -> bool:
    """Whether a permutation of so many choices, eight a token, is right."""
    tokens = torch.arange(choices // 8, device=device).unsqueeze(1).expand(-1, 16).float()
    indices = torch.arange(choices, device=device).view(-1, 8).flip(0) % 64
    rows = torch.ops.npu.npu_moe_token_permute(tokens.contiguous(), indices, choices, False)[0]
    return torch.equal(rows[:, 0].long(), indices.view(-1).argsort(stable=True) // 8)


def deterministic_groups(device: str) -> str:
    """Whether HCCL reads HCCL_DETERMINISTIC after a group was made."""
    return "not asked: it takes a group of two devices"


def merge_ends(device: str) -> dict[str, Any]:
    """Whether lengths are ends or start from 0 in the packed update of ring attention.

    For each storage of the statistics and each list: whether the result is right, or the error.
    """
    outs = [_noise(device, 5, 2, 64).roll(shift, 0) for shift in (0, 1)]
    sums = [_noise(device, 5, 2).roll(shift, 0) for shift in (0, 1)]
    share = torch.sigmoid(sums[0] - sums[1]).unsqueeze(-1)
    truth = outs[1] + share * (outs[0] - outs[1])
    result: dict[str, Any] = {}
    for storage in ("", "TND"):
        tops = [s.unsqueeze(-1).expand(5, 2, 8) for s in sums]
        if not storage:
            tops = [torch.cat([t[a:b].transpose(0, 1).reshape(-1) for a, b in ((0, 2), (2, 5))])
                    .view(5, 2, 8) for t in tops]  # fmt: skip
        tops = [t.contiguous() for t in tops]
        for name, ends in (("ends", [2, 5]), ("from 0", [0, 2, 5])):
            lengths = torch.tensor(ends, device=device)
            right = _tried(partial(_merges, outs, tops, truth, lengths, storage))
            result[f"{storage or 'blocks'}, {name}"] = right
    return result


def _merges(
    outs: list[Tensor], tops: list[Tensor], truth: Tensor, lengths: Tensor, storage: str
) -> bool:
    ones = torch.ones_like(tops[0])
    out = torch.ops.npu.npu_ring_attention_update(
        outs[0], tops[0], ones, outs[1], tops[1], ones,
        actual_seq_qlen=lengths, input_layout="TND", input_softmax_layout=storage,
    )[0]  # fmt: skip
    return torch.allclose(out, truth, atol=1e-4)


def routing_maps(device: str) -> dict[str, Any]:
    """What the permutation by a map does with fp32 weights, unequal choices and a capacity."""
    tokens = _noise(device, 3, 16, dtype=torch.bfloat16)
    equal = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]], device=device).bool()
    unequal = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 1]], device=device).bool()
    probs = _noise(device, 3, 3)

    def run(routing_map: Tensor, **options: Any) -> Any:
        op = torch.ops.npu.npu_moe_token_permute_with_routing_map
        return op(tokens, routing_map, num_out_tokens=6, **options)

    def weights() -> bool:
        return torch.equal(run(equal, probs=probs)[1], probs.t()[equal.t()])

    def choices() -> bool:
        return torch.equal(run(unequal)[0], tokens[unequal.t().nonzero()[:, 1]])

    def capacity() -> list[int]:
        rows: list[int] = run(unequal, drop_and_pad=True)[2].tolist()
        return rows

    return {
        "fp32 weights are right": _tried(weights),
        "unequal choices are right": _tried(choices),
        "rows of a capacity of 2": _tried(capacity),
    }


def _tried(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except RuntimeError as error:
        return f"RuntimeError: {error}"[:200]


def _noise(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def _number(x: Tensor) -> float | str:
    value = float(x)
    return value if math.isfinite(value) else str(value)


CHOICES = (2**16, 2**20)
PROBES: dict[str, Callable[[str], Any]] = {
    "attention: rows without keys": empty_rows,
    "attention: maximum of a row": row_maximum,
    "attention_merge: lengths of a pack": merge_ends,
    "rope: backward without x": rope_backward_without_x,
    "swiglu: fp16": swiglu_half,
    "scaled_masked_softmax: masked rows and sizes": masked_softmax,
    "grouped_matmul_add_: accumulation": grouped_add,
    "matmul_add_: torch's product into fp32": wide_product,
    "moe_permute: dtypes and choices": permute_dtypes,
    "moe_permute_map: weights, choices, capacity": routing_maps,
    "hccl: order of reduction": deterministic_groups,
}
