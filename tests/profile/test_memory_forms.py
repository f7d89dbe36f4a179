"""What layers keep for backward, to the byte, by the census and by the saved-tensor hooks.

Notation: `n` tokens (sequence times batch), `h` width, `f` hidden width, `kv` width of keys or
values, `a` heads, `w` bytes of an element.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ms_profile.memory import MemoryMeter, saved_bytes
from support.mutation import Mutation, assert_caught

S, B, H, FFN, HEADS, KV_HEADS = 12, 3, 16, 40, 4, 2
N = S * B
KV = H // HEADS * KV_HEADS
DTYPES = [torch.float32, torch.bfloat16]


class GeluMlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(H, FFN), nn.GELU(), nn.Linear(FFN, H))


class SwigluMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, 2 * FFN, bias=False), nn.Linear(FFN, H, bias=False)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class EagerRmsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H))

    def forward(self, x):
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (wide * rstd).to(x.dtype)


class Rope(nn.Module):
    """Rotates halves; its tables are buffers, so it keeps nothing of its own."""

    def __init__(self):
        super().__init__()
        angle = torch.arange(S)[:, None] * torch.ones(H // HEADS)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x):
        turned = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
        return x * self.cos + turned * self.sin


class Attention(nn.Module):
    """CPU flash attention without dropout; x: [B, S, H]."""

    def __init__(self, rope=False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(H, n) for n in (H, KV, KV, H))
        self.rope = Rope() if rope else nn.Identity()

    def forward(self, x):
        q, k, v = (
            layer(x).view(B, S, -1, H // HEADS).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = self.rope(q), self.rope(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, S, H))


class Layer(nn.Module):
    def __init__(self, norm, mlp, rope):
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attention, self.mlp = Attention(rope), mlp()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def gpt_layer():
    return Layer(lambda: nn.LayerNorm(H), GeluMlp, rope=False)


def llama_layer():
    return Layer(EagerRmsNorm, SwigluMlp, rope=True)


class KeepsOnContext(torch.autograd.Function):
    """A product that keeps a tensor where hooks do not look."""

    @staticmethod
    def forward(ctx, x):
        ctx.twice = x * 2
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.twice


@dataclass(frozen=True)
class Kept:
    census: int
    hooks: int


def kept(model, dtype=torch.float32):
    """Bytes kept after `model(x)`, x included, by both methods; checks that backward frees them."""
    model = model.to(dtype)
    leaf = torch.randn(B, S, H, dtype=dtype, requires_grad=True)
    with MemoryMeter(exclude=[model, leaf]) as meter, saved_bytes(exclude=[model, leaf]) as hooks:
        y = model(leaf * 1)  # nobody but the graph holds the product
        mark = meter.mark("forward", outputs=y)
        by_hooks = hooks.live
        loss = y.sum()
        del y
        loss.backward()
        assert meter.leaks(expected=loss) == ()
        assert hooks.live == 0
    return Kept(mark.saved, by_hooks)


def layer_norm(w):
    return w * N * H + 2 * w * N  # input, mean, rstd


def eager_rms_norm(w):
    # The wide copy (fp32 input is its own), rstd, the product that the weight multiplies.
    return 4 * N * H + 4 * N + w * N * H


def attention(w):
    return w * N * H + w * N * (H + 2 * KV) + w * N * H + 4 * N * HEADS


def gpt(w):
    return 2 * layer_norm(w) + attention(w) + w * N * (H + 2 * FFN)


def llama(w):
    # An eager norm in fp32 keeps its input itself, in bf16 a wide copy in its place.
    return 2 * eager_rms_norm(w) + attention(w) + w * N * (H + 4 * FFN)


FORMS = {
    "gelu mlp": (GeluMlp, lambda w: w * N * (H + 2 * FFN)),
    "eager swiglu mlp": (SwigluMlp, lambda w: w * N * (H + 4 * FFN)),
    "layer norm": (lambda: nn.LayerNorm(H), layer_norm),
    "eager rms norm": (EagerRmsNorm, eager_rms_norm),
    "attention": (Attention, attention),
    "attention with rope": (lambda: Attention(rope=True), attention),
    "gpt layer": (gpt_layer, gpt),
    "llama layer": (llama_layer, llama),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_closed_form(name, dtype):
    make, form = FORMS[name]
    assert kept(make(), dtype) == Kept(form(dtype.itemsize), form(dtype.itemsize))


EXTRA = Mutation(
    "one more saved tensor",
    f"{__name__}:SwigluMlp.forward",
    "value)",
    "value.sin())",
)


def test_an_extra_saved_tensor_is_caught():
    def check():
        assert kept(SwigluMlp()).census == FORMS["eager swiglu mlp"][1](4)

    assert_caught(EXTRA, check)
    with EXTRA.applied():
        assert kept(SwigluMlp()).census == FORMS["eager swiglu mlp"][1](4) + 4 * N * FFN


class ScaleFromContext(torch.autograd.Function):
    """Keeps twice its input as an attribute of the context, where no hook looks."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = x * 2
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor


