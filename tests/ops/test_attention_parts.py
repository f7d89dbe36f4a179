"""Attention over parts of the keys: statistics, their gradients, merging, dropout by position."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ms_ops
from ms_ops.attention import philox
from ms_ops.attention.call import Call
from ms_ops.attention.flops import _double_entries

RNG = torch.tensor([2**33 + 1, 9])
KEYS = ((0, 5), (5, 6), (6, 14))
EVERY = {"alibi_slopes": ms_ops.alibi_slopes(4), "dropout_p": 0.3, "dropout_rng": RNG}


def qkv(rows=11, keys=14, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, rows, 4, 6), (2, keys, 2, 6), (2, keys, 2, 3))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def part(tensors, keys, **options):
    q, k, v = tensors
    spec = ms_ops.MaskSpec(9, 2, kv_start=keys[0])
    return (q, k[:, slice(*keys)], v[:, slice(*keys)]), {
        **options,
        "mask": spec,
        "kv_start": keys[0],
    }


@pytest.mark.parametrize("options", [{}, EVERY], ids=["plain", "alibi_dropout"])
def test_merged_parts_are_the_whole_with_gradients(options):
    tensors = qkv()
    whole = ms_ops.attention(*tensors, window=(9, 2), causal_align="upper_left", **options)
    total = None
    for keys in KEYS:
        args, settings = part(tensors, keys, **options)
        piece = ms_ops.attention(*args, return_lse=True, **settings)
        total = piece if total is None else ms_ops.attention_merge(*total, *piece)
    close(total[0], whole)
    dy = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, tensors, dy, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(total[0], tensors, dy), expected, strict=True):
        close(got, wanted)
    q = tensors[0].detach()
    sums = []
    for keys in KEYS:
        args, settings = part([t.detach() for t in tensors], keys, **options)
        lse = total[1].detach()
        sums.append(ms_ops.attention_backward(dy, *args, whole.detach(), lse, **settings))
    close(sum(s[0] for s in sums), expected[0])
    close(torch.cat([s[1] for s in sums], 1), expected[1])
    assert q.shape == expected[0].shape


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd", "thd"])
def test_gradient_of_the_log_sum_exp(layout):
    q, k, v = (t.detach() for t in qkv(4, 5))
    options = {"layout": layout, "causal": True, "sink": torch.randn(4, dtype=q.dtype)}
    order = {"sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}.get(layout, (0, 1, 2, 3))
    q, k, v = (t.permute(order) for t in (q, k, v))
    if layout == "thd":
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        options["cu_seqlens_q"] = torch.tensor([0, 3, 3, 8])
        options["cu_seqlens_k"] = torch.tensor([0, 4, 6, 10])
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]

    def run(q, k, v):
        return ms_ops.attention(q, k, v, return_lse=True, **options)

    # A row of the pack has no key: its sum is infinite unless the sink holds it.
    assert torch.autograd.gradcheck(run, leaves)


def test_gradient_of_the_log_sum_exp_in_low_precision():
    wide = qkv(40, 40)
    low = [t.detach().bfloat16().requires_grad_() for t in wide]
    exact = [t.detach().double().requires_grad_() for t in low]
    grads = []
    for tensors in (low, exact):
        _, lse = ms_ops.attention(*tensors, return_lse=True)
        weights = torch.linspace(-3, 2, lse.numel()).view(lse.shape).to(lse.dtype)
        grads.append(torch.autograd.grad(lse, tensors[:2], weights))
    for got, wanted in zip(*grads, strict=True):
        gap = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert gap < 2**-8


def test_philox_known_answers():
    """Vectors that the authors of the generator publish."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    rows = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, expected in rows:
        words = philox.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(int(w) for w in words) == expected


