"""The operator names of MindSpeed for attention: signatures, values, gradients, errors."""

import inspect
import math

import pytest
import torch

import ms_ops
from mindspeed.ops import fusion_attention, fusion_attention_v2, npu_ring_attention_update
from ms_ops import masks

SHARED = ["query", "key", "value", "head_num", "input_layout", "pse", "padding_mask", "atten_mask"]
TAIL = ["sparse_mode", "gen_mask_parallel", "sync"]
MIDDLE = ["inner_precise", "prefix", "actual_seq_qlen", "actual_seq_kvlen", *TAIL]
V2 = ["pse_type", "q_start_idx", "kv_start_idx"]
update = npu_ring_attention_update.npu_ring_attention_update


def qkv(layout="BNSD", heads=4, groups=2, rows=6, keys=6):
    generator = torch.Generator().manual_seed(2)
    order = {"BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BSND": (0, 2, 1, 3)}.get(layout)
    tensors = []
    for n, s in ((heads, rows), (groups, keys), (groups, keys)):
        x = torch.randn(2, n, s, 8, generator=generator, dtype=torch.float64)
        x = x if order is None else x.permute(order)
        x = x.flatten(2) if layout in ("BSH", "SBH") else x
        tensors.append(x.contiguous().requires_grad_())
    return tensors


