"""Wrong steps of AdamW: the test body must catch each of them."""

import pytest
import torch

from ms_ops.optim import reference
from support.mutants import caught, replaced

# Places in the arguments of the kernels.
MAXIMIZE, CORRECTION, MODE, DECAY = -1, -2, -3, -4


class Adamw:
    """The correct kernel of fused_adamw_."""

    forward, backward = staticmethod(reference.adamw), None


class Ema:
    """The correct kernel of fused_ema_adamw_."""

    forward, backward = staticmethod(reference.ema_adamw), None


def correction_dropped(*args):
    reference.adamw(*replaced(args, {CORRECTION: False}))


def step_from_zero(*args):
    reference.adamw(*replaced(args, {4: args[4] + 1}))


def decay_after_the_step(*args):
    params, lr = args[0], args[6]
    rest = args if args[MODE] == 0 else replaced(args, {DECAY: 0.0})
    reference.adamw(*rest)
    if args[MODE] == 1:
        for p in params:
            p *= 1 - lr * args[DECAY]


def penalty_is_decoupled(*args):
    reference.adamw(*replaced(args, {MODE: 1}))


def decay_dropped(*args):
    reference.adamw(*replaced(args, {DECAY: 0.0}))


def sign_ignored(*args):
    reference.adamw(*replaced(args, {MAXIMIZE: False}))


def largest_ignored(*args):
    reference.adamw(*replaced(args, {5: []}))


def largest_not_stored(*args):
    reference.adamw(*replaced(args, {5: [t.clone() for t in args[5]]}))


def eps_misplaced(*args):
    reference.adamw(*replaced(args, {9: args[9] ** 0.5}))


def average_of_the_old_weights(*args):
    params, emas, decay = args[0], args[4], args[7]
    old = [p.clone() for p in params]
    reference.ema_adamw(*replaced(args, {4: [ema.clone() for ema in emas]}))
    for ema, p in zip(emas, old, strict=True):
        ema.copy_(decay * ema + (1 - decay) * p)


def decay_of_the_average_swapped(*args):
    reference.ema_adamw(*replaced(args, {7: 1 - args[7]}))


def betas_swapped(*args):
    reference.ema_adamw(*replaced(args, {8: args[9], 9: args[8]}))


MUTANTS = [
    correction_dropped,
    step_from_zero,
    decay_after_the_step,
    penalty_is_decoupled,
    decay_dropped,
    sign_ignored,
    largest_ignored,
    largest_not_stored,
    eps_misplaced,
]
EMA_MUTANTS = [average_of_the_old_weights, decay_of_the_average_swapped, betas_swapped]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_mutant_of_adamw_is_caught(mutant, dtype):
    assert caught("fused_adamw_", dtype, Adamw, mutant) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("mutant", EMA_MUTANTS, ids=lambda f: f.__name__)
def test_mutant_of_ema_adamw_is_caught(mutant, dtype):
    assert caught("fused_ema_adamw_", dtype, Ema, mutant) > 0


def test_right_kernels_are_not_caught():
    assert caught("fused_adamw_", torch.float32, Adamw) == 0
    assert caught("fused_ema_adamw_", torch.float32, Ema) == 0
