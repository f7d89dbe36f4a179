"""Formulas one by one: brute force over score entries, convolutions by hand, operators by name."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_profile.flops import FlopMeter, UnknownOperator, peak_flops, register_flops
from ms_profile.flops.attention import (
    CAUSAL,
    Lengths,
    Mask,
    Shape,
    backward_flops,
    double_entries,
    flash_forward,
    forward_flops,
    lengths_of,
)
from ms_profile.flops.known import LOOKS_LIKE_PRODUCT, NO_PRODUCT, has_no_product
from ms_profile.flops.npu import fusion_attention
from ms_profile.flops.registry import _BUILT_IN, _registered

bounds = st.one_of(st.none(), st.integers(0, 9))


@settings(max_examples=300, deadline=None)
@given(
    q=st.integers(1, 8),
    k=st.integers(1, 8),
    left=bounds,
    right=bounds,
    align=st.sampled_from(["upper_left", "lower_right"]),
)
def test_entries_of_a_band(q, k, left, right, align):
    offset = k - q if align == "lower_right" else 0
    expected = 0
    for i, j in itertools.product(range(q), range(k)):
        at = i + offset
        inside = (left is None or j >= at - left) and (right is None or j <= at + right)
        on_diagonal = right == 0 and j == at
        expected += inside * (1 if on_diagonal else 2)
    assert double_entries(q, k, Mask(left, right, align)) == expected


@settings(max_examples=100, deadline=None)
@given(q=st.integers(1, 8), k=st.integers(1, 8), prefix=st.integers(0, 8))
def test_entries_of_a_prefix(q, k, prefix):
    expected = 0
    for i, j in itertools.product(range(q), range(k)):
        at = i + k - q
        expected += 2 if j < max(at, min(prefix, k)) else (j == at)
    assert double_entries(q, k, Mask(None, 0, "lower_right", prefix)) == expected


def test_packed_sequences_are_a_sum_of_squares():
    lengths = lengths_of([0, 3, 10, 16], [0, 3, 10, 16])
    shape = Shape(heads=4, qk_dim=8, v_dim=6)
    squares = 3**2 + 7**2 + 6**2
    assert forward_flops(shape, lengths, CAUSAL, "model") == 2 * 4 * (8 + 6) * squares // 2
    assert backward_flops(shape, lengths, CAUSAL, "model") == 2 * 2 * 4 * (8 + 6) * squares // 2
    assert backward_flops(shape, lengths, CAUSAL, "launched") == 2 * 4 * (24 + 12) * squares // 2
    assert forward_flops(shape, lengths, CAUSAL, "full") == 2 * 4 * (8 + 6) * squares
    mean = forward_flops(shape, [Lengths(5, 5)] * 3, CAUSAL, "model")
    assert mean < forward_flops(shape, lengths, CAUSAL, "model")


def test_lengths_on_a_device_wait_for_the_reader():
    """The numbers are copied on the device and read with the counts, not in the step."""
    starts = torch.tensor([0, 3, 10])
    q = torch.empty(10, 4, 8)
    arguments = {"cum_seq_q": starts, "cum_seq_k": starts, "is_causal": True, "attention": "model"}
    now = flash_forward(query=q, key=q, value=q, **arguments)
    assert now == 4 * 16 * (9 + 49)

    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

    arguments |= {"cum_seq_q": starts.as_subclass(OnDevice)}
    pending = flash_forward(query=q, key=q, value=q, **arguments)
    starts.zero_()  # the caller may reuse its buffer
    assert pending.starts_q.tolist() == [0, 3, 10]
    with pytest.raises(NotImplementedError, match="fake and meta"):
        flash_forward(query=q, key=q, value=q, **arguments | {"cum_seq_q": starts.to("meta")})


def counted(run, *args, **options):
    with FlopMeter(**options) as meter:
        run(*args)
    return meter.counts


PRODUCTS = {
    "mm": (lambda a, b: a @ b, (3, 4), (4, 5), 2 * 3 * 4 * 5),
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 5), 2 * 2 * 3 * 4 * 5),
    "mv": (torch.mv, (3, 4), (4,), 2 * 3 * 4),
    "dot": (torch.dot, (7,), (7,), 2 * 7),
    "outer": (lambda a, b: torch.zeros(3, 4).addr_(a, b), (3,), (4,), 2 * 3 * 4),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), (2, 3, 4), (2, 5, 4), 240),
    "linear": (F.linear, (2, 3, 4), (5, 4), 2 * 6 * 4 * 5),
    "addmm": (lambda a, b: torch.addmm(torch.ones(5), a, b), (3, 4), (4, 5), 2 * 3 * 4 * 5),
    "baddbmm": (lambda a, b: torch.ones(2, 3, 5).baddbmm_(a, b), (2, 3, 4), (2, 4, 5), 240),
    "out": (lambda a, b: torch.mm(a, b, out=torch.empty(3, 5)), (3, 4), (4, 5), 2 * 3 * 4 * 5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    run, left, right, expected = PRODUCTS[name]
    args = torch.ones(left), torch.ones(right)
    assert counted(run, *args).forward == expected
    with torch.inference_mode():
        assert counted(run, *args).other == expected


@pytest.mark.parametrize(
    ("left", "right", "offsets", "expected"),
    [
        ((6, 8), (3, 8, 16), [1, 4, 6], 2 * 6 * 8 * 16),
        ((8, 32), (32, 16), [8, 24, 32], 2 * 8 * 32 * 16),
        ((2, 6, 8), (2, 8, 16), None, 2 * 2 * 6 * 8 * 16),
    ],
    ids=["rows", "inner", "batch"],
)
def test_grouped_product(left, right, offsets, expected):
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped product")
    a, b = (torch.ones(shape, dtype=torch.bfloat16) for shape in (left, right))
    offs = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    assert counted(lambda: torch._grouped_mm(a, b, offs=offs)).forward == expected


def by_hand(x, weight, stride, padding, groups):
    """Products of a convolution: one for each output element and each weight that it meets."""
    size = [
        (n + 2 * padding - k) // stride + 1
        for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)
    ]
    positions = torch.Size(size).numel()
    return 2 * x.shape[0] * positions * weight.shape[0] * weight[0].numel()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2])
def test_convolution_and_its_backward(dims, groups):
    convolve = (F.conv1d, F.conv2d)[dims - 1]
    x = torch.randn(2, 4, *[9] * dims, requires_grad=True)
    weight = torch.randn(6, 4 // groups, *[3] * dims, requires_grad=True)
    expected = by_hand(x, weight, 2, 1, groups)

    def run():
        convolve(x, weight, stride=2, padding=1, groups=groups).sum().backward()

    counts = counted(run)
    assert (counts.forward, counts.backward) == (expected, 2 * expected)


def test_transposed_convolution():
    """The transpose of a convolution from 5 to 9 positions does the same products."""
    x, weight = torch.randn(2, 6, 5), torch.randn(6, 4, 3)
    weight.requires_grad_()

    def run():
        y = F.conv_transpose1d(x, weight, stride=2, padding=1)
        assert y.shape == (2, 4, 9)
        y.sum().backward()

    counts = counted(run)
    assert counts.forward == counts.backward == 2 * 2 * 5 * weight.numel()


@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION"])
@pytest.mark.parametrize("causal", [False, True])
def test_both_ways_to_attend_on_a_cpu(backend, causal):
    """Only a kernel can leave out what the mask hides: separate products count whole."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (6, 6, 6))

    def run():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()

    share = 2 if causal and backend == "FLASH_ATTENTION" else 1
    forward = 2 * 2 * 4 * 6 * 6 * (8 + 8) // share
    counts = counted(run)
    assert (counts.forward, counts.backward) == (forward, 2 * forward)


