"""Tests of the matmul family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ms_ops

from ...device import compute_dtype
from ..case import ErrorSample, OpTest, Sample, maker


def ends(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a list of group ends on the host."""
    return torch.tensor(values, dtype=dtype)


def matmul_add_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `matmul_add_`."""
    make = maker(dtype, device)
    wide = compute_dtype(dtype)

    def call(name: str, x: Tensor, dy: Tensor, acc: torch.dtype = wide) -> Sample:
        total = make(dy.shape[1], x.shape[1], dtype=acc)
        return Sample(name, (total, x, dy), {}, ())

    yield call("plain", make(40, 12), make(40, 7))
    yield call("large", make(96, 24), make(96, 32))
    yield call("no_rows", make(0, 5), make(0, 3))
    yield call("no_columns", make(6, 0), make(6, 3))
    yield call("transposed", make(12, 9).t(), make(6, 9).t())
    yield call("expanded", make(1, 6).expand(5, 6), make(5, 4))
    if dtype is not wide:
        yield call("low_accumulator", make(8, 6), make(8, 5), dtype)


def matmul_add_errors() -> Iterator[ErrorSample]:
    """Yield calls of `matmul_add_` that must raise."""
    make = maker(torch.float32, "cpu")
    acc, x, dy = make(3, 5), make(4, 5), make(4, 3)
    yield from _accumulator_errors(acc, x, dy, ())
    yield ErrorSample("shape", (make(5, 3), x, dy), ValueError, "acc: got (5, 3), need (3, 5)")
    yield ErrorSample("strides", (make(5, 3).t(), x, dy), ValueError, "need a contiguous tensor")


def _accumulator_errors(
    acc: Tensor, x: Tensor, dy: Tensor, rest: tuple[Tensor, ...]
) -> Iterator[ErrorSample]:
    def call(
        name: str, args: tuple[object, ...], kind: type[Exception], message: str
    ) -> ErrorSample:
        return ErrorSample(name, (*args, *rest), kind, message)

    grad = acc.clone().requires_grad_()
    yield call("list", (acc, [1.0], dy), TypeError, "x: got list, need a torch.Tensor")
    yield call("ints", (acc, x.long(), dy), TypeError, "x: got torch.int64")
    yield call("mixed", (acc, x, dy.half()), TypeError, "dy: got torch.float16")
    yield call("low_acc", (acc.bfloat16(), x, dy), TypeError, "acc: got torch.bfloat16")
    yield call("other_acc", (acc.half(), x.bfloat16(), dy.bfloat16()), TypeError, "acc: got")
    yield call("dims", (acc, x[0], dy), ValueError, "x: got 1 dimensions, need 2")
    yield call("rows", (acc, x, dy[1:]), ValueError, "dy: got 3 rows, need 4, those of x")
    yield call("grad", (grad, x, dy), ValueError, "acc: got a tensor that requires gradients")
    yield call("device", (acc.to("meta"), x, dy), RuntimeError, "need all tensors on one device")


def plain_matmul_add(acc: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """Add the product, which is rounded to the inputs' dtype first."""
    return acc.add_(dy.t() @ x)


