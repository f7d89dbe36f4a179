"""A small GPT trained on split sequences ends where it ends on whole ones."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ms_ops.attention import attention
from ms_parallel.context import (
    AttnMask,
    CPTopology,
    SeqLayout,
    context_attention,
    simulate_attention,
)
from support.context import make_plan
from support.ranks import run_ranks

TOTAL, WIDTH, HEADS, KV_HEADS, WORDS, STEPS, RANKS = 22, 16, 4, 2, 31, 20, 4
DOCUMENTS = (0, 3, 4, 15, 22)
SIDE = WIDTH // HEADS


class Layer(torch.nn.Module):
    """Attention and a feed-forward of one block; `attend` maps lists of shards to a list."""

    def __init__(self):
        super().__init__()
        kv = SIDE * KV_HEADS
        self.qkv = torch.nn.Linear(WIDTH, WIDTH + 2 * kv)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.ffn = torch.nn.Sequential(
            torch.nn.LayerNorm(WIDTH),
            torch.nn.Linear(WIDTH, 2 * WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(2 * WIDTH, WIDTH),
        )
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, shards, attend):
        sizes = (WIDTH, SIDE * KV_HEADS, SIDE * KV_HEADS)
        parts = [self.qkv(self.norm(x)).split(sizes, -1) for x in shards]
        q, k, v = ([p[i].unflatten(-1, (-1, SIDE)) for p in parts] for i in range(3))
        mixed = [x + self.out(o.flatten(-2)) for x, o in zip(shards, attend(q, k, v), strict=True)]
        return [x + self.ffn(x) for x in mixed]


class Gpt(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, WIDTH)
        self.places = torch.nn.Embedding(TOTAL, WIDTH)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))
        self.head = torch.nn.Linear(WIDTH, WORDS)

    def forward(self, tokens, positions, attend):
        shards = [self.words(t) + self.places(p) for t, p in zip(tokens, positions, strict=True)]
        for layer in self.layers:
            shards = layer(shards, attend)
        return [self.head(x) for x in shards]


def train(layout, documents, attend, ranks=None, combine=lambda tensors: None):
    """Train on the parts of a layout; return all losses, and the weights at the end.

    With processes: on the parts of `ranks`, and `combine` adds up what the processes have.
    """
    torch.manual_seed(0)
    model = Gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ranks = range(layout.size) if ranks is None else ranks
    positions = [layout.position_ids(r, documents) for r in ranks]
    losses = []
    for step in range(STEPS):
        text = torch.randint(0, WORDS, (1, TOTAL + 1), generator=torch.manual_seed(step % 3))
        tokens, targets = (
            [layout.shard(t, r, 1) for r in ranks] for t in (text[:, :-1], text[:, 1:])
        )
        logits = model(tokens, positions, attend)
        pairs = zip(logits, targets, strict=True)
        loss = sum(F.cross_entropy(x[0], t[0], reduction="sum") for x, t in pairs) / TOTAL
        optimizer.zero_grad()
        loss.backward()
        combine([loss.detach(), *(p.grad for p in model.parameters())])
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def whole():
    """The same on one process, with and without documents."""
    found = {}
    for documents in ((), DOCUMENTS):
        mask = AttnMask.causal(documents).matrix(TOTAL)

        def attend(q, k, v, mask=mask):
            return [attention(q[0], k[0], v[0], mask=mask)]

        found[documents] = train(SeqLayout.contiguous(TOTAL, 1), documents, attend)
    return found


def equals(found, expected):
    """Assert that losses and weights are those of one process, and that something was learned."""
    (losses, weights), (expected, right) = found, expected
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-9
    assert float((weights - right).abs().max()) < 1e-9
    assert losses[-1] < losses[0] - 0.5


PLANS = (
    {"algorithm": "ring"},
    {"algorithm": "ring", "window": 2, "kv_keep": "k", "pruned": True},
    {"algorithm": "ulysses", "kv_keep": "pre_k"},
    {"algorithm": "usp", "ulysses": 2},
    {"algorithm": "allgather_kv"},
    {"algorithm": "tasks"},
)


@pytest.mark.parametrize("documents", [(), DOCUMENTS], ids=["", "documents"])
@pytest.mark.parametrize("options", PLANS, ids=lambda o: "-".join(map(str, o.values())))
def test_20_steps(whole, options, documents):
    layout = SeqLayout.zigzag(TOTAL, RANKS)
    plan = make_plan(layout, AttnMask.causal(documents), (HEADS, KV_HEADS), (SIDE, SIDE), **options)
    found = train(layout, documents, lambda q, k, v: simulate_attention(q, k, v, plan))
    equals(found, whole[documents])


PROCESSES = ((PLANS[1], ()), (PLANS[3], DOCUMENTS))


def add_up(tensors):
    """Sum over the processes, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def of_process(rank, world):
    """Train with own process's part of every sequence; the sums travel over gloo."""
    found = []
    for options, documents in PROCESSES:
        layout = SeqLayout.zigzag(TOTAL, world)
        mask = AttnMask.causal(documents)
        plan = make_plan(layout, mask, (HEADS, KV_HEADS), (SIDE, SIDE), **options)
        topology = CPTopology(None, plan.ulysses, plan.window)

        def attend(q, k, v, plan=plan, topology=topology):
            return [context_attention(q[0], k[0], v[0], plan, topology)]

        found.append(train(layout, documents, attend, [rank], add_up))
    return found


def test_20_steps_of_processes(whole):
    for found in run_ranks(of_process, RANKS):
        for (_, documents), got in zip(PROCESSES, found, strict=True):
            equals(got, whole[documents])