def test_every_aten_operator_is_placed():
    """An operator of torch has a formula, or is said to do no product, or is refused at use."""
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name for s in schemas if s.name.startswith("aten::")}
    suspects = {name for name in names if LOOKS_LIKE_PRODUCT.search(name.split("::")[1])}
    assert {"aten::mm", "aten::_grouped_mm", "aten::lstm", "aten::lgamma"} <= suspects
    refused = suspects - NO_PRODUCT - _BUILT_IN.keys()
    assert not any(has_no_product(name) for name in refused)
    assert "aten::lgamma" not in refused
    assert "aten::_cudnn_rnn" in refused
    assert has_no_product("aten::add")
    assert has_no_product("c10d::allreduce_")
    assert not has_no_product("mylib::add")
    assert not has_no_product("npu::npu_chunk_gated_delta_rule")
    # A name that torch drops or renames would leave a rule without effect.
    assert {n for n in _BUILT_IN if n.startswith("aten::")} - names <= {
        "aten::_grouped_mm", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2",
        "aten::_scaled_mm_v2", "aten::_foreach_mm",
        "aten::_flash_attention_forward_no_dropout_inplace",
    }  # fmt: skip


@pytest.fixture
def library():
    with torch.library._scoped_library("flops_test", "FRAGMENT") as lib:
        before = dict(_registered)
        yield lib
        _registered.clear()
        _registered.update(before)