def grouped_add_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `grouped_matmul_add_`."""
    make = maker(dtype, device)
    wide = compute_dtype(dtype)
    yield Sample(
        "plain", (make(3, 8, 6, dtype=wide), make(9, 8), make(9, 6), ends(2, 5, 9)), {}, ()
    )
    yield Sample(
        "more_groups",
        (make(5, 8, 6, dtype=wide), make(12, 8), make(12, 6), ends(1, 3, 4, 9, 12)),
        {},
        (),
    )
    yield Sample(
        "empty_groups",
        (make(4, 5, 3, dtype=wide), make(7, 5), make(7, 3), ends(0, 4, 4, 7, dtype=torch.int32)),
        {},
        (),
    )
    yield Sample("one_group", (make(1, 5, 3, dtype=wide), make(6, 5), make(6, 3), ends(6)), {}, ())
    yield Sample("flat", (make(24, dtype=wide), make(6, 3), make(6, 4), ends(5, 6)), {}, ())
    yield Sample("no_rows", (make(2, 3, 4, dtype=wide), make(0, 3), make(0, 4), ends(0, 0)), {}, ())
    yield Sample(
        "transposed",
        (make(2, 4, 3, dtype=wide), make(4, 7).t(), make(3, 7).t(), ends(3, 7)),
        {},
        (),
    )


def grouped_add_errors() -> Iterator[ErrorSample]:
    """Yield calls of `grouped_matmul_add_` that must raise."""
    make = maker(torch.float32, "cpu")
    acc, x, dy = make(2, 5, 3), make(4, 5), make(4, 3)
    yield from _accumulator_errors(acc, x, dy, (ends(1, 4),))
    yield from _group_errors((acc, x, dy))
    yield ErrorSample(
        "elements", (acc, x, dy, ends(1, 2, 4)), ValueError, "need the elements of (3, 5, 3)"
    )


def _group_errors(args: tuple[Tensor, ...]) -> Iterator[ErrorSample]:
    """Yield lists of two groups of four rows that must be refused."""

    def call(name: str, kind: type[Exception], message: str, *offsets: object) -> ErrorSample:
        return ErrorSample(f"groups_{name}", (*args, *offsets), kind, message)

    yield call("none", ValueError, "offsets: got neither, need either offsets or group_sizes")
    yield call("float", TypeError, "offsets: got torch.float32", torch.tensor([1.0, 4.0]))
    yield call("kind", TypeError, "offsets: got str, need a tensor or a list of ints", "14")
    yield call("dims", ValueError, "offsets: got 2 dimensions, need 1", torch.tensor([[1, 4]]))
    yield call("fall", ValueError, "need ends that do not fall", ends(5, 4))
    yield call(
        "short", ValueError, "got groups that end at row 3, need the last to end", ends(1, 3)
    )
    yield ErrorSample(
        "groups_both",
        (*args, ends(1, 4)),
        ValueError,
        "offsets: got offsets and group_sizes",
        {"group_sizes": [1, 3]},
    )
    yield ErrorSample(
        "groups_sizes",
        args,
        ValueError,
        "group_sizes: got groups that end at row 3",
        {"group_sizes": [1, 2]},
    )
    yield ErrorSample(
        "groups_negative", args, ValueError, "need no negative size", {"group_sizes": [5, -1]}
    )


def plain_grouped_add(acc: Tensor, x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """Add the products of all groups, each rounded to the inputs' dtype first."""
    total = acc.view(offsets.shape[0], x.shape[1], dy.shape[1])
    for group, (rows, grads) in enumerate(
        zip(_split(x, offsets), _split(dy, offsets), strict=True)
    ):
        total[group] += rows.t() @ grads
    return acc


