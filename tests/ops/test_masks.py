"""Structured masks: every form against its definition, entry by entry."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ms_ops import MaskSpec, from_sparse_mode, masks

FREE = masks.UNBOUNDED
SHAPES = ((5, 5), (4, 9), (9, 4), (1, 6), (3, 0))
SPECS = [
    MaskSpec(),
    MaskSpec.causal("upper_left"),
    MaskSpec.causal("lower_right"),
    MaskSpec(3, 1),
    MaskSpec(2, None, "lower_right"),
    MaskSpec(-1, 4),
    MaskSpec(5, -2, "lower_right"),
    MaskSpec(right=0, q_start=4, kv_start=1),
    MaskSpec(right=0, align="lower_right", prefix=(3,)),
    MaskSpec(right=0, prefix=(3,), q_start=2, kv_start=2),
]


def sees(spec, i, j, rows, keys):
    """The definition, for one entry of one sequence."""
    d = j + spec.kv_start - i - spec.q_start
    if spec.align == "lower_right":
        d = j - i - (keys - rows)
    left = spec.left is None or -spec.left <= d
    right = spec.right is None or d <= spec.right
    return (left and right) or any(j + spec.kv_start < p for p in spec.prefix)


def by_definition(spec, rows, keys):
    entries = [[sees(spec, i, j, rows, keys) for j in range(keys)] for i in range(rows)]
    return torch.tensor(entries, dtype=torch.bool).view(rows, keys)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_form_and_the_keys_of_rows(spec, shape):
    expected = by_definition(spec, *shape)
    assert torch.equal(spec.dense(*shape), expected)
    for start in range(shape[0]):
        low, high = spec.keys_of((start, start + 1), shape)
        assert not expected[start, :low].any()
        assert not expected[start, high:].any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_visibility_of_blocks(spec):
    rows, keys = 6, 7
    expected = by_definition(spec, rows, keys)
    cuts = (range(rows + 1), range(rows + 1), range(keys + 1), range(keys + 1))
    for q0, q1, k0, k1 in itertools.product(*cuts):
        if q0 > q1 or k0 > k1:
            continue
        block = expected[q0:q1, k0:k1]
        found = spec.visibility((q0, q1), (k0, k1), (rows, keys))
        if found == "full":
            assert block.all()
        elif found == "causal":
            assert torch.equal(block, torch.ones_like(block).tril())
        elif found == "empty":
            assert not block.any()
        elif not spec.prefix and (spec.left is None or spec.right is None):
            # The form that leaves nothing to compare in a kernel is found wherever it is true.
            assert not block.all()
            assert block.any()


MODES = [
    (0, {"pre_tokens": 2, "next_tokens": 1}, MaskSpec(2, 1)),
    (0, {}, MaskSpec()),
    (1, {"pre_tokens": 2}, MaskSpec()),
    (2, {"pre_tokens": 2}, MaskSpec.causal("upper_left")),
    (3, {}, MaskSpec.causal("lower_right")),
    (4, {"pre_tokens": 3, "next_tokens": -1}, MaskSpec(3, -1, "lower_right")),
    (5, {"prefix": [2]}, MaskSpec(right=0, align="lower_right", prefix=(2,))),
    (6, {"prefix": [2]}, MaskSpec(right=0, align="lower_right", prefix=(2,))),
]


@pytest.mark.parametrize(("mode", "options", "spec"), MODES)
def test_sparse_modes(mode, options, spec):
    assert from_sparse_mode(mode, **options) == spec


@pytest.mark.parametrize(("mode", "odd"), [(7, 2), (8, 0)])
def test_modes_with_one_odd_sequence(mode, odd):
    spec = from_sparse_mode(mode, 2, 1)
    align = "lower_right" if mode == 7 else "upper_left"
    for i in range(3):
        plain = MaskSpec(2, 1, align) if i == odd else MaskSpec(right=0, align=align)
        got = spec.dense(4, 6, sequence=i, sequences=3)
        assert torch.equal(got, by_definition(plain, 4, 6))


@pytest.mark.parametrize(
    "spec",
    [
        MaskSpec(),
        MaskSpec.causal("upper_left"),
        MaskSpec.causal("lower_right"),
        MaskSpec(3, 1, "lower_right"),
        MaskSpec(right=0, align="lower_right", prefix=(2, 3)),
        from_sparse_mode(7, 2, 1),
        from_sparse_mode(8, 2, 1),
    ],
    ids=str,
)
def test_kernel_arguments_and_back(spec):
    form = masks.npu_form(spec)
    back = from_sparse_mode(form.sparse_mode, form.pre_tokens, form.next_tokens, form.prefix)
    assert back == spec
    assert (form.atten_mask is None) == (form.sparse_mode == 0)


def test_compressed_masks():
    causal, prefix = masks.compressed_causal(), masks.compressed_prefix()
    assert causal.shape == (2048, 2048)
    assert torch.equal(causal[:3, :3], torch.ones(3, 3, dtype=torch.bool).triu(1))
    assert int(causal.sum()) == 2048 * 2047 // 2
    assert prefix.shape == (3072, 2048)
    assert torch.equal(prefix[:2048], causal)
    assert not prefix[2048:, :1024].any()
    assert prefix[2048:, 1024:].all()
    assert masks.compressed_causal("cpu") is causal


def test_a_mask_made_in_a_tracer_stays_there():
    with FakeTensorMode():
        fake = masks.compressed_causal("cuda")
    assert fake.shape == (2048, 2048)
    assert ("cuda", False) not in masks._masks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskSpec(align="left"), "align: got 'left'"),
        (lambda: MaskSpec(edge="both"), "edge: got 'both'"),
        (lambda: MaskSpec(prefix=(-1,)), "prefix: got (-1,)"),
        (lambda: from_sparse_mode(9), "mode: got 9"),
        (lambda: from_sparse_mode(5), "prefix: got None with mode 5"),
        (lambda: from_sparse_mode(2, prefix=[3]), "prefix: got [3] with mode 2"),
        (lambda: masks.npu_form(MaskSpec(3, 1)), "spec: got MaskSpec"),
        (lambda: masks.npu_form(MaskSpec(right=0, q_start=2)), "spec: got MaskSpec"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match="need") as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (MaskSpec(), "full"),
        (MaskSpec(right=0), "causal"),
        (MaskSpec(left=3), "band"),
        (MaskSpec(right=0, prefix=(1,)), "prefix"),
        (from_sparse_mode(7, 1, 1), "band"),
    ],
)
def test_kinds(spec, kind):
    assert spec.kind == kind
    assert FREE == 2147483647
