"""Wrong kernels: the test body must catch each of them."""

import pytest
import torch

from ms_ops.dropout_norm import reference as right
from support.mutants import caught, replaced

X, RESIDUAL, WEIGHT, BIAS, ROW_SCALE, LAYER_SCALE, RNG, P, EPS, NORM = range(10)


def unscaled(*args):
    """What is kept is not divided by 1 - p: the argument x is made smaller by that."""
    return right.forward(*replaced(args, {X: args[X] * (1 - args[P])}))


def row_scale_ignored(*args):
    return right.forward(*replaced(args, {ROW_SCALE: None}))


def mask_of_another_offset(*args):
    rng = args[RNG]
    return right.forward(*replaced(args, {RNG: None if rng is None else rng + 1}))


def mean_kept(*args):
    found = right.forward(*replaced(args, {NORM: "rms"}))
    return replaced(found, {3: torch.zeros_like(found[4])}) if args[NORM] == "layer" else found


def pre_without_residual(*args):
    out, _, *rest = right.forward(*args)
    return out, right.forward(*replaced(args, {RESIDUAL: torch.zeros_like(args[X])}))[1], *rest


def unscaled_in_backward(*args):
    dx, *rest = right.backward(*args)
    return dx * (1 - args[11]), *rest


def residual_gradient_dropped(*args):
    return replaced(right.backward(*args), {1: torch.zeros_like(right.backward(*args)[1])})


def bias_summed_over_columns(*args):
    """Row sums of dout in the place of its column sums."""
    *found, dbias, drow, dlayer = right.backward(*args)
    if dbias.numel():
        dbias = args[0].sum(-1).reshape(-1)[:1].repeat(dbias.numel()).to(dbias.dtype)
    return *found, dbias, drow, dlayer


def prenorm_gradient_ignored(*args):
    return right.backward(*replaced(args, {1: None}))


def row_scale_gradient_without_layer_scale(*args):
    found = right.backward(*args)
    if args[7] is None:
        return found
    return replaced(found, {4: right.backward(*replaced(args, {7: None}))[4]})


MUTANTS = [
    (unscaled, None),
    (row_scale_ignored, None),
    (mask_of_another_offset, None),
    (mean_kept, None),
    (pre_without_residual, None),
    (None, unscaled_in_backward),
    (None, residual_gradient_dropped),
    (None, bias_summed_over_columns),
    (None, prenorm_gradient_ignored),
    (None, row_scale_gradient_without_layer_scale),
]


@pytest.mark.parametrize(
    ("forward", "backward"), MUTANTS, ids=[(f or b).__name__ for f, b in MUTANTS]
)
def test_mutant_is_caught(forward, backward):
    forward, backward = (
        None if f is None else lambda *args, f=f: tuple(f(*args)) for f in (forward, backward)
    )
    assert caught("dropout_add_norm", torch.float32, right, forward, backward) > 0


def test_the_right_kernel_is_not_caught():
    assert caught("dropout_add_norm", torch.float32, right) == 0