def test_a_block_of_the_dropout_mask_is_the_mask_of_the_block():
    rows = torch.arange(12)
    whole = philox.keep_mask(RNG, 0.4, (2, 6), rows, (0, 23), 0)
    for (h0, h1), (k0, k1) in itertools.product(((0, 6), (2, 5)), ((0, 23), (3, 4), (5, 18))):
        block = philox.keep_mask(RNG, 0.4, (2, h1 - h0), rows[4:9], (k0, k1), h0)
        assert torch.equal(block, whole[:, h0:h1, 4:9, k0:k1])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, philox.keep_mask(RNG + 1, 0.4, (2, 6), rows, (0, 23), 0))


def test_rate_of_dropout():
    keep = philox.keep_mask(RNG, 0.3, (2, 4), torch.arange(64), (0, 256), 0)
    # 131072 draws: 5 standard deviations are 0.0063.
    assert abs(keep.double().mean().item() - 0.7) < 0.0063


def test_dropout_draws_from_the_generator_of_torch():
    q, k, v = (t.detach() for t in qkv())
    torch.manual_seed(3)
    first = ms_ops.attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, ms_ops.attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(3)
    assert torch.equal(first, ms_ops.attention(q, k, v, dropout_p=0.5))
    assert not ms_ops.attention(q, k, v, dropout_p=1.0).any()
    with pytest.raises(ValueError, match="need the seed and offset of forward"):
        ms_ops.attention_backward(first, q, k, v, first, first, dropout_p=0.5)


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize(
    "options",
    [
        {"alibi_slopes": ms_ops.alibi_slopes(2), "causal": True},
        {"window": (100, 0)},
        {"bias": torch.zeros(2600)},
    ],
    ids=["alibi", "window", "bias"],
)
def test_no_tensor_of_all_scores(options):
    from ms_ops.attention import portable

    q = torch.randn(1, 2600, 2, 4)
    args = ms_ops.OPERATORS["attention"].definition.prepare(q, q, q, **options)
    with Largest() as seen:
        out, lse = portable.forward(*args)
        portable.backward(out, q, q, q, out, lse, *args[3:], False)
    assert seen.numel < 2600 * 2600


@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
@pytest.mark.parametrize("bounds", [(None, 0), (3, 0), (2, 1), (None, 2), (4, None), (None, None)])
def test_flops_count_what_the_mask_leaves(align, bounds):
    for rows, keys, prefix in ((6, 6, 0), (4, 9, 0), (9, 4, 0), (5, 8, 3)):
        spec = ms_ops.MaskSpec(*bounds, align, (prefix,) if prefix else ())
        q, k = torch.zeros(3, rows, 2, 4), torch.zeros(3, keys, 2, 4)
        call = Call(*ms_ops.OPERATORS["attention"].definition.prepare(q, k, k, mask=spec)[3:])
        seen = spec.dense(rows, keys)
        expected = 2 * int(seen.sum())
        if bounds[1] == 0:
            corner = keys - rows if align == "lower_right" else 0
            diagonal = range(max(0, -corner), max(0, min(rows, keys - corner)))
            expected -= sum(1 for i in diagonal if i + corner >= prefix)
        assert _double_entries(call, q, k, "portable", "model") == 3 * expected
        assert _double_entries(call, q, k, "portable", "full") == 3 * 2 * rows * keys


def test_flops_of_a_pack_are_those_of_its_sequences():
    q = torch.zeros(9, 2, 4)
    starts = torch.tensor([0, 4, 4, 9])
    options = {"layout": "thd", "cu_seqlens_q": starts, "causal": True}
    call = Call(*ms_ops.OPERATORS["attention"].definition.prepare(q, q, q, **options)[3:])
    assert _double_entries(call, q, q, "portable", "model") == 4 * 4 + 5 * 5


