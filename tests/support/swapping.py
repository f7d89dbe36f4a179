"""A small transformer whose saved tensors are swapped on the simulated device."""

import torch
from torch import nn
from torch.nn import functional as F

from ms_memory import device, swap
from ms_memory.session import Session

TOKENS, HIDDEN = 6, 8


class Work(torch.autograd.Function):
    """Takes time on a virtual clock, twice as much in backward."""

    @staticmethod
    def forward(ctx, x, clock, ns):
        ctx.clock, ctx.ns = clock, ns
        clock.advance(ns)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.advance(2 * ctx.ns)
        return grad, None, None


class Block(nn.Module):
    """Attention with one fused projection, whose q, k and v are views, and a feed-forward layer."""

    def __init__(self, heads=2, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x):
        shape = x.shape[0], self.heads, -1
        q, k, v = (t.view(shape).transpose(0, 1) for t in self.qkv(self.norm(x)).chunk(3, -1))
        weights = F.dropout(torch.softmax(q @ k.transpose(1, 2), -1), self.dropout)
        x = x + self.out((weights @ v).transpose(0, 1).reshape(x.shape))
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Blocks between an embedding and a head of the same weight."""

    def __init__(self, layers=4, dropout=0.0):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(11, HIDDEN))
        self.layers = nn.ModuleList(Block(dropout=dropout) for _ in range(layers))

    def forward(self, tokens):
        x = self.embed[tokens]
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.embed)


def tokens(seed=0):
    return torch.randint(0, 11, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def build(layers=4, dropout=0.0, seed=5):
    torch.manual_seed(seed)
    return Model(layers, dropout)


def grads(model):
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def same(mine, other):
    pairs = zip(mine, other, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def loss_of(logits, seed=0):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return (logits * weight).sum()


def swapped(model, schedule="late", plan=("layers.*",), clock=None, sim=None, host=None, **options):
    """Return a session whose storages move, and its device."""
    sim = device.sim(schedule=schedule, clock=clock) if sim is None else sim
    session = Session(model, device=sim, host_bytes=host)
    swap.modules(session, plan, **{"min_bytes": 0, "layers": None, **options})
    return session
