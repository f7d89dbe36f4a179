"""Operators that communicate: samples of all ranks, and their simulation in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ms_ops import comm

from ..case import Make, maker
from ..comm import CommSample, CommTest
from . import simulated
from .simulated import Sizes


def _all(sizes: Sizes) -> range:
    return range(sizes[0] * sizes[1])


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _strided(tensor: Tensor) -> Tensor:
    """Return the same values with other strides."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _reduce_samples(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[CommSample]:
    """Inner dimensions that differ from rank to rank."""
    make, world = maker(dtype, device), sizes[0] * sizes[1]
    rows = 4 * world

    def ranks(
        shape: tuple[int, ...], transpose: bool, bias: Tensor | None, n: int = 6, least: int = 5
    ) -> tuple[Any, ...]:
        made = []
        for rank in range(world):
            k = least + 2 * rank
            b = make(n, k) if transpose else make(k, n)
            made.append({"a": make(*shape, k), "b": b, "bias": bias})
        return tuple(made)

    yield CommSample("bias", ranks((rows,), False, make(6)))
    leading = ranks((rows, 3), True, make(6, dtype=_wider(dtype)))
    leading = tuple({**r, "a": _strided(r["a"])} for r in leading)
    yield CommSample("leading_transposed", leading, {"transpose_b": True})
    turned = tuple({**r, "b": _strided(r["b"])} for r in ranks((rows,), False, None))
    yield CommSample("strided_b", turned)
    # NPU kernels take inner dimensions from 256: here one rank's is, the others' are above.
    yield CommSample("around_256", ranks((world,), True, None, 3, 255), {"transpose_b": True})
    wide = ranks((world,), False, make(256), 257, 257)
    yield CommSample("wide_sliced_b", tuple({**r, "b": r["b"][:, 1:]} for r in wide))
    yield CommSample("no_rows", ranks((0,), False, make(6)))


