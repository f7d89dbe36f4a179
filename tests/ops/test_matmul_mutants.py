"""Wrong kernels: the test body must catch each of them."""

import pytest
import torch

from ms_ops.matmul import reference as matmul
from support.mutants import caught


class Right:
    """The correct kernels of one operator, as the mutants' helper takes them."""

    def __init__(self, forward, backward=None):
        self.forward, self.backward = forward, backward


OPERATORS = {
    "matmul_add_": Right(matmul.add),
    "grouped_matmul_add_": Right(matmul.grouped_add),
    "grouped_matmul": Right(matmul.forward, matmul.backward),
    "quant_grouped_matmul": Right(matmul.quant),
}


def product_rounded(acc, x, dy):
    acc += (dy.float().t() @ x.float()).bfloat16()


def accumulator_overwritten(acc, x, dy):
    acc.zero_()
    matmul.add(acc, x, dy)


def roles_swapped(acc, x, dy):
    acc += (x.to(acc.dtype).t() @ dy.to(acc.dtype)).reshape(acc.shape)


def groups_overwritten(acc, x, dy, offsets):
    acc.zero_()
    matmul.grouped_add(acc, x, dy, offsets)


def empty_groups_cleared(acc, x, dy, offsets):
    matmul.grouped_add(acc, x, dy, offsets)
    acc[torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0] = 0


def last_row_lost(acc, x, dy, offsets):
    matmul.grouped_add(acc, x[:-1], dy[:-1], (offsets - 1).clamp(min=0))


def ends_are_sizes(x, weight, offsets, bias, transposed):
    ends = offsets.cumsum(0).clamp(max=x.shape[0])
    return matmul.forward(x, weight, ends, bias, transposed)


def first_matrix_everywhere(x, weight, offsets, bias, transposed):
    return matmul.forward(x, weight[:1].expand_as(weight), offsets, bias, transposed)


def bias_dropped(x, weight, offsets, bias, transposed):
    return matmul.forward(x, weight, offsets, None, transposed)


def group_mean(dy, x, offsets, transposed):
    dweight = matmul.backward(dy, x, offsets, transposed)
    sizes = torch.diff(offsets, prepend=offsets.new_zeros(1)).clamp(min=1)
    return dweight / sizes.view(-1, 1, 1)


def empty_group_uninitialised(dy, x, offsets, transposed):
    dweight = matmul.backward(dy, x, offsets, transposed)
    dweight[torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0] = float("nan")
    return dweight


def half_of_the_rows_bits(
    x, weight, scale, offsets, per_token_scale, bias, activation, output_dtype
):
    args = (offsets, per_token_scale, bias, activation, output_dtype)
    return matmul.quant(x.div(2, rounding_mode="trunc"), weight, scale * 2, *args)


def bias_after_the_scale(x, weight, scale, offsets, tokens, bias, activation, output_dtype):
    y = matmul.quant(x, weight, scale, offsets, tokens, None, "none", output_dtype)
    if bias is not None:
        sizes = torch.diff(offsets, prepend=offsets.new_zeros(1))
        y = y + bias.repeat_interleave(sizes, 0).to(y.dtype)
    return matmul.activate(y, activation)


def tokens_unscaled(x, weight, scale, offsets, tokens, bias, activation, output_dtype):
    return matmul.quant(x, weight, scale, offsets, None, bias, activation, output_dtype)


MUTANTS = [
    ("quant_grouped_matmul", half_of_the_rows_bits, None),
    ("quant_grouped_matmul", bias_after_the_scale, None),
    ("quant_grouped_matmul", tokens_unscaled, None),
    ("matmul_add_", product_rounded, None),
    ("matmul_add_", accumulator_overwritten, None),
    ("matmul_add_", roles_swapped, None),
    ("grouped_matmul_add_", groups_overwritten, None),
    ("grouped_matmul_add_", empty_groups_cleared, None),
    ("grouped_matmul_add_", last_row_lost, None),
    ("grouped_matmul", ends_are_sizes, None),
    ("grouped_matmul", first_matrix_everywhere, None),
    ("grouped_matmul", bias_dropped, None),
    ("grouped_matmul", None, group_mean),
    ("grouped_matmul", None, empty_group_uninitialised),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("op", "forward", "backward"), MUTANTS, ids=[(f or b).__name__ for _, f, b in MUTANTS]
)
def test_mutant_is_caught(op, forward, backward, dtype):
    assert caught(op, dtype, OPERATORS[op], forward, backward) > 0
