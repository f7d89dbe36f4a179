"""Operators of ms-ops under the meter: each states its FLOPs, and counts once on any backend."""

import pytest
import torch

import ms_ops
from ms_ops.opdef import OPERATORS
from ms_profile import FlopMeter
from ms_profile.flops.attention import (
    DENSE,
    Lengths,
    Mask,
    Shape,
    backward_flops,
    forward_flops,
)
from support.mutation import Mutation, assert_caught

BATCH, HEADS, GROUPS, DIM, V_DIM = 2, 4, 2, 8, 6


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_states_its_flops(name):
    for suffix in ("", "_backward"):
        packet = getattr(torch.ops.ms, name + suffix, None)
        assert packet is None or hasattr(packet, "flop_formula"), name + suffix
    assert hasattr(getattr(torch.ops.ms, name), "flop_formula")


def counts(rows, keys, causal, align, kind, backend):
    q = torch.randn(BATCH, rows, HEADS, DIM, requires_grad=True)
    k = torch.randn(BATCH, keys, GROUPS, DIM, requires_grad=True)
    v = torch.randn(BATCH, keys, GROUPS, V_DIM, requires_grad=True)
    with ms_ops.backend(backend), FlopMeter(attention=kind) as meter:
        ms_ops.attention(q, k, v, causal=causal, causal_align=align).sum().backward()
    assert set(meter.as_dict()["by_op"]) == {"ms::attention", "ms::attention_backward"}
    return meter.counts


def check_attention(backend="portable"):
    shape = Shape(BATCH * HEADS, DIM, V_DIM)
    for rows, keys in ((6, 6), (4, 7), (7, 4)):
        for causal, align in ((False, "lower_right"), (True, "lower_right"), (True, "upper_left")):
            mask = Mask(right=0, align=align) if causal else DENSE
            lengths = [Lengths(rows, keys)]
            for kind in ("model", "full"):
                found = counts(rows, keys, causal, align, kind, backend)
                assert found.forward == forward_flops(shape, lengths, mask, kind)
                assert found.backward == backward_flops(shape, lengths, mask, kind)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_attention(backend):
    check_attention(backend)


def test_launched_is_what_the_backend_does():
    """The reference multiplies everything; the CPU kernel skips the triangle of a square."""
    shape, square = Shape(BATCH * HEADS, DIM, V_DIM), [Lengths(6, 6)]
    causal = Mask(right=0)
    for backend, mask in (("reference", DENSE), ("portable", causal)):
        found = counts(6, 6, True, "lower_right", "launched", backend)
        assert found.forward == forward_flops(shape, square, mask, "launched")
        assert found.backward == backward_flops(shape, square, mask, "launched")


def test_a_forgotten_product_is_caught():
    assert_caught(
        Mutation(
            "values not counted",
            "ms_ops.attention.flops:forward_flops",
            "(channels + v.shape[-1])",
            "channels",
        ),
        check_attention,
    )


def test_torchs_counter_learns_them():
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    q = torch.randn(BATCH, 6, HEADS, DIM, requires_grad=True)
    before = dict(flop_registry)
    try:
        for _ in range(2):
            ms_ops.register_flop_formulas()
        with FlopCounterMode(display=False) as torchs, FlopMeter() as ours:
            ms_ops.attention(q, q, q, causal=True).sum().backward()
        assert torchs.get_total_flops() == ours.counts.model > 0
    finally:
        for op in flop_registry.keys() - before.keys():
            del flop_registry[op]
