"""Wrong kernels of an operator: the shared test body must catch each of them."""

from __future__ import annotations

import ms_ops
from ms_ops import testing


def replaced(values, places):
    """The values with those at some places changed."""
    values = list(values)
    for place, value in places.items():
        values[place] = value
    return values


def caught(op, dtype, right, forward=None, backward=None):
    """Whether a sample of an operator tells the wrong kernel from the right one: 1 or 0.

    Args:
        op: the operator's name.
        dtype: of the samples.
        right: a module with a correct `forward` and `backward`.
        forward: the wrong forward, if that is what is wrong.
        backward: the wrong backward likewise.
    """
    kernel = ms_ops.Kernel(forward or right.forward, backward or right.backward)
    ms_ops.register_backend(op, ms_ops.Backend("mutant", 500, {op: kernel}))
    try:
        for sample in testing.OPERATORS[op].samples(dtype, "cpu"):
            try:
                testing.check_values(op, sample, "mutant")
            except AssertionError:
                return 1
    finally:
        ms_ops.unregister_backend(op, "mutant")
    return 0