def test_signatures():
    tokens = ["scale", "keep_prob", "pre_tokens", "next_tokens"]
    found = inspect.signature(fusion_attention_v2.npu_fusion_attention).parameters
    assert list(found) == [*SHARED, *tokens, *MIDDLE, *V2]
    assert found["pse"].kind is inspect.Parameter.KEYWORD_ONLY
    assert (found["scale"].default, found["keep_prob"].default) == (1.0, 1.0)
    assert (found["pre_tokens"].default, found["pse_type"].default) == (2147483647, 1)
    first = inspect.signature(fusion_attention.npu_fusion_attention).parameters
    tockens = [t.replace("tokens", "tockens") for t in tokens]
    assert list(first) == [*SHARED, *tockens, *MIDDLE]
    assert first["pse"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    grad = inspect.signature(fusion_attention_v2.npu_fusion_attention_grad).parameters
    stats = ["softmax_max", "softmax_sum", "softmax_in", "attention_in"]
    state = ["inner_precise", "seed", "offset", "numels", *MIDDLE[1:]]
    head = [*SHARED[:3], "grad_outputs", *SHARED[3:]]
    assert list(grad) == [*head, *stats, *tokens, *state, *V2]
    assert grad["seed"].default == 1234
    ring = ["attn_out", "softmax_max", "softmax_sum"]
    names = [*(f"prev_{r}" for r in ring), *(f"cur_{r}" for r in ring), "actual_seq_qlen", "layout"]
    assert list(inspect.signature(update).parameters) == names


SLOPES = ms_ops.alibi_slopes(4)
CAUSAL = masks.compressed_causal()
FORMS = [
    ({}, {}),
    ({"atten_mask": CAUSAL, "sparse_mode": 2}, {"mask": ms_ops.MaskSpec(right=0)}),
    (
        {"atten_mask": CAUSAL, "sparse_mode": 4, "pre_tokens": 2, "next_tokens": 1},
        {"window": (2, 1)},
    ),
    (
        {"atten_mask": masks.compressed_prefix(), "sparse_mode": 6, "prefix": [2, 0]},
        {"mask": ms_ops.MaskSpec(right=0, align="lower_right", prefix=(2, 0))},
    ),
    (
        {"atten_mask": torch.ones(6, 6).triu(1).to(torch.uint8), "next_tokens": 0},
        {"causal": True},
    ),
    ({"pse": SLOPES, "pse_type": 2, "q_start_idx": [3]}, {"alibi_slopes": SLOPES, "q_start": 3}),
    ({"pse": SLOPES, "pse_type": 3}, {"alibi_slopes": SLOPES, "alibi_sqrt": True}),
    ({"pse": torch.linspace(0, 1, 36).view(1, 1, 6, 6).double(), "pse_type": 0}, "bias"),
    ({"pse": torch.linspace(0, 1, 36).view(1, 1, 6, 6).double()}, "scaled bias"),
]


@pytest.mark.parametrize("layout", ["BNSD", "BSH", "SBH", "BSND"])
@pytest.mark.parametrize(("old", "new"), FORMS, ids=range(len(FORMS)))
def test_forward_and_gradients(layout, old, new):
    if isinstance(new, str):
        new = {"bias": old["pse"], "bias_scaled": new == "scaled bias"}
    ours = qkv("BNSD")
    out, lse = ms_ops.attention(*ours, layout="bhsd", scale=0.5, return_lse=True, **new)
    given = qkv(layout)
    got = fusion_attention_v2.npu_fusion_attention(*given, 4, layout, scale=0.5, **old)
    assert len(got) == 7
    assert got[3].numel() == 0
    order = {"BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BSND": (0, 2, 1, 3)}
    torch.testing.assert_close(
        got[0].reshape(out.permute(order.get(layout, (0, 1, 2, 3))).shape),
        out.permute(order.get(layout, (0, 1, 2, 3))),
    )
    stat = got[1] + got[2].log()
    assert stat.shape == (2, 4, 6, 8)
    torch.testing.assert_close(stat[..., 0], lse.float())
    assert torch.equal(stat[..., 7], stat[..., 0])
    dy = torch.randn_like(got[0])
    grads = torch.autograd.grad(got[0], given, dy)
    again = fusion_attention_v2.npu_fusion_attention_grad(
        *given,
        dy,
        4,
        layout,
        softmax_max=got[1],
        softmax_sum=got[2],
        attention_in=got[0],
        scale=0.5,
        seed=got[4],
        offset=got[5],
        numels=got[6],
        **old,
    )
    for mine, wanted in zip(again, grads, strict=False):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    assert (again[3] is not None) == ("bias" in new)
    if "bias" in new:
        assert again[3].shape == old["pse"].shape


def test_first_version_and_dropout_replayed_by_the_gradient():
    given = qkv()
    torch.manual_seed(4)
    got = fusion_attention.npu_fusion_attention(*given, 4, "BNSD", None, None, None, 0.5, 0.6)
    assert got[4] > 0
    assert got[6] == 2 * 4 * 6 * 6
    dy = torch.randn_like(got[0])
    wanted = torch.autograd.grad(got[0], given, dy)
    stats = {"softmax_max": got[1], "softmax_sum": got[2], "attention_in": got[0]}
    again = fusion_attention.npu_fusion_attention_grad(
        *given, dy, 4, "BNSD", scale_value=0.5, keep_prob=0.6, seed=got[4], **stats
    )
    for mine, exact in zip(again, wanted, strict=False):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)


def test_packed():
    q, k, v = (torch.randn(9, n, 8) for n in (4, 2, 2))
    ends = {"actual_seq_qlen": [3, 3, 9, 0], "actual_seq_kvlen": [3, 3, 9, 0]}
    mask = {"atten_mask": CAUSAL, "sparse_mode": 3}
    got = fusion_attention_v2.npu_fusion_attention(q, k, v, 4, "TND", **ends, **mask)
    starts = torch.tensor([0, 3, 3, 9, 9])
    wanted = ms_ops.attention(q, k, v, layout="thd", cu_seqlens_q=starts, causal=True, scale=1.0)
    assert torch.equal(got[0], wanted)
    assert got[1].shape == (9, 4, 8)