@pytest.mark.parametrize("heads", [1, 8, 12, 16, 20])
def test_alibi_slopes(heads):
    slopes = ms_ops.alibi_slopes(heads)
    power = 1 << (heads.bit_length() - 1)
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    rest = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    torch.testing.assert_close(slopes, torch.tensor((first + rest)[:heads]))
    assert torch.equal(ms_ops.alibi_slopes(heads, start=heads // 2), slopes[heads // 2 :])


@pytest.mark.parametrize("form", ["abs", "sqrt", "signed", "key"])
def test_alibi_as_a_bias_is_alibi_in_the_kernel(form):
    q, k, v = (t.detach() for t in qkv())
    slopes = ms_ops.alibi_slopes(4).double()
    bias = ms_ops.alibi_bias(slopes, 11, 14, form=form, q_start=3)
    got = ms_ops.attention(q, k, v, bias=bias, causal=True, causal_align="upper_left")
    root = form == "sqrt"
    # Under a causal mask the distance never changes its sign.
    wanted = ms_ops.attention(
        q, k, v, mask=ms_ops.MaskSpec(right=0), alibi_slopes=slopes, alibi_sqrt=root, q_start=3
    )
    close(got, wanted)


def test_alibi_errors_and_fill():
    slopes = ms_ops.alibi_slopes(2)
    filled = ms_ops.alibi_bias(slopes, 3, 3, causal_fill=True)
    assert torch.equal(filled == -torch.inf, torch.ones(2, 3, 3).triu(1).bool())
    for call, message in (
        (lambda: ms_ops.alibi_slopes(0), "heads: got 0"),
        (lambda: ms_ops.alibi_slopes(4, start=3, stop=2), "need a slice of 4 heads"),
        (lambda: ms_ops.alibi_bias(slopes, 2, 2, form="cube"), "form: got 'cube'"),
        (lambda: ms_ops.alibi_bias(slopes[None], 2, 2), "need [heads]"),
        (lambda: ms_ops.alibi_bias(slopes, 2, 2, form="key", causal_fill=True), "form 'key'"),
    ):
        with pytest.raises(ValueError, match="need") as caught:
            call()
        assert message in str(caught.value)


def test_a_pack_compiles_without_reading_its_lengths():
    torch._dynamo.reset()
    q, k, v = (t.detach().flatten(0, 1) for t in qkv(dtype=torch.float32))
    starts = torch.tensor([0, 6, 6, 20])

    def run(q, k, v, starts):
        slopes = ms_ops.alibi_slopes(4)
        options = {"causal": True, "window": (4, None), "alibi_slopes": slopes}
        return ms_ops.attention(
            q, k, v, layout="thd", cu_seqlens_q=starts, cu_seqlens_k=starts, **options
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(q, k, v, starts), run(q, k, v, starts), rtol=1e-5, atol=1e-6
    )


def test_recomputation_drops_the_same_weights():
    from torch.utils.checkpoint import checkpoint

    tensors = qkv()

    def run(q, k, v):
        return ms_ops.attention(q, k, v, causal=True, dropout_p=0.5)

    grads = []
    for call in (run, lambda *a: checkpoint(run, *a, use_reentrant=False)):
        torch.manual_seed(8)
        out = call(*tensors)
        grads.append(torch.autograd.grad(out, tensors, torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradient_of_a_bias_from_parts_of_the_queries():
    q, k, v = (t.detach() for t in qkv())
    bias = torch.randn(4, 11, 14, dtype=q.dtype).requires_grad_()
    out, lse = ms_ops.attention(q, k, v, bias=bias, return_lse=True)
    dy = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(out, bias, dy)
    out = out.detach()
    parts = []
    for a, b in ((0, 4), (4, 11)):
        rows = (dy[:, a:b], q[:, a:b], k, v, out[:, a:b], lse.detach()[:, :, a:b])
        grads = ms_ops.attention_backward(*rows, bias=bias.detach()[:, a:b], bias_grad=True)
        parts.append(grads[3])
    close(torch.cat(parts, 1), wanted)
    with pytest.raises(ValueError, match="bias_grad: got True without a bias"):
        ms_ops.attention_backward(dy, q, k, v, out, lse, bias_grad=True)
