"""Saved tensors of which each rank keeps a part: bytes and gradients, here and on the host."""

import torch
import torch.distributed as dist

from ms_memory import codec
from ms_memory.session import Session
from support.mutation import Mutation
from support.ranks import run_ranks
from support.swapping import HIDDEN, TOKENS, build, grads, loss_of, same, swapped, tokens


class Parts:
    """Writes down what a chain kept of each storage."""

    def __init__(self, inner):
        self.inner, self.kept = inner, []

    def encode(self, holder, tensor):
        part = self.inner.encode(holder, tensor)
        self.kept.append((holder.nbytes, holder.nbytes if part is None else part.nbytes))
        return part

    def decode(self, holder, tensor):
        return self.inner.decode(holder, tensor)


WRONG = Mutation(
    "every rank keeps the first part",
    "ms_memory.codec:ShardAcross.encode",
    "content[self._rank * length : (self._rank + 1) * length]",
    "content[:length]",
)


def step(model, retain_graph=False):
    loss = loss_of(model(tokens()[:5]))
    if retain_graph:
        loss.backward(retain_graph=True)
    loss.backward()
    return grads(model)


def shard(rank, size):
    model = build(layers=1)
    wanted, twice = step(model), step(model, retain_graph=True)
    group = dist.group.WORLD
    parts = Parts(codec.ShardAcross(group, min_bytes=100))
    with Session(model) as session:
        session.chain.code(parts)
        assert same(step(model), wanted)
        assert same(step(model, retain_graph=True), twice)
        with WRONG.applied():
            assert not same(step(model), wanted)
    assert all(kept == (-(-n // size) if n >= 100 else n) for n, kept in parts.kept)
    assert any(n >= 100 and n % size for n, _ in parts.kept)
    with swapped(model, codec=codec.ShardAcross(group)) as session:
        assert same(step(model), wanted)
        assert session.host.ledger.nbytes == 0
        parted = session.host.ledger.total
    with swapped(model) as session:
        assert same(step(model), wanted)
        assert parted < session.host.ledger.total / size + 20
    alone = codec.ShardAcross([dist.new_group([r]) for r in range(size)][rank])
    assert alone.encode(None, torch.ones(TOKENS * HIDDEN)) is None
    return [kept for _, kept in parts.kept]


def test_partition_gloo():
    found = run_ranks(shard, 3)
    assert all(kept == found[0] for kept in found)


def test_identity():
    model = build(layers=1)
    wanted = step(model)
    with swapped(model, codec=codec.Identity()) as session:
        assert same(step(model), wanted)
        assert session.host.ledger.total > 0