def _gather_samples(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[CommSample]:
    """Columns that differ between the ranks that gather the same rows."""
    make = maker(dtype, device)
    inner, outer = sizes

    def ranks(
        shape: tuple[int, ...], transpose: bool, bias: bool = True, k: int = 9
    ) -> tuple[Any, ...]:
        made: list[dict[str, Any]] = []
        for rank in _all(sizes):
            # All ranks of the outer group sum results of one shape, and add one bias. The first
            # matrix is square: what is transposed cannot be told from its shape.
            n = 9 + rank % inner
            b = make(n, k) if transpose else make(k, n)
            same = made[rank % inner]["bias"] if rank >= inner else make(n) if bias else None
            made.append({"a": make(*shape, k), "b": b, "bias": same})
        return tuple(made)

    rows = 8 * outer
    yield CommSample("returned", ranks((rows,), False), {"return_gathered": True})
    leading = ranks((rows, 2), True)
    leading = tuple({**r, "a": _strided(r["a"])} for r in leading)
    yield CommSample("leading_transposed", leading, {"transpose_b": True})
    yield CommSample("saved", ranks((rows,), False, False), {"save_gathered": True})
    yield CommSample("wide", ranks((outer,), False, k=256), {"return_gathered": True})
    yield CommSample("wide_again", ranks((outer,), True, k=257), {"transpose_b": True})
    yield CommSample("no_rows", ranks((0,), False), {"return_gathered": True})


def _norm_samples(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[CommSample]:
    make, world = maker(dtype, device), sizes[0] * sizes[1]

    def ranks(shape: tuple[int, ...], turn: bool, bias: bool, gamma: Tensor) -> tuple[Any, ...]:
        same = {"residual": make(*shape, 6), "gamma": gamma, "bias": make(6) if bias else None}
        sizes = [5 + 2 * rank for rank in range(world)]
        weights = [make(6, k) if turn else make(k, 6) for k in sizes]
        return tuple(
            {"x": make(*shape, k), "weight": w, **same} for k, w in zip(sizes, weights, strict=True)
        )

    yield CommSample("bias", ranks((8, 3), False, True, make(6)))
    wide = ranks((7,), True, False, make(6, dtype=_wider(dtype)))
    yield CommSample("wide_gamma_transposed", wide, {"transpose_weight": True, "eps": 1e-3})
    yield CommSample("no_rows", ranks((0,), False, True, make(6)))


def _grouped_samples(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[CommSample]:
    make, world = maker(dtype, device), sizes[0] * sizes[1]

    def ranks(rows: int, turn: bool, bias: Tensor | None) -> tuple[Any, ...]:
        made = []
        for rank in range(world):
            k = 5 + 2 * rank
            weight = make(3, 6, k) if turn else make(3, k, 6)
            made.append({"x": make(rows, k), "weight": weight, "bias": bias})
        return tuple(made)

    yield CommSample("bias", ranks(9, False, make(3, 6)), {"offsets": [4, 4, 9]})
    turned = {"offsets": [1, 7, 9], "transpose_weight": True}
    yield CommSample("transposed", ranks(9, True, None), turned)
    yield CommSample("no_rows", ranks(0, False, make(3, 6)), {"offsets": [0, 0, 0]})


def _dispatch_ranks(make: Make, sizes: Sizes, rows: int, shard: str, bias: bool) -> tuple[Any, ...]:
    tp, ep = sizes
    made = []
    for rank in _all(sizes):
        x = make(2 * ep, rows * tp, 3) if shard == "hidden" else make(2 * ep, rows, 3 * tp)
        columns = 4 + rank % tp
        weight = make(2, 3 * tp, columns)
        made.append({"x": x, "weight": weight, "bias": make(2, columns) if bias else None})
    return tuple(made)


def _dispatch_samples(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[CommSample]:
    make = maker(dtype, device)
    both = {"return_gathered": True, "return_product": True}
    calls: tuple[tuple[str, int, str, bool, dict[str, Any]], ...] = (
        ("hidden_all_returned", 3, "hidden", True, {"activation": "gelu", **both}),
        ("hidden_again", 2, "hidden", False, {"save_gathered": False}),
        ("capacity", 3, "capacity", True, {"activation": "silu"}),
        ("capacity_again", 1, "capacity", True, {"activation": "relu", "save_gathered": False}),
        ("capacity_product", 2, "capacity", True, {"activation": "fastgelu", **both}),
        ("no_rows", 0, "capacity", True, {"return_gathered": True}),
    )
    for name, rows, shard, bias, options in calls:
        ranks = _dispatch_ranks(make, sizes, rows, shard, bias)
        yield CommSample(name, ranks, {"shard": shard, **options})


def _combine_samples(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[CommSample]:
    make = maker(dtype, device)
    tp, ep = sizes
    for name, rows, shard in (("hidden", 3, "hidden"), ("capacity", 2, "capacity")):
        made: list[dict[str, Any]] = []
        for rank in _all(sizes):
            inner = 5 + 2 * (rank % tp)
            bias = make(2, 3 if shard == "hidden" else 3 * tp)
            if shard == "capacity" and rank % tp:
                bias = made[rank - rank % tp]["bias"]
            total = ep * rows * (tp if shard == "capacity" else 1)
            x, weight = _strided(make(2, total, inner)), make(2, inner, 3 * tp)
            made.append({"x": x, "weight": weight, "bias": bias})
        yield CommSample(name, tuple(made), {"shard": shard})
        plain = tuple({**r, "bias": None} for r in made)
        yield CommSample(f"{name}_no_bias", plain, {"shard": shard})
    empty = tuple({**r, "x": make(2, 0, 5 + 2 * (i % tp))} for i, r in enumerate(made))
    yield CommSample("no_rows", empty, {"shard": "capacity"})


ONE = ("group",)
EXPERTS = ("tp_group", "ep_group")
GATHERED = ("M", "X")

OPERATORS: dict[str, CommTest] = {
    test.name: test
    for test in (
        CommTest(
            "matmul_all_reduce",
            comm.matmul_all_reduce,
            ONE,
            _reduce_samples,
            simulated.matmul_all_reduce,
            ("M",),
        ),
        CommTest(
            "all_gather_matmul",
            comm.all_gather_matmul,
            ONE,
            _gather_samples,
            simulated.all_gather_matmul,
            GATHERED,
        ),
        CommTest(
            "matmul_reduce_scatter",
            comm.matmul_reduce_scatter,
            ONE,
            _reduce_samples,
            simulated.matmul_reduce_scatter,
            ("M",),
        ),
        CommTest(
            "all_gather_matmul_reduce_scatter",
            comm.all_gather_matmul_reduce_scatter,
            ("gather_group", "scatter_group"),
            _gather_samples,
            simulated.all_gather_matmul_reduce_scatter,
            GATHERED,
        ),
        CommTest(
            "matmul_all_reduce_add_rms_norm",
            comm.matmul_all_reduce_add_rms_norm,
            ONE,
            _norm_samples,
            simulated.add_norm,
            ("M", "M"),
        ),
        CommTest(
            "matmul_all_reduce_add_rms_norm_",
            comm.matmul_all_reduce_add_rms_norm_,
            ONE,
            _norm_samples,
            simulated.add_norm,
            ("M", "M"),
            mutates="residual",
        ),
        CommTest(
            "grouped_matmul_all_reduce",
            comm.grouped_matmul_all_reduce,
            ONE,
            _grouped_samples,
            simulated.grouped,
            ("M",),
        ),
        CommTest(
            "alltoall_allgather_bmm",
            comm.alltoall_allgather_bmm,
            EXPERTS,
            _dispatch_samples,
            simulated.dispatch,
            ("M", "X", "M"),
        ),
        CommTest(
            "bmm_reducescatter_alltoall",
            comm.bmm_reducescatter_alltoall,
            EXPERTS,
            _combine_samples,
            simulated.combine,
            ("M",),
        ),
    )
}