def define(lib, schema, run):
    name = schema.split("(")[0]
    lib.define(schema)
    lib.impl(name, run, "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, lib.ns), name)


def test_operators_of_others(library):
    x = torch.ones(3, 4)
    op = define(library, "twice(Tensor x) -> Tensor", lambda x: x * 2)
    with pytest.raises(UnknownOperator, match="flops_test::twice"):
        counted(op, x)
    register_flops("flops_test::twice", None)
    assert counted(op, x).forward == 0
    register_flops("flops_test::twice", lambda x, out_val: x.numel() * out_val.dim())
    assert counted(op, x).forward == 24

    stated = define(library, "stated(Tensor x) -> Tensor", lambda x: x * 2)
    stated.flop_formula = lambda x, out_val, attention: len(attention)
    assert counted(stated, x, attention="full").forward == 4

    class Later:
        resolved = 0

        def resolve(self):
            Later.resolved += 1
            return 7

    later = define(library, "later(Tensor x) -> Tensor", lambda x: x * 2)
    later.flop_formula = lambda x, out_val: Later()
    with FlopMeter() as meter:
        later(x)
        later(x)
    assert Later.resolved == 0
    assert (meter.counts.forward, meter.counts.forward, Later.resolved) == (14, 14, 2)

    from torch.utils.flop_counter import flop_registry, register_flop_formula

    torchs = define(library, "torchs(Tensor x) -> Tensor", lambda x: x * 2)
    register_flop_formula(torchs)(lambda shape, out_shape=None: shape[0] * 100)
    try:
        assert counted(torchs, x).forward == 300
    finally:
        del flop_registry[torchs]
    for name in ("twice", "flops_test:twice", "::twice", "a.b::c"):
        with pytest.raises(ValueError, match="need 'namespace::name'"):
            register_flops(name, None)


FUSION = {"head_num": 4, "attention": "model"}


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        ("BNSD", [(2, 4, 6, 8), (2, 2, 6, 8)]),
        ("BSND", [(2, 6, 4, 8), (2, 6, 2, 8)]),
        ("BSH", [(2, 6, 32), (2, 6, 16)]),
        ("SBH", [(6, 2, 32), (6, 2, 16)]),
    ],
)
def test_npu_attention_layouts(layout, shapes):
    q, k = (torch.empty(shape) for shape in shapes)
    run = {"query": q, "key": k, "value": k, "input_layout": layout, **FUSION}
    full = 2 * 2 * 4 * 6 * 6 * (8 + 8)
    assert fusion_attention(**run) == full
    assert fusion_attention(**run, sparse_mode=2) == full // 2
    assert fusion_attention(**run, sparse_mode=3, backward=True) == full
    assert fusion_attention(**run | {"attention": "full"}, sparse_mode=3) == full
    assert fusion_attention(**run | {"attention": "launched"}, backward=True) == full * 5 // 2
    with pytest.raises(ValueError, match="sparse_mode 9"):
        fusion_attention(**run, sparse_mode=9)
    with pytest.raises(ValueError, match="input_layout 'XYZ'"):
        fusion_attention(**run | {"input_layout": "XYZ"})


