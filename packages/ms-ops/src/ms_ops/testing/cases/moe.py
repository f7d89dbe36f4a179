"""Tests of the moe family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ms_ops

from ...device import compute_dtype
from ...moe.reference import permute_map
from ..case import ErrorSample, OpTest, Sample, maker


def experts_of(tokens: int, k: int, experts: int, seed: int = 1) -> Tensor:
    """Return [tokens, k] distinct experts for each token, the same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k].contiguous()


def map_of(tokens: int, experts: int, k: int | None = None) -> Tensor:
    """Return a routing map with k experts a token, or with any number when k is None."""
    if k is None:
        generator = torch.Generator().manual_seed(2)
        return torch.rand(tokens, experts, generator=generator) < 0.4
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool)
    return routing_map.scatter_(1, experts_of(tokens, k, experts), True)


def permute_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `moe_permute`."""
    make = maker(dtype, device)
    yield Sample("top2", (make(7, 5), experts_of(7, 2, 4)))
    yield Sample("top3", (make(11, 6), experts_of(11, 3, 4)))
    yield Sample("one_expert", (make(6, 3), torch.zeros(6, dtype=torch.int64)))
    yield Sample("flat", (make(6, 3), experts_of(6, 1, 3).view(-1).int()))
    yield Sample("twice", (make(5, 4), torch.tensor([[1, 1], [0, 2], [2, 2], [0, 0], [1, 0]])))
    yield Sample("some", (make(7, 5), experts_of(7, 2, 4), 9))
    yield Sample("all_but", (make(7, 5), experts_of(7, 2, 4), -3))
    yield Sample("more_than_all", (make(4, 3), experts_of(4, 2, 4), 99))
    yield Sample("no_tokens", (make(0, 5), experts_of(0, 2, 4)))
    yield Sample("transposed", (make(5, 7).t(), experts_of(2, 7, 9).t()))


def permute_errors() -> Iterator[ErrorSample]:
    """Yield calls of `moe_permute` that must raise."""
    make = maker(torch.float32, "cpu")
    tokens, indices = make(4, 3), experts_of(4, 2, 4)
    yield ErrorSample("list", ([1.0], indices), TypeError, "tokens: got list")
    yield ErrorSample("ints", (tokens.long(), indices), TypeError, "tokens: got torch.int64")
    yield ErrorSample("dims", (tokens[0], indices), ValueError, "tokens: got 1 dimensions, need 2")
    yield ErrorSample("floats", (tokens, tokens), TypeError, "need int32 or int64")
    yield ErrorSample("three", (tokens, indices[None]), ValueError, "indices: got 3 dimensions")
    yield ErrorSample("rows", (tokens, indices[1:]), ValueError, "indices: got 3 rows, need 4")
    yield ErrorSample("device", (tokens, indices.to("meta")), RuntimeError, "on one device")


def plain_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the rows and where each choice went, by two sorts."""
    k = indices.shape[1] if indices.dim() == 2 else 1
    order = indices.flatten().argsort(stable=True)
    return tokens[order[: num_out_tokens or None] // k], order.argsort().int()


def unpermute_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `moe_unpermute`."""
    make = maker(dtype, device)

    def call(
        name: str,
        tokens: int,
        k: int,
        rows: int | None = None,
        width: int = 5,
        of: torch.dtype = dtype,
    ) -> Sample:
        order = experts_of(1, tokens * k, tokens * k).view(-1)
        permuted = make(tokens * k if rows is None else rows, width)
        return Sample(name, (permuted, order.int(), make(tokens, k, dtype=of)), {}, (0, 2))

    wide = torch.float64 if dtype is torch.float64 else torch.float32
    yield call("top2", 6, 2)
    yield call("top3", 9, 3)
    yield call("wide_probs", 6, 3, of=wide)
    yield call("dropped", 7, 2, 9, of=wide)
    yield call("all_dropped", 3, 2, 0)
    yield call("no_tokens", 0, 2)
    yield call("no_columns", 3, 2, width=0)
    # More rows than a backend may take as one block.
    yield call("blocks", 70, 3, width=2000, of=wide)
    order = experts_of(1, 8, 8).view(-1)
    yield Sample("no_probs", (make(8, 4), order.int()))
    yield Sample("no_probs_dropped", (make(5, 4), order))
    yield Sample("transposed", (make(4, 8).t(), order.int(), make(2, 4).t()), {}, (0, 2))


def unpermute_errors() -> Iterator[ErrorSample]:
    """Yield calls of `moe_unpermute` that must raise."""
    make = maker(torch.float32, "cpu")
    rows, order, probs = make(6, 3), experts_of(1, 6, 6).view(-1).int(), make(3, 2)
    yield ErrorSample("list", ([1.0], order, probs), TypeError, "permuted: got list")
    yield ErrorSample("dims", (rows[0], order, probs), ValueError, "permuted: got 1 dimensions")
    yield ErrorSample("floats", (rows, rows, probs), TypeError, "sorted_indices: got torch.float32")
    yield ErrorSample("order", (rows, order[None], probs), ValueError, "sorted_indices: got 2 dim")
    yield ErrorSample("more", (rows, order[1:], None), ValueError, "permuted: got 6 rows, need at")
    yield ErrorSample("int_probs", (rows, order, probs.int()), TypeError, "probs: got torch.int32")
    yield ErrorSample("flat_probs", (rows, order, probs.view(-1)), ValueError, "probs: got 1 dim")
    yield ErrorSample("few_probs", (rows, order, probs[1:]), ValueError, "need 6 elements, those")
    yield ErrorSample("device", (rows, order.to("meta"), probs), RuntimeError, "on one device")


def plain_unpermute(
    permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of gathered rows."""
    slots = sorted_indices.long() if probs is None else sorted_indices.long().view(probs.shape)
    rows = torch.cat((permuted, permuted.new_zeros((1, permuted.shape[1]))))
    rows = rows[slots.clamp(max=permuted.shape[0])]
    return rows if probs is None else (rows * probs.unsqueeze(-1)).sum(1).to(permuted.dtype)


def permute_map_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `moe_permute_map`."""
    make = maker(dtype, device)

    def call(
        name: str, routing_map: Tensor, probs: torch.dtype | None = dtype, rows: int = -1
    ) -> Sample:
        pad = rows >= 0
        weights = None if probs is None else make(*routing_map.shape, dtype=probs)
        count = rows if pad else int(routing_map.sum())
        args = (make(routing_map.shape[0], 5), routing_map, weights, count)
        return Sample(name, args, {"drop_and_pad": pad}, (0,) if probs is None else (0, 2))

    yield call("probs", map_of(9, 4, 2), compute_dtype(dtype))
    yield call("no_probs", map_of(9, 4, 2), None)
    yield call("uneven", map_of(9, 4))
    yield call("no_tokens", map_of(0, 4, 2))
    yield call("nowhere", torch.zeros(3, 4, dtype=torch.bool))
    yield call("turned_map", map_of(4, 9).t())
    yield call("capacity", map_of(9, 4), rows=12)
    yield call("capacity_all", map_of(6, 3), rows=18)
    yield call("capacity_0", map_of(6, 3), rows=0)
    equal = {"uniform": True}
    args = (make(9, 5), map_of(9, 4, 2), make(9, 4, dtype=compute_dtype(dtype)), 18)
    yield Sample("uniform", args, equal, (0, 2))
    yield Sample("uniform_without_probs", (make(7, 3), map_of(7, 5, 3), None, 21), equal)
    turned = (make(4, 8).t(), map_of(8, 3, 1), make(3, 8).t(), 8)
    yield Sample("uniform_turned", turned, equal, (0, 2))
    nowhere = torch.zeros(3, 5, dtype=torch.bool)
    yield Sample("uniform_nowhere", (make(3, 4), nowhere, None, 0), equal)
    tall = (make(5, 9).t(), map_of(9, 4, 2), make(4, 9).t(), 18)
    yield Sample("transposed", tall, {}, (0, 2))


def permute_map_errors() -> Iterator[ErrorSample]:
    """Yield calls of `moe_permute_map` that must raise."""
    make = maker(torch.float32, "cpu")
    tokens, routing_map, probs = make(5, 3), map_of(5, 4, 2), make(5, 4)
    pad = {"drop_and_pad": True}
    yield ErrorSample("list", ([1.0], routing_map), TypeError, "tokens: got list")
    yield ErrorSample("ints", (tokens, routing_map.int()), TypeError, "need torch.bool")
    yield ErrorSample("dims", (tokens, routing_map[0]), ValueError, "routing_map: got 1 dimensions")
    yield ErrorSample("rows", (tokens, routing_map[1:]), ValueError, "routing_map: got 4 rows")
    yield ErrorSample("probs", (tokens, routing_map, probs[1:]), ValueError, "probs: got (4, 4)")
    yield ErrorSample("int_probs", (tokens, routing_map, probs.int()), TypeError, "probs: got")
    for rows in (9, 11):
        # Equal numbers of experts: every backend has a kernel for these.
        args, message = (tokens, routing_map, None, rows), f"got {rows}, need 10, the True"
        yield ErrorSample(f"{rows}_of_10", args, ValueError, message, {"uniform": True})
    yield ErrorSample("none", (tokens, routing_map), ValueError, "num_out_tokens: got None", pad)
    yield from _uniform_errors((tokens, map_of(5, 4)), (tokens, routing_map, None, 8))
    yield ErrorSample(
        "uneven", (tokens, routing_map, None, 7), ValueError, "need 4 experts times a", pad
    )
    yield ErrorSample(
        "too_many", (tokens, routing_map, None, 24), ValueError, "a capacity of 0 to 5", pad
    )
    yield ErrorSample("device", (tokens, routing_map.to("meta")), RuntimeError, "on one device")


def _uniform_errors(
    unequal: tuple[object, ...], padded: tuple[object, ...]
) -> Iterator[ErrorSample]:
    equal, message = {"uniform": True}, "uniform: got True with tokens that go to 1 to 2 experts"
    yield ErrorSample("unequal", unequal, ValueError, message, equal)
    both = {**equal, "drop_and_pad": True}
    yield ErrorSample("two_forms", padded, ValueError, "uniform: got True beside", both)


def plain_permute_map(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    *,
    drop_and_pad: bool = False,
    uniform: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the rows by a scan of the transposed map."""
    if drop_and_pad:
        order = (~routing_map).int().argsort(dim=0, stable=True)
        token = order[: (num_out_tokens or 0) // routing_map.shape[1]].t().flatten()
        expert = torch.arange(routing_map.shape[1], device=token.device).repeat_interleave(
            token.shape[0] // routing_map.shape[1]
        )
    else:
        expert, token = routing_map.t().nonzero(as_tuple=True)
    weights = None if probs is None else probs[token, expert]
    return tokens[token], weights, token.argsort(stable=True).int()


def unpermute_map_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `moe_unpermute_map`."""
    make = maker(dtype, device)
    wide = compute_dtype(dtype)

    def call(
        name: str,
        routing_map: Tensor,
        probs: torch.dtype | None,
        rows: int = -1,
        width: int = 5,
        **options: bool,
    ) -> Sample:
        pad = rows >= 0
        count = rows if pad else int(routing_map.sum())
        tokens = torch.zeros(routing_map.shape[0], 1)
        order = permute_map(tokens, routing_map, None, count, pad)[2]
        weights = None if probs is None else make(*routing_map.shape, dtype=probs)
        args = (make(count, width), order, routing_map, weights)
        options["drop_and_pad"] = pad
        return Sample(name, args, options, (0,) if probs is None else (0, 3))

    yield call("top2", map_of(8, 4, 2), dtype)
    yield call("wide_probs", map_of(8, 4, 2), wide)
    yield call("no_probs", map_of(8, 4, 3), None)
    yield call("uneven", map_of(9, 4), wide)
    yield call("no_tokens", map_of(0, 4, 2), dtype)
    yield call("nowhere", torch.zeros(3, 4, dtype=torch.bool), dtype)
    yield call("blocks", map_of(60, 6), wide, width=2000)
    yield call("capacity", map_of(9, 4), wide, 12)
    yield call("capacity_no_probs", map_of(9, 4), None, 16)
    yield call("capacity_more", map_of(13, 4), None, 24)
    yield call("uniform", map_of(8, 4, 2), dtype, uniform=True)
    yield call("uniform_wide_probs", map_of(8, 4, 2), wide, uniform=True)
    yield call("uniform_without_probs", map_of(7, 5, 3), None, uniform=True)
    yield call("uniform_nowhere", torch.zeros(3, 4, dtype=torch.bool), dtype, uniform=True)
    rows, order, routing_map, probs = call("", map_of(8, 4, 2), dtype).args
    yield Sample("uniform_fixed_probs", (rows, order.long(), routing_map, probs), {"uniform": True})


def unpermute_map_errors() -> Iterator[ErrorSample]:
    """Yield calls of `moe_unpermute_map` that must raise."""
    make = maker(torch.float32, "cpu")
    routing_map, probs = map_of(5, 4, 2), make(5, 4)
    rows, order = make(10, 3), torch.arange(10, dtype=torch.int32)
    args = (rows, order, routing_map)
    yield ErrorSample("list", ([1.0], order, routing_map), TypeError, "permuted: got list")
    yield ErrorSample("floats", (rows, rows, routing_map), TypeError, "sorted_indices: got")
    yield ErrorSample("order", (rows, order[1:], routing_map), ValueError, "sorted_indices: got (9")
    yield ErrorSample("ints", (rows, order, probs), TypeError, "need torch.bool")
    yield ErrorSample("probs", (*args, probs[:, 1:]), ValueError, "probs: got (5, 3), need (5, 4)")
    yield from _uniform_errors((rows, order, map_of(5, 4)), (rows, order, routing_map))
    yield ErrorSample(
        "uneven", args, ValueError, "permuted: got 10, need 4 experts", {"drop_and_pad": True}
    )
    yield ErrorSample(
        "device", (rows, order, routing_map.to("meta")), RuntimeError, "on one device"
    )


def plain_unpermute_map(
    permuted: Tensor,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    *,
    drop_and_pad: bool = False,
    uniform: bool = False,
) -> Tensor:
    """Return the rows scattered and added to their tokens."""
    rows = permuted.shape[0]
    tokens = torch.arange(routing_map.shape[0], dtype=torch.float64, device=permuted.device)
    tokens = tokens.unsqueeze(1)
    token, weights, _ = plain_permute_map(
        tokens, routing_map, probs, rows, drop_and_pad=drop_and_pad
    )
    if weights is not None:
        permuted = permuted * weights.unsqueeze(1).to(permuted.dtype)
    out = permuted.new_zeros((routing_map.shape[0], permuted.shape[1]))
    return out.index_add(0, token.view(-1).long(), permuted)


TESTS = (
    OpTest(
        name="moe_permute",
        function=ms_ops.moe_permute,
        samples=permute_samples,
        errors=permute_errors,
        plain=plain_permute,
        outputs=("X", "X"),
        gradients={0: "E1"},
        traced=("some",),
        resized=("top2", "top3"),
        grows={0: 0, 1: 0},
    ),
    OpTest(
        name="moe_unpermute",
        function=ms_ops.moe_unpermute,
        samples=unpermute_samples,
        errors=unpermute_errors,
        plain=plain_unpermute,
        outputs=("E1",),
        gradients={0: "E1", 2: "MG"},
        traced=("dropped",),
        resized=("top2", "top3"),
        grows={0: 0, 1: 0, 2: 0},
    ),
    OpTest(
        name="moe_permute_map",
        function=ms_ops.moe_permute_map,
        samples=permute_map_samples,
        errors=permute_map_errors,
        plain=plain_permute_map,
        outputs=("X", "X", "X"),
        gradients={0: "E1", 2: "X"},
        traced=("probs",),
        resized=("capacity", "capacity_all"),
        grows={0: 0, 1: 0, 2: 0},
        differentiable_outputs=(0, 1),
    ),
    OpTest(
        name="moe_unpermute_map",
        function=ms_ops.moe_unpermute_map,
        samples=unpermute_map_samples,
        errors=unpermute_map_errors,
        plain=plain_unpermute_map,
        outputs=("E1",),
        gradients={0: "E1", 3: "MG"},
        traced=("wide_probs",),
        resized=("capacity_no_probs", "capacity_more"),
        grows={2: 0},
    ),
)