class OnContext(nn.Module):
    def forward(self, x):
        return ScaleFromContext.apply(x)


def test_tensors_kept_on_the_context_are_seen_by_the_census_alone():
    model, leaf = OnContext(), torch.randn(B, S, H, requires_grad=True)
    with MemoryMeter(exclude=leaf) as meter, saved_bytes() as hooks:
        y = model(leaf * 1)
        mark = meter.mark("forward", outputs=y)
        assert Kept(mark.saved, hooks.total) == Kept(census=4 * N * H, hooks=0)
        loss = y.sum()
        del y
        loss.backward()
        # Unlike saved tensors, attributes live as long as the graph, which the loss holds.
        (leak,) = meter.leaks(expected=loss)
        assert (leak.nbytes, leak.birth.module) == (4 * N * H, "OnContext")
        del loss
        assert meter.leaks() == ()


class DiscardingMlp(GeluMlp):
    """Empties the activation after its use and computes it again when backward comes to it."""

    def forward(self, x):
        hidden = self[0](x)
        act = self[1](hidden)
        y = self[2](act)
        storage = act.untyped_storage()
        full = storage.nbytes()
        shell, source = act.data, hidden.detach()
        storage.resize_(0)

        def refill(grad):
            storage.resize_(full)
            shell.copy_(F.gelu(source))

        y.register_hook(refill)
        return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_discarded_and_restored_activation(dtype):
    w = dtype.itemsize
    torch.manual_seed(0)
    plain, model = GeluMlp().to(dtype), DiscardingMlp().to(dtype)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(B, S, H, dtype=dtype)
    with MemoryMeter(exclude=[model, x]) as meter:
        y = model(x * 1)
        assert meter.mark("forward", outputs=y).saved == w * N * (H + FFN)
        full = w * N * (2 * H + 2 * FFN)  # input, hidden, activation and output, all at once
        assert meter.peak.nbytes == full
        y.sum().backward()
        del y
        assert meter.leaks() == ()
    plain(x * 1).sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_keeps_its_input_and_shows_its_interior(reentrant):
    """Hooks never see what a non-reentrant checkpoint computes again; the census does."""
    model = GeluMlp()
    leaf = torch.randn(B, S, H, requires_grad=True)
    with MemoryMeter(exclude=[model, leaf]) as meter, saved_bytes(exclude=[model, leaf]) as hooks:
        y = checkpoint(model, leaf * 1, use_reentrant=reentrant)
        mark = meter.mark("forward", outputs=y)
        assert mark.saved == hooks.live == 4 * N * H
        y.sum().backward()
        del y
        assert meter.leaks() == ()
    again = sum(h.nbytes for h in meter.peak.snapshot.holdings if h.birth.phase == "recompute")
    # The reentrant one peaks with all of it alive; the other stops early, and peaks with less.
    assert again == 4 * N * (2 * FFN + H if reentrant else FFN)
    assert hooks.peak == 4 * N * (H + (2 * FFN if reentrant else 0))


@pytest.mark.parametrize("make", [gpt_layer, llama_layer, DiscardingMlp, OnContext])
def test_fake_tensors_give_the_same_numbers(make):
    def run():
        model = make()
        optimizer = torch.optim.AdamW(model.parameters()) if list(model.parameters()) else None
        leaf = torch.randn(B, S, H, requires_grad=True)
        given = [model] if optimizer is None else [model, optimizer]
        with MemoryMeter(*given, exclude=leaf) as meter:
            y = model(leaf * 1)
            mark = meter.mark("forward", outputs=y)
            y.sum().backward()
            del y
            if optimizer is not None:
                optimizer.step()
            after = meter.mark("step")
        peak = meter.peak
        lives = [live for _, _, live in meter.timeline]
        return (
            lives, mark.by_kind, after.by_kind, mark.saved, meter.saved_total,
            peak.nbytes, peak.op, peak.index, peak.module, peak.snapshot.by_kind,
        )  # fmt: skip

    real = run()
    with FakeTensorMode():
        assert run() == real


@pytest.mark.parametrize("make", [gpt_layer, llama_layer])
def test_gradients_are_bitwise_the_same(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(B, S, H)
    grads = []
    for context in (nullcontext(), MemoryMeter(model)):
        model.zero_grad()
        with context:
            model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