def grouped_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `grouped_matmul`."""
    make = maker(dtype, device)
    both = (0, 1)
    # Widths that torch's grouped product takes, groups of unequal and of one size.
    yield Sample("unequal", (make(11, 8), make(3, 8, 16), ends(2, 7, 11)), {}, both)
    yield Sample("more_rows", (make(29, 8), make(3, 8, 16), ends(4, 21, 29)), {}, both)
    yield Sample("equal", (make(12, 8), make(3, 8, 6), ends(4, 8, 12)), {}, both)
    yield Sample("odd", (make(9, 5), make(3, 5, 7), ends(1, 5, 9, dtype=torch.int32)), {}, both)
    yield Sample("empty_groups", (make(9, 8), make(4, 8, 8), ends(0, 5, 5, 9)), {}, both)
    yield Sample("last_empty", (make(9, 5), make(3, 5, 3), ends(4, 9, 9)), {}, both)
    yield Sample("no_rows", (make(0, 8), make(2, 8, 8), ends(0, 0)), {}, both)
    yield Sample("no_inner", (make(5, 0), make(2, 0, 3), ends(2, 5)), {}, both)
    yield Sample("one_group", (make(6, 8), make(1, 8, 8), ends(6)), {}, both)
    for name, width in (("aligned", 16), ("odd", 7)):
        turned = make(3, width, 8)
        groups = ends(3, 4, 10)
        kwargs = {"transpose_weight": True}
        yield Sample(f"transpose_{name}", (make(10, 8), turned, groups), kwargs, both)
        yield Sample(f"view_{name}", (make(10, 8), turned.transpose(1, 2), groups), {}, both)
    yield Sample("columns", (make(8, 10).t(), make(2, 8, 8), ends(3, 10)), {}, both)
    yield Sample("sliced", (make(10, 20)[:, 3:11], make(2, 8, 24)[..., ::3], ends(3, 10)), {}, both)
    yield Sample("sizes", (make(6, 4), make(3, 4, 5)), {"group_sizes": [1, 0, 5]}, both)
    bias = (*both, "bias")
    yield Sample("bias", (make(6, 8), make(3, 8, 5), ends(1, 1, 6)), {"bias": make(3, 5)}, bias)
    if dtype in (torch.float16, torch.bfloat16):
        wide = {"bias": make(3, 5, dtype=torch.float32)}
        yield Sample("wide_bias", (make(6, 8), make(3, 8, 5), ends(1, 4, 6)), wide, bias)


def grouped_errors() -> Iterator[ErrorSample]:
    """Yield calls of `grouped_matmul` that must raise."""
    make = maker(torch.float32, "cpu")
    x, weight, groups = make(4, 5), make(2, 5, 3), ends(1, 4)

    def bad(name: str, kind: type[Exception], message: str, **kwargs: object) -> ErrorSample:
        return ErrorSample(name, (x, weight, groups), kind, message, kwargs)

    yield ErrorSample("list", ([1.0], weight, groups), TypeError, "x: got list")
    yield ErrorSample("ints", (x, weight.long(), groups), TypeError, "weight: got torch.int64")
    yield ErrorSample("mixed", (x, weight.half(), groups), TypeError, "weight: got torch.float16")
    yield ErrorSample("dims", (x, weight[0], groups), ValueError, "weight: got 2 dimensions")
    yield ErrorSample("inner", (x[:, 1:], weight, groups), ValueError, "need 4 in dimension 1")
    yield ErrorSample("count", (x, weight, ends(4)), ValueError, "offsets: got 1 groups, need 2")
    yield from _group_errors((x, weight))
    yield bad("turned", ValueError, "need 5 in dimension 2", transpose_weight=True)
    yield bad("bias_shape", ValueError, "bias: got (2, 4), need (2, 3)", bias=make(2, 4))
    yield bad("bias_dtype", TypeError, "bias: got torch.float16", bias=make(2, 3).half())
    yield bad("elements", ValueError, "accumulate_into: got (2, 3)", accumulate_into=make(2, 3))
    yield bad(
        "bias_and_accumulator",
        ValueError,
        "accumulate_into: got a tensor beside bias",
        accumulate_into=make(2, 5, 3),
        bias=make(2, 3),
    )
    yield ErrorSample("device", (x, weight.to("meta"), groups), RuntimeError, "on one device")


def plain_grouped(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    *,
    group_sizes: list[int] | None = None,
    bias: Tensor | None = None,
    transpose_weight: bool = False,
) -> Tensor:
    """Return one product a group, then the bias."""
    offsets = torch.tensor(group_sizes).cumsum(0) if offsets is None else offsets
    matrices = weight.transpose(1, 2) if transpose_weight else weight
    blocks = [rows @ matrix for rows, matrix in zip(_split(x, offsets), matrices, strict=True)]
    if bias is not None:
        blocks = [b + row for b, row in zip(blocks, bias, strict=True)]
    return torch.cat(blocks).to(x.dtype)


def _split(rows: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    sizes = torch.diff(offsets, prepend=offsets.new_zeros(1))
    return torch.split(rows, sizes.tolist())


TESTS = (
    OpTest(
        name="matmul_add_",
        function=ms_ops.matmul_add_,
        samples=matmul_add_samples,
        errors=matmul_add_errors,
        plain=plain_matmul_add,
        outputs=("M",),
        gradients={},
        traced=("plain",),
        resized=("plain", "large"),
        grows={1: 0, 2: 0},
        mutates=(0,),
    ),
    OpTest(
        name="grouped_matmul_add_",
        function=ms_ops.grouped_matmul_add_,
        samples=grouped_add_samples,
        errors=grouped_add_errors,
        plain=plain_grouped_add,
        outputs=("M",),
        gradients={},
        traced=("plain",),
        resized=("plain", "more_groups"),
        grows={0: 2, 2: 1},
        mutates=(0,),
    ),
    OpTest(
        name="grouped_matmul",
        function=ms_ops.grouped_matmul,
        samples=grouped_samples,
        errors=grouped_errors,
        plain=plain_grouped,
        outputs=("M",),
        gradients={0: "MG", 1: "MG", "bias": "MG"},
        traced=("unequal", "bias"),
        resized=("unequal", "more_rows"),
        grows={1: 2},
    ),
)
