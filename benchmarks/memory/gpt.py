"""The model of the memory benchmarks: a plain GPT, and a step whose gradients have a fixed home."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """Of a GPT with tied embeddings; the default has 50.3 million parameters."""

    layers: int = 12
    hidden: int = 576
    heads: int = 9
    vocabulary: int = 4096
    sequence: int = 128
    batch: int = 1

    @property
    def tokens(self):
        return self.sequence * self.batch


class Core(nn.Module):
    """Scaled dot products, causal."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden)
        self.core = Core()
        self.out = nn.Linear(size.hidden, size.hidden)

    def forward(self, x):
        shape = *x.shape[:2], self.heads, -1
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(self.core(q, k, v).transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up = nn.Linear(size.hidden, 4 * size.hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * size.hidden, size.hidden)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.hidden), nn.LayerNorm(size.hidden)
        self.attention, self.mlp = Attention(size), MLP(size)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens [b, s] and the next ones in, the mean loss out."""

    def __init__(self, size):
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.position = nn.Parameter(torch.randn(size.sequence, size.hidden) * 0.02)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Step:
    """Forward and backward; gradients are added to buffers that live on, as Megatron's are.

    So the bytes of a step are activations and what kernels need, whoever runs it.
    """

    def __init__(self, size, seed=1):
        torch.manual_seed(seed)
        self.model = GPT(size)
        self.data = [torch.randint(size.vocabulary, (size.batch, size.sequence)) for _ in range(2)]
        self.gradients = [torch.zeros_like(p) for p in self.model.parameters()]
        self.nbytes = sum(p.nbytes for p in self.model.parameters())
        self.attach()

    def attach(self):
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient

    def __call__(self):
        self.attach()
        loss = self.model(*self.data)
        loss.backward()
        return loss.detach()

    def results(self):
        """Loss and gradients of one step, from zero."""
        for gradient in self.gradients:
            gradient.zero_()
        return [self(), *(gradient.clone() for gradient in self.gradients)]
