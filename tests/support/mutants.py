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
    """How many samples of an operator tell the wrong kernel from the right one.

    Args:
        op: the operator's name.
        dtype: of the samples.
        right: a module with a correct `forward` and `backward`.
        forward: the wrong forward, if that is what is wrong.
        backward: the wrong backward likewise.
    """
    kernel = ms_ops.Kernel(forward or right.forward, backward or right.backward)
    ms_ops.register_backend(op, ms_ops.Backend("mutant", 500, {op: kernel}))
    count = 0
    try:
        for sample in testing.OPERATORS[op].samples(dtype, "cpu"):
            try:
                testing.check_values(op, sample, "mutant")
            except AssertionError:
                count += 1
    finally:
        ms_ops.unregister_backend(op, "mutant")
    return count
