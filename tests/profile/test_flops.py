"""The meter against closed forms that are written out here, as equal integers."""

import contextlib
import json
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ms_profile.flops import FlopMeter, Flops, UnknownOperator, registry
from support.mutation import Mutation, assert_caught

BATCH, LENGTH = 2, 16


@dataclass(frozen=True)
class Model:
    """A transformer; `experts` 0 is dense, `top` of them see each token."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    groups: int = 4
    ffn: int = 128
    gated: bool = False
    experts: int = 0
    top: int = 2
    vocab: int = 61

    def block_flops(self):
        """Products of one block's forward: attention, its core, feed-forward (last one apart)."""
        tokens, width = BATCH * LENGTH, self.hidden // self.heads
        qkv = 2 * tokens * self.hidden * (self.heads + 2 * self.groups) * width
        core = 2 * 2 * BATCH * self.heads * width * LENGTH**2 // 2
        out = 2 * tokens * self.hidden**2
        copies = self.top if self.experts else 1
        up = 2 * tokens * self.hidden * self.ffn * (2 if self.gated else 1) * copies
        down = 2 * tokens * self.ffn * self.hidden * copies
        router = 2 * tokens * self.hidden * self.experts
        return qkv + core + out + up + router, down

    def forward_flops(self):
        head = 2 * BATCH * LENGTH * self.hidden * self.vocab
        return self.layers * sum(self.block_flops()) + head


MODELS = {
    "gpt": Model(),
    "llama": Model(groups=2, ffn=88, gated=True, layers=3),
    "moe": Model(groups=2, ffn=48, gated=True, experts=5),
}


class FeedForward(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.gated = model.gated
        self.up = nn.Linear(model.hidden, model.ffn * (2 if model.gated else 1), bias=False)
        self.down = nn.Linear(model.ffn, model.hidden, bias=False)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x))


