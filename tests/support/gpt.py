"""A small transformer on plain torch with the variants that memory features meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes and variants."""

    layers: int = 3
    width: int = 8
    hidden: int = 20
    heads: int = 4
    groups: int = 4
    vocab: int = 11
    dropout: float = 0.0
    gated: bool = False
    parallel: bool = False
    tied: bool = False
    norm: type[nn.Module] = nn.LayerNorm


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.groups = shape.heads, shape.groups
        size = shape.width // shape.heads
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.groups) * size, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.dropout = shape.dropout

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        size = width // self.heads
        every = self.qkv(x).view(b, s, -1, size).transpose(1, 2)
        q, k, v = every.split([self.heads, self.groups, self.groups], dim=1)
        times = self.heads // self.groups
        k, v = (t.repeat_interleave(times, dim=1) for t in (k, v))
        mask = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * size**-0.5).masked_fill(mask, -1e4)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).reshape(b, s, width))


class PlainMLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attn = Attention(shape)
        self.mlp = GatedMLP(shape) if shape.gated else PlainMLP(shape)
        self.ln1 = shape.norm(shape.width)
        self.ln2 = nn.Identity() if shape.parallel else shape.norm(shape.width)
        self.drop = nn.Dropout(shape.dropout)
        self.parallel = shape.parallel

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        if self.parallel:
            return x + self.drop(self.attn(y)) + self.drop(self.mlp(self.ln2(y)))
        x = x + self.drop(self.attn(y))
        return x + self.drop(self.mlp(self.ln2(x)))


class GPT(nn.Module):
    """Tokens [B, S] -> logits [B, S, vocab]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = shape.norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def gpt(shape: Shape, seed: int = 0) -> GPT:
    """Return the model with the weights of a seed."""
    torch.manual_seed(seed)
    return GPT(shape)


def tokens(shape: Shape, batch: int = 2, length: int = 5, seed: int = 1) -> Tensor:
    """Return random tokens [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab, (batch, length), generator=generator)