@pytest.mark.parametrize("layout", ["SBH", "TND"])
def test_ring_update_is_attention_over_all_keys(layout):
    q, k, v = (torch.randn(6, 2, n, 8) for n in (4, 4, 4))
    if layout == "TND":
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    heads = {"SBH": "sbhd", "TND": "thd"}[layout]

    def attend(rows):
        options = {}
        if layout == "TND":
            options["cu_seqlens_q"] = torch.tensor([0, 12])
            options["cu_seqlens_k"] = torch.tensor([0, len(range(*rows.indices(12)))])
        out, lse = ms_ops.attention(q, k[rows], v[rows], layout=heads, return_lse=True, **options)
        # Any pair with max + log(sum) = lse: here a maximum that is 0.3 too low.
        stat = [(lse - 0.3), torch.full_like(lse, math.exp(0.3))]
        return out.flatten(2) if layout == "SBH" else out, *(
            s[..., None].expand(*s.shape, 8) for s in stat
        )

    parts, whole = (attend(slice(0, 2)), attend(slice(2, None))), attend(slice(None))
    lengths = torch.tensor([12]) if layout == "TND" else None
    out, top, total = update(*parts[0], *parts[1], lengths, layout)
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(top + total.log(), whole[1] + whole[2].log())
    assert torch.equal(top, torch.maximum(parts[0][1], parts[1][1]))


def test_ring_update_of_rows_without_keys():
    out, stat = torch.zeros(1, 1, 4), torch.full((1, 2, 1, 8), -math.inf)
    got = update(out, stat, torch.zeros_like(stat), out, stat, torch.zeros_like(stat))
    assert torch.equal(got[0], out)
    assert torch.equal(got[1], stat)
    assert not got[2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_layout": "BHSD"}, "input_layout: got 'BHSD'"),
        ({"head_num": 0}, "head_num: got 0"),
        ({"keep_prob": 0.0}, "keep_prob: got 0.0"),
        ({"padding_mask": torch.ones(1)}, "padding_mask"),
        ({"pse_type": 4}, "pse_type: got 4"),
        ({"pse_type": 2}, "pse: got None with pse_type 2"),
        ({"sparse_mode": 7, "atten_mask": CAUSAL}, "sparse_mode: got 7"),
        ({"sparse_mode": 2}, "atten_mask: got None with sparse_mode 2"),
        ({"sparse_mode": 2, "atten_mask": CAUSAL[:6, :6]}, "the compressed mask of sparse_mode 2"),
        ({"sparse_mode": 6, "atten_mask": CAUSAL, "prefix": [1, 1]}, "(3072, 2048)"),
    ],
)
def test_errors(options, message):
    arguments = {"head_num": 4, "input_layout": "BNSD", **options}
    with pytest.raises(ValueError, match="need") as caught:
        fusion_attention_v2.npu_fusion_attention(*qkv(), **arguments)
    assert message in str(caught.value)


def test_errors_of_packs_and_updates():
    q = torch.randn(4, 2, 8)
    call = fusion_attention_v2.npu_fusion_attention
    stat = torch.zeros(2, 4, 3, 8)
    out = torch.zeros(3, 2, 8)
    for run, message in (
        (lambda: call(q, q, q, 2, "TND"), "lists of the ends"),
        (
            lambda: call(q, q, q, 2, "TND", actual_seq_qlen=[4], actual_seq_kvlen=[2, 4]),
            "lists of one length",
        ),
        (lambda: update(out, stat, stat, out, stat, stat, None, "BSH"), "layout: got 'BSH'"),
        (lambda: update(out, stat, stat, out, stat, stat, None, "TND"), "actual_seq_qlen"),
        (lambda: update(out[0], stat, stat, out, stat, stat), "prev_attn_out: got 2"),
        (lambda: update(out, stat[..., :1], stat, out, stat, stat), "with 8 numbers last"),
    ):
        with pytest.raises(ValueError, match="need") as caught:
            run()
        assert message in str(caught.value)
    with pytest.raises(TypeError, match="need what npu_fusion_attention returned"):
        fusion_attention_v2.npu_fusion_attention_grad(q, q, q, q, 2, "TND")