def test_npu_attention_packs_and_masks():
    q = torch.empty(16, 4, 8)
    run = {"query": q, "key": q, "value": q, "input_layout": "TND", **FUSION}
    ends = [3, 10, 16]
    squares = 9 + 49 + 36
    pack = run | {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    assert fusion_attention(**pack) == 2 * 4 * 16 * squares
    assert fusion_attention(**pack, sparse_mode=3) == 4 * 16 * squares
    tensors = {f"actual_seq_{x}len": torch.tensor(ends) for x in ("q", "kv")}
    assert fusion_attention(**run, **tensors, sparse_mode=3) == 4 * 16 * squares
    with pytest.raises(ValueError, match="TND needs"):
        fusion_attention(**run)
    mask = torch.empty(16, 16, dtype=torch.bool)
    dense = torch.empty(1, 4, 16, 8)
    run = {"query": dense, "key": dense, "value": dense, "input_layout": "BNSD", **FUSION}
    whole = 2 * 4 * 16 * 16 * 16
    assert fusion_attention(**run, pre_tockens=65536, next_tockens=0) == whole  # needs a mask
    assert fusion_attention(**run, atten_mask=mask, pre_tockens=65536, next_tockens=0) == whole // 2
    assert fusion_attention(**run, sparse_mode=1, atten_mask=mask) == whole
    window = double_entries(16, 16, Mask(4, 0, "lower_right"))
    assert fusion_attention(**run, sparse_mode=4, pre_tockens=4, next_tockens=0) == 64 * window
    assert fusion_attention(**run, sparse_mode=6, prefix=[5]) > whole // 2


NPU = {
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor? group_list=None) -> Tensor": (
        lambda op: op([torch.empty(6, 4)], [torch.empty(3, 4, 5)], group_list=torch.empty(3)),
        2 * 6 * 4 * 5,
    ),
    "npu_mm_all_reduce_base(Tensor x1, Tensor x2, str hcom) -> Tensor": (
        lambda op: op(torch.empty(2, 3, 4), torch.empty(4, 5), "g"),
        2 * 6 * 4 * 5,
    ),
    "npu_all_gather_base_mm(Tensor input, Tensor x2, str hcom, int world_size) -> Tensor": (
        lambda op: op(torch.empty(3, 4), torch.empty(4, 5), "g", 8),
        2 * 24 * 4 * 5,
    ),
    "npu_mm_reduce_scatter_base(Tensor input, Tensor x2, str hcom, int world_size) -> Tensor": (
        lambda op: op(torch.empty(16, 4), torch.empty(4, 5), "g", 8),
        2 * 16 * 4 * 5,
    ),
    "npu_grouped_matmul_add_(Tensor input, Tensor x, Tensor weight, Tensor group_list) -> Tensor": (
        lambda op: op(torch.empty(3, 4, 5), torch.empty(6, 4), torch.empty(6, 5), torch.empty(3)),
        2 * 6 * 4 * 5,
    ),
    "npu_alltoallv_gmm(Tensor gmm_x, Tensor gmm_weight, str hcom, int ep_world_size, "
    "int[] send_counts, int[] recv_counts, *, Tensor? mm_x=None, Tensor? mm_weight=None, "
    "bool trans_gmm_weight=False) -> Tensor": (
        lambda op: op(
            torch.empty(6, 4), torch.empty(2, 5, 4), "g", 2, [3, 3], [4, 7],
            mm_x=torch.empty(6, 4), mm_weight=torch.empty(4, 9), trans_gmm_weight=True,
        ),
        2 * 11 * 4 * 5 + 2 * 6 * 4 * 9,
    ),
    "npu_gmm_alltoallv(Tensor gmm_x, Tensor gmm_weight, str hcom, int ep_world_size, "
    "int[] send_counts, int[] recv_counts) -> Tensor": (
        lambda op: op(torch.empty(6, 4), torch.empty(2, 4, 5), "g", 2, [3, 3], [4, 7]),
        2 * 6 * 4 * 5,
    ),
    "npu_ffn(Tensor x, Tensor weight1, Tensor weight2, str activation) -> Tensor": (
        lambda op: op(torch.empty(6, 4), torch.empty(4, 10), torch.empty(5, 4), "swiglu"),
        2 * 6 * 4 * 10 + 2 * 6 * 5 * 4,
    ),
    "npu_linear_backward(Tensor grad, Tensor input, Tensor weight) -> Tensor": (
        lambda op: op(torch.empty(6, 5), torch.empty(6, 4), torch.empty(5, 4)),
        2 * (2 * 6 * 4 * 5),
    ),
    "npu_gemma_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> Tensor": (
        lambda op: op(torch.empty(6, 4), torch.empty(4)),
        0,
    ),
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor": (lambda op: op(torch.empty(6, 4)), 0),
}  # fmt: skip


@pytest.mark.parametrize("schema", NPU, ids=lambda schema: schema.split("(")[0])
def test_npu_operators_by_name(schema):
    """Operators of torch_npu's names and arguments, defined here, are counted without it."""
    run, expected = NPU[schema]
    with torch.library._scoped_library("npu", "FRAGMENT") as lib:
        op = define(lib, schema, lambda *args, **_: torch.empty(0))
        assert counted(run, op).forward == expected


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("NVIDIA L40S") == 362e12 != peak_flops("NVIDIA L40")
    assert peak_flops("NVIDIA H200", torch.float8_e4m3fn) == 1978.9e12
    assert peak_flops("Ascend910", torch.float16) == 256e12
    for unknown in ("Ascend910B3", "Ascend910_9391", "NVIDIA A10G", "something else"):
        assert peak_flops(unknown) is None
    assert peak_flops("Ascend910", torch.float32) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.int64) is None
    assert peak_flops("cpu") is None
    assert peak_flops(torch.device("cpu"), torch.float32) is None


def test_higher_order_operators_are_one_operator(library):
    """A meter neither breaks them nor passes over them in silence; what they run is not heard."""

    def branch(x):
        return (x @ x,)

    def run():
        return torch.ops.higher_order.cond(True, branch, branch, (torch.ones(4, 4),))

    with pytest.raises(UnknownOperator, match="higher_order::cond may multiply"):
        counted(run)
    register_flops("higher_order::cond", lambda *args, out_val: 2 * out_val[0].numel() * 4)
    assert counted(run).forward == 2 * 4**3
