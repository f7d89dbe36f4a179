"""Operators that communicate, in one process: from the arguments of all ranks to their outputs.

Each function takes the tensors of all ranks, the sizes of the inner and the outer group and the
options of the call. What several ranks hold alike is one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Ranks = Sequence[Mapping[str, Any]]
Sizes = tuple[int, int]
Outputs = Sequence[tuple[Tensor, ...]]


def _product(ranks: Ranks, transpose: bool, first: str = "a", second: str = "b") -> list[Tensor]:
    return [r[first] @ (r[second].t() if transpose else r[second]) for r in ranks]


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else (y + bias).to(y.dtype)


def matmul_all_reduce(ranks: Ranks, sizes: Sizes, transpose_b: bool = False) -> Outputs:
    """Sum the products of all ranks."""
    y = _plus(sum(_product(ranks, transpose_b), torch.tensor(0)), ranks[0]["bias"])
    return [(y,)] * len(ranks)


def all_gather_matmul(
    ranks: Ranks,
    sizes: Sizes,
    transpose_b: bool = False,
    return_gathered: bool = False,
    save_gathered: bool = False,
) -> Outputs:
    """Multiply the rows of all ranks by each rank's matrix."""
    outputs = []
    for rank in ranks:
        rows = torch.cat([r["a"] for r in ranks])
        matrix = rank["b"].t() if transpose_b else rank["b"]
        y = _plus(rows @ matrix, rank["bias"])
        outputs.append((y, rows) if return_gathered else (y,))
    return outputs


def matmul_reduce_scatter(ranks: Ranks, sizes: Sizes, transpose_b: bool = False) -> Outputs:
    """Share the rows of the sum out to the ranks."""
    total = sum(_product(ranks, transpose_b), torch.tensor(0))
    parts = total.tensor_split(len(ranks))
    return [(_plus(part, rank["bias"]),) for part, rank in zip(parts, ranks, strict=True)]


def all_gather_matmul_reduce_scatter(
    ranks: Ranks,
    sizes: Sizes,
    transpose_b: bool = False,
    return_gathered: bool = False,
    save_gathered: bool = False,
) -> Outputs:
    """Gather over consecutive ranks, multiply, sum and scatter over the ranks across."""
    inner, outer = sizes
    outputs = []
    for rank in range(sizes[0] * sizes[1]):
        i, j = rank % inner, rank // inner
        gathered = [torch.cat([r["a"] for r in ranks[c * inner :][:inner]]) for c in range(outer)]
        across = [{"a": gathered[c], "b": ranks[c * inner + i]["b"]} for c in range(outer)]
        total = sum(_product(across, transpose_b), torch.tensor(0))
        y = _plus(total.tensor_split(outer)[j], ranks[rank]["bias"])
        outputs.append((y, gathered[j]) if return_gathered else (y,))
    return outputs


def add_norm(
    ranks: Ranks, sizes: Sizes, transpose_weight: bool = False, eps: float = 1e-6
) -> Outputs:
    """Sum the products, add the residual, normalise."""
    first = ranks[0]
    total = sum(_product(ranks, transpose_weight, "x", "weight"), torch.tensor(0))
    y = _plus(total, first["bias"]) + first["residual"]
    normed = F.rms_norm(y, first["gamma"].shape, first["gamma"].to(y.dtype), eps)
    return [(y, normed)] * len(ranks)


def grouped(
    ranks: Ranks, sizes: Sizes, offsets: Sequence[int] = (), transpose_weight: bool = False
) -> Outputs:
    """Sum the products of each group of rows."""
    first, parts = ranks[0], []
    for group, end in enumerate(offsets):
        start = offsets[group - 1] if group else 0
        pairs = [{"x": r["x"][start:end], "weight": r["weight"][group]} for r in ranks]
        total = sum(_product(pairs, transpose_weight, "x", "weight"), torch.tensor(0))
        parts.append(total if first["bias"] is None else _plus(total, first["bias"][group]))
    return [(torch.cat(parts),)] * len(ranks)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "fastgelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def dispatch(
    ranks: Ranks,
    sizes: Sizes,
    shard: str = "hidden",
    activation: str = "none",
    return_gathered: bool = False,
    return_product: bool = False,
    save_gathered: bool = True,
) -> Outputs:
    """Bring every expert's rows together, multiply and activate."""
    tp, ep = sizes
    outputs = []
    for rank in range(sizes[0] * sizes[1]):
        experts = ranks[rank]["weight"].shape[0]
        dim = 2 if shard == "hidden" else 1
        whole = [torch.cat([r["x"] for r in ranks[s * tp :][:tp]], dim) for s in range(ep)]
        mine = [x[rank // tp * experts :][:experts] for x in whole]
        rows, bias = torch.cat(mine, 1), ranks[rank]["bias"]
        z = rows @ ranks[rank]["weight"]
        z = z if bias is None else _plus(z, bias.unsqueeze(1))
        y = z.clone() if activation == "none" else ACTIVATIONS[activation](z)
        outputs.append((y, *[rows] * return_gathered, *[z] * return_product))
    return outputs


def combine(ranks: Ranks, sizes: Sizes, shard: str = "hidden") -> Outputs:
    """Sum over tp, and give each rank its rows of all experts."""
    tp, ep = sizes
    outputs = []
    for rank in range(sizes[0] * sizes[1]):
        t, s = rank % tp, rank // tp
        parts = []
        for e in range(ep):
            products = [r["x"] @ r["weight"] for r in ranks[e * tp :][:tp]]
            total = sum(products, torch.tensor(0)).tensor_split(ep, 1)[s]
            part = total.tensor_split(tp, 2 if shard == "hidden" else 1)[t]
            bias = ranks[e * tp + t]["bias"]
            parts.append(part if bias is None else _plus(part, bias.unsqueeze(1)))
        outputs.append((torch.cat(parts),))
    return outputs
