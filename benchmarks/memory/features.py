"""Bytes that each feature frees, counted, against its formula: equal, or the benchmark fails.

    python -m benchmarks memory/features

The layers of a GPT in bf16. What is on the device is counted by the census of storages when a
forward has ended, what went to the host by the host's ledger. Letters as in the documentation:
w bytes an element, s tokens, b batch, h hidden, f = 4 h, a heads, L layers, t ranks of a group.
"""

import argparse
import json
from dataclasses import dataclass

import meter
import torch
import torch.distributed as dist
from gpt import Size, Step
from torch import nn

from ms_memory import PackedAdamW, Session, StorageCensus, Streamed, device, recompute, swap
from ms_memory.codec import ShardAcross

SIZE = Size(layers=4, hidden=576, heads=9, vocabulary=512, sequence=128, batch=2)
RANKS = 8


@dataclass(frozen=True)
class Row:
    """A feature, what it frees by formula, and by measurement."""

    feature: str
    formula: str
    expected: int
    measured: int

    def as_dict(self):
        assert self.expected == self.measured, self
        return {"feature": self.feature, "formula": self.formula, "bytes": self.measured}


class Formulas:
    """Bytes of the parts of all layers."""

    def __init__(self, size):
        self.w, self.layers = 2, size.layers
        self.element = size.layers * self.w * size.tokens  # w L sb
        self.wide, self.inner = self.element * size.hidden, self.element * 4 * size.hidden
        # On the CPU the statistics of a norm are in its own dtype; attention's are in fp32.
        self.statistics = 2 * self.element
        self.sums = 4 * size.layers * size.tokens * size.heads

    @property
    def whole(self):
        norms = 2 * (2 * self.wide + self.statistics)
        return norms + 3 * self.wide + self.wide + self.sums + 2 * self.inner


class Gated(nn.Module):
    """As Llama's, in eager torch."""

    def __init__(self, size):
        super().__init__()
        for name in ("gate_proj", "up_proj"):
            self.add_module(name, nn.Linear(size.hidden, 4 * size.hidden, bias=False))
        self.down_proj = nn.Linear(4 * size.hidden, size.hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def model_of(size, gated=False):
    model = Step(size).model.bfloat16()
    for block in model.blocks if gated else ():
        block.mlp = Gated(size).bfloat16()
    return model


def inputs(size):
    return [torch.zeros(size.batch, size.sequence, dtype=torch.long) for _ in range(2)]


def kept(size, install=None, gated=False):
    """Bytes alive when a forward has ended, and those on the host."""
    model = model_of(size, gated)
    with Session(model, device=device.sim() if install else "auto") as session:
        if install is not None:
            install(session)
        with StorageCensus() as census:
            loss = model(*inputs(size))
            alive = census.sweep()
        away = session.host.ledger.nbytes if install else 0
        assert loss.requires_grad
        return alive, away


def freed(size, install, gated=False):
    """Bytes that a feature frees on the device."""
    alive, away = kept(size, install, gated)
    # The simulated device's host is the processor's memory too; whole buffers of the pool count.
    return kept(size, gated=gated)[0] - alive, away


def saved_by_layers(size):
    model = model_of(size)
    with Session(model) as session:
        ledger = session.ledger
        loss = model(*inputs(size))
        assert loss.requires_grad
        return sum(n for path, n in ledger.by_module().items() if path.startswith("blocks."))


def activations(size):
    """Rows of what is computed again."""
    f = Formulas(size)

    def row(feature, formula, expected, install, gated=False):
        return Row(feature, formula, expected, freed(size, install, gated)[0])

    yield Row(
        "nothing: saved by the layers", "L (w sb (8h + 2f) + 8 sb + 4 sba)", f.whole,
        saved_by_layers(size),
    )  # fmt: skip
    yield row("activation", "L w sbf", f.inner, recompute.activation)
    yield row(
        "activation, gated MLP in eager torch", "2 L w sbf", 2 * f.inner,
        recompute.activation, gated=True,
    )  # fmt: skip
    norms = 2 * (f.wide + f.statistics)
    yield row("norms", "L (2 w sbh + 8 sb)", norms, recompute.norms)

    def both(session):
        recompute.activation(session)
        recompute.norms(session)

    yield row("activation and norms", "the sum of both", f.inner + norms, both)
    yield row(
        "region: every layer", "L (w sb (7h + 2f) + 8 sb + 4 sba)", f.whole - f.wide,
        lambda session: recompute.modules(session, "blocks.?"),
    )  # fmt: skip


def elsewhere(size):
    """Rows of what is on the host, or at other ranks."""
    f = Formulas(size)

    def away(install):
        return freed(size, install)[1]

    attention = f.wide + 3 * f.wide + f.wide + f.sums
    yield Row(
        "swap: attention of every layer", "L (5 w sbh + 4 sba)", attention,
        away(lambda s: swap.modules(s, "*.attention", layers=None, min_bytes=0)),
    )  # fmt: skip
    yield Row(
        "swap: every layer", "L (w sb (8h + 2f) + 8 sb + 4 sba)", f.whole,
        away(lambda s: swap.modules(s, "blocks.?", layers=None, min_bytes=0)),
    )  # fmt: skip
    yield Row(
        "region with inputs on the host", "(L - 1) w sbh", f.wide - f.wide // f.layers,
        away(lambda s: recompute.modules(s, "blocks.?", offload_inputs=True, min_bytes=0)),
    )  # fmt: skip
    yield Row(f"partition across t = {RANKS}", "(1 - 1/t) of what is saved", *partitioned(size))


def partitioned(size):
    """Bytes of storages that passed the codec, less its parts: by formula, and alive."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        codec = ShardAcross(dist.group.WORLD, min_bytes=1024)
        model = model_of(size)
        with Session(model) as session:
            ledger = session.ledger
            loss = model(*inputs(size))
            sizes = [entry.nbytes for entry in ledger.entries if not entry.fixed]
            assert loss.requires_grad
        whole = kept(size)[0]
        alive = kept(size, lambda session: session.chain.code(codec))[0]
    finally:
        dist.destroy_process_group()
    expected = sum(n - -(-n // RANKS) for n in sizes if n >= 1024)
    return expected, whole - alive


def optimizers(size):
    """Rows of optimizer state."""
    model = model_of(size)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    count = sum(p.numel() for p in model.parameters())
    packed = PackedAdamW(model.parameters())
    packed.step()
    yield Row(
        "packed master, by a master in fp32",
        "2 a parameter",
        2 * count,
        12 * count - packed.nbytes(),
    )
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    for master in masters:
        master.grad = torch.zeros_like(master)
    streamed = Streamed(torch.optim.AdamW(masters), groups=4, device=device.sim())
    streamed.step()
    yield Row("streamed state of AdamW", "8 a parameter", 8 * count, streamed.host_nbytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = Size(3, 32, 2, 64, 24, 2) if options.tiny else SIZE
    rows = []
    for part in (activations, elsewhere, optimizers):
        for row in part(size):
            rows.append(row.as_dict())
            print(json.dumps(rows[-1]), flush=True)
    if not options.no_write:
        meter.write("features", {"environment": meter.environment(), "rows": rows})


if __name__ == "__main__":
    main()
