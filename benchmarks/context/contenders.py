"""Context parallelism of others, and ours, behind one call: `make(setting) -> (layout, call)`.

`call(q, k, v)` attends on this rank's tokens, [1, s, H, D], which `layout` says. A contender that
cannot run here raises, and the text of that is reported. What ours send is in `call.ledger`: what
an operator of torch does inside is hidden from a meter.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import attend

from ms_parallel.context import (
    AttnMask,
    CPTopology,
    SeqLayout,
    context_attention,
    plan_attention,
)
from ms_parallel.context.digest import plan_key
from ms_parallel.context.operator import Settings, backward_of, forward_of
from ms_parallel.context.trace import Ledger
from ms_parallel.context.transport import run

STAND_IN = str(Path(__file__).parent / "stand_in")


@dataclass(frozen=True)
class Setting:
    """Who attends to what: ranks, tokens, heads, channels, ends of documents or ()."""

    size: int
    total: int
    heads: tuple
    dims: int
    documents: tuple = ()

    @property
    def mask(self):
        return AttnMask.causal(self.documents)

    @property
    def zigzag(self):
        if self.documents:
            return SeqLayout.zigzag_docs(self.documents, self.size)
        return SeqLayout.zigzag(self.total, self.size)

    @property
    def contiguous(self):
        return SeqLayout.contiguous(self.total, self.size)

    def plan(self, **options):
        dims = (self.dims, self.dims)
        return plan_attention(self.zigzag, self.mask, heads=self.heads, head_dims=dims, **options)


def ours(**options):
    def make(setting):
        plan = setting.plan(**options)
        topology = CPTopology(ulysses=plan.ulysses, window=plan.window)

        def call(q, k, v):
            return context_attention(q, k, v, plan, topology)

        call.ledger = topology.ledger
        return setting.zigzag, call

    return make


class Mute:
    """Groups that move nothing: every message and collective is done at once, its result 0.01."""

    def __init__(self):
        self.ledger = Ledger()

    def wait(self):
        return None

    def post(self, messages):
        for message in messages:
            if not message.sends:
                message.tensor.fill_(0.01)
        return {message.index: self for message in messages}

    def all_to_all(self, over, out, flat, received, sent):
        out.fill_(0.01)
        return self

    def all_gather(self, out, flat):
        out.fill_(0.01)
        return self

    def reduce_scatter(self, out, flat):
        out.fill_(0.01)
        return self


def compute_only(setting):
    """A step of this rank's blocks in our ring, by our executor, without communication."""
    plan = setting.plan()
    plan_key(plan)
    settings = Settings(setting.dims**-0.5, False, 0.0, 0, "bshd", False)
    rank, mute = dist.get_rank(), Mute()

    def whole(q, k, v, dout):
        job = settings.job(plan, rank, q)
        with torch.no_grad():
            out, _, state = run(forward_of(job, mute, (q, k, v), None, settings))
            return run(backward_of(job, mute, dout, out, (q, k, v), state, None, "bshd"))

    return whole


def deepspeed(setting):
    import deepspeed as package
    from deepspeed.sequence.layer import DistributedAttention

    package.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    module = DistributedAttention(
        lambda q, k, v: attend(q, k, v, setting.documents), dist.group.WORLD, 2, 1
    )
    return setting.contiguous, lambda q, k, v: module(q, k, v, 0)


@contextlib.contextmanager
def flash_attention():
    """Offer the stand-in where FlashAttention is not installed."""
    sys.path.append(STAND_IN)
    try:
        yield
    finally:
        sys.path.remove(STAND_IN)


def yunchang_ulysses(setting):
    if setting.documents:
        raise NotImplementedError("UlyssesAttention takes no documents")
    with flash_attention():
        from yunchang import UlyssesAttention
        from yunchang.kernels import AttnType
    module = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.FA)
    return setting.contiguous, lambda q, k, v: module(q, k, v, causal=True)


def yunchang_ring(setting):
    if setting.documents:
        # Tried: it has sent before it fails, and what is under way spoils the next contender.
        text = "its packed ring calls flash_attn < 2.6.3: unexpected keyword argument 'window_size'"
        raise NotImplementedError(text)
    with flash_attention():
        from yunchang import LongContextAttention, set_seq_parallel_pg
        from yunchang.kernels import AttnType
    set_seq_parallel_pg(1, setting.size, dist.get_rank(), setting.size)
    module = LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.FA)
    return setting.zigzag, lambda q, k, v: module(q, k, v, causal=True)


def ring_flash_attn(setting):
    if setting.documents:
        return _packed_ring(setting)
    with flash_attention():
        from ring_flash_attn import zigzag_ring_flash_attn_func as function
    return setting.zigzag, lambda q, k, v: function(q, k, v, causal=True)


def _packed_ring(setting):
    """The zigzag ring of every document, which must be a multiple of 2P."""
    with flash_attention():
        from ring_flash_attn import zigzag_ring_flash_attn_varlen_func as function
    ends = torch.tensor(setting.documents, dtype=torch.int32) // setting.size
    longest = int(ends.diff().max())

    def call(q, k, v):
        return function(q[0], k[0], v[0], ends, longest, causal=True)[None]

    return setting.zigzag, call


def torch_context_parallel(setting):
    if setting.documents:
        raise NotImplementedError("context_parallel of torch takes no documents")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (setting.size,))
    group = setting.heads[0] // setting.heads[1]

    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        position = torch.zeros(setting.total)
        with context_parallel(mesh, buffers=[position], buffer_seq_dims=[0]):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2)

    return setting.zigzag, call


OURS = {
    "ring": ours(),
    "ring, pruned": ours(pruned=True),
    "ulysses": ours(algorithm="ulysses"),
    "allgather_kv": ours(algorithm="allgather_kv"),
}
PEERS = {
    "DeepSpeed DistributedAttention": deepspeed,
    "yunchang UlyssesAttention": yunchang_ulysses,
    "yunchang zigzag ring": yunchang_ring,
    "ring-flash-attention zigzag": ring_flash_attn,
    "torch context_parallel": torch_context_parallel,
}