class Experts(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.top = model.top
        self.router = nn.Linear(model.hidden, model.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(model) for _ in range(model.experts))

    def forward(self, x):
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows).softmax(-1).topk(self.top)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.width = model, model.hidden // model.heads
        rows = (model.heads + 2 * model.groups) * self.width
        self.norm = nn.LayerNorm(model.hidden)
        self.qkv = nn.Linear(model.hidden, rows)
        self.out = nn.Linear(model.hidden, model.hidden)
        self.mlp = Experts(model) if model.experts else FeedForward(model)

    def forward(self, x):
        model = self.model
        sizes = [model.heads, model.groups, model.groups]
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = qkv.split(sizes, 1)
        k, v = (t.repeat_interleave(model.heads // model.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, model, checkpointing=None):
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Embedding(model.vocab, model.hidden)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.head = nn.Linear(model.hidden, model.vocab, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


def step(model, dtype=torch.float32, checkpointing=None, meter=None, build=None, **options):
    torch.manual_seed(0)
    meter = meter or FlopMeter(**options)
    with build() if build else contextlib.nullcontext():
        net = Transformer(model, checkpointing)
        net = net if dtype == torch.float32 else net.to(dtype)
        tokens = torch.randint(model.vocab, (BATCH, LENGTH))
        with meter:
            net(tokens).float().logsumexp(-1).mean().backward()
    return meter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_closed_form(name, checkpointing, dtype):
    model = MODELS[name]
    meter = step(model, dtype, checkpointing)
    forward = model.forward_flops()
    rest, last = model.block_flops()
    # A non-reentrant checkpoint stops when it has what backward needs: the last product's inputs.
    again = {None: 0, "reentrant": rest + last, "non-reentrant": rest}[checkpointing]
    if model.experts and checkpointing == "non-reentrant":
        # The last expert's product, whose rows depend on the routing, is followed by one that
        # needs its result.
        again = rest + last
    counts = meter.counts
    assert counts == Flops(forward, 2 * forward, model.layers * again)
    assert (counts.model, counts.hardware) == (3 * forward, 3 * forward + counts.recompute)
    assert meter.as_dict()["by_dtype"].keys() == {str(dtype).removeprefix("torch.")}


def check_step():
    model = MODELS["gpt"]
    forward = model.forward_flops()
    assert step(model).counts == Flops(forward, 2 * forward)


@pytest.mark.parametrize(
    "mutation",
    [
        Mutation(
            "attention counted without its values",
            "ms_profile.flops.attention:forward_flops",
            "(shape.qk_dim + shape.v_dim)",
            "shape.qk_dim",
        ),
        Mutation(
            "backward of attention doubled",
            "ms_profile.flops.attention:backward_flops",
            "* 2 *",
            "* 4 *",
        ),
        Mutation(
            "the causal diagonal ignored",
            "ms_profile.flops.attention:double_entries",
            "twice -=",
            "_ =",
        ),
        Mutation("products halved", "ms_profile.flops.matmul:product", "2 *", "1 *"),
    ],
    ids=lambda mutation: mutation.name,
)
def test_mutations_are_caught(mutation):
    assert_caught(mutation, check_step)


def test_a_missing_attention_formula_is_an_error(monkeypatch):
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    monkeypatch.delitem(registry._BUILT_IN, name)
    with pytest.raises(UnknownOperator, match=f"{name} may multiply"):
        step(MODELS["gpt"])
    with pytest.warns(UserWarning, match="not counted: aten::_scaled_dot") as warned:
        meter = step(MODELS["gpt"], unknown="warn")
    assert len(warned) == 1  # once an operator, not once a call
    assert meter.uncounted == (name,)
    assert meter.counts.forward < MODELS["gpt"].forward_flops()


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_fake_tensors_count_the_same(checkpointing):
    model = MODELS["llama"]
    real = step(model, checkpointing=checkpointing).as_dict()
    assert step(model, checkpointing=checkpointing, build=FakeTensorMode).as_dict() == real


def test_kinds_of_attention():
    model = MODELS["gpt"]
    core = model.layers * 2 * BATCH * model.hidden * LENGTH**2  # forward, causal
    forward = model.forward_flops()
    assert step(model, attention="full").counts == Flops(forward + core, 2 * (forward + core))
    launched = step(model, attention="launched").counts
    assert launched == Flops(forward, 2 * forward + core // 2)


def test_modules_operators_and_json():
    model = MODELS["gpt"]
    meter = step(model, checkpointing="reentrant")
    table = json.loads(json.dumps(meter.as_dict()))
    assert (table["kind"], table["version"]) == ("flops", 1)
    up = 2 * BATCH * LENGTH * model.hidden * model.ffn
    assert table["by_module"]["Transformer.blocks.1.mlp.up"] == {
        "forward": up,
        "recompute": up,
        "backward": 2 * up,
    }
    head = 2 * BATCH * LENGTH * model.hidden * model.vocab
    assert table["by_module"]["Transformer.head"] == {"forward": head, "backward": 2 * head}
    for tables in ("by_module", "by_op", "by_dtype"):
        sums = dict.fromkeys(table["total"], 0)
        for row in table[tables].values():
            for phase, number in row.items():
                sums[phase] += number
        assert sums == table["total"], tables
    assert step(model, by_module=False).as_dict()["by_module"] == {}


def test_what_is_done_without_gradients_stands_apart():
    net = nn.Linear(8, 4)
    with FlopMeter() as meter:
        with torch.no_grad():
            net(torch.ones(3, 8))
        with torch.inference_mode():
            net(torch.ones(3, 8))
    assert meter.counts == Flops(other=2 * (2 * 3 * 8 * 4))
    assert meter.counts.hardware == 0
    total = {"forward": 0, "backward": 0, "recompute": 0, "other": 2 * (2 * 3 * 8 * 4)}
    assert meter.as_dict()["total"] == total


def test_sampling_counts_one_entry_of_n():
    net = nn.Linear(8, 4)
    meter = FlopMeter(sample_every=3)
    for rows in (1, 20, 300, 5, 6):
        with meter:
            net(torch.ones(rows, 8))
    assert meter.counts.forward == 2 * (1 + 5) * 8 * 4
    assert (meter.entries, meter.sampled) == (5, 2)
    assert meter.mfu(step_time=0.5, peak=1000.0) == (2 * 6 * 8 * 4 / 2) / 500
    meter.reset()
    assert (meter.counts, meter.entries) == (Flops(), 0)


def test_mfu_and_hfu():
    meter = step(MODELS["gpt"], checkpointing="reentrant")
    counts = meter.counts
    assert meter.mfu(2.0, 1e9) == counts.model / 2e9
    assert meter.hfu(2.0, 1e9) == counts.hardware / 2e9 > meter.mfu(2.0, 1e9)
    for arguments in ((0.0, 1e9), (1.0, 0.0), (-1.0, 1e9), (1.0, None)):
        with pytest.raises(ValueError, match="need a positive number"):
            meter.mfu(*arguments)
    with pytest.raises(ValueError, match="nothing is counted yet"):
        FlopMeter().mfu(1.0, 1.0)


def test_entering_twice_and_nesting():
    net, x = nn.Linear(8, 4), torch.ones(3, 8)
    outer = FlopMeter(sample_every=2)
    for _ in range(2):  # counted, then passed over
        with outer, pytest.raises(RuntimeError, match="on already"), outer:
            pass
    outer = FlopMeter()
    with outer:
        net(x)
        with FlopMeter() as inner:
            net(x)
    assert outer.counts.forward == 2 * inner.counts.forward == 4 * 3 * 8 * 4
    net(x)
    assert inner.counts.forward == 2 * 3 * 8 * 4


@pytest.mark.parametrize(
    "options", [{"attention": "causal"}, {"unknown": "ignore"}, {"sample_every": 0}], ids=str
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"FlopMeter: {next(iter(options))}: got"):
        FlopMeter(**options)


def test_an_error_inside_leaves_nothing_behind():
    meter = FlopMeter()
    net = nn.Linear(8, 4)
    with pytest.raises(RuntimeError, match="inside"), meter:
        raise RuntimeError("inside")
    net(torch.ones(3, 8))
    assert meter.counts == Flops()
    with meter:
        y = net(torch.ones(3, 8))
    assert meter.counts.forward == 2 * 3 * 8 * 4
    gone = weakref.ref(y)
    del y
    assert gone() is None  # the meter keeps no tensor


def test_what_is_compiled_stays_compiled():
    """A meter must not change the numbers of the step, nor those of later ones."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    product = torch.compile(lambda x, weight: F.gelu(x @ weight), backend=backend)
    x, weight = torch.ones(3, 8), torch.ones(8, 4)
    with FlopMeter() as meter:
        first = product(x, weight)
    assert (meter.counts.forward, len(compiled)) == (2 * 3 * 8 * 4, 1)
    with meter:
        product(x, weight)
    assert (meter.counts.forward, len(compiled)) == (2 * 2 * 3 * 8 * 4, 1)
    assert torch.equal(product(x, weight), first)
