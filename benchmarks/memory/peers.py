"""Ways of others to need less memory, on the plain GPT: each is something to be entered.

Those of Megatron are what its flags do, without Megatron, so that all have the same model:
`selective` is --recompute-granularity selective with --recompute-modules, `block` and `uniform`
are --recompute-method of full recomputation.
"""

import contextlib
from functools import partial

import torch
from gpt import Block
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import Node
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from ms_memory import Session, recompute

aten = torch.ops.aten
MATMULS = [aten.mm.default, aten.addmm.default, aten.bmm.default]
ATTENTION = [aten._scaled_dot_product_flash_attention_for_cpu.default]


@contextlib.contextmanager
def forwards(modules, make):
    """Within, the forward of some modules is what `make` returns for it."""
    for module in modules:
        module.forward = make(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def again(original, context=None):
    """Compute a module again in backward; there are no random numbers to replay."""
    options = {} if context is None else {"context_fn": context}
    return partial(checkpoint, original, use_reentrant=False, preserve_rng_state=False, **options)


def nothing(model):
    return contextlib.nullcontext()


def block(count):
    """Recompute each of the first layers."""
    return lambda model: forwards(model.blocks[:count], again)


def uniform(size):
    """Recompute all layers, so many at once."""

    @contextlib.contextmanager
    def enter(model):
        blocks = list(model.blocks)
        plain = [b.forward for b in blocks]

        def run(x, first):
            for forward in plain[first : first + size]:
                x = forward(x)
            return x

        def make(place):
            return again(partial(run, first=place)) if place % size == 0 else lambda x: x

        for place, module in enumerate(blocks):
            module.forward = make(place)
        try:
            yield
        finally:
            for module in blocks:
                del module.forward

    return enter


def selective(*parts):
    """Recompute parts of all layers: "core_attn", "mlp"; discard outputs of "layernorm"."""

    @contextlib.contextmanager
    def enter(model):
        modules = []
        modules += [b.attention.core for b in model.blocks] if "core_attn" in parts else []
        modules += [b.mlp for b in model.blocks] if "mlp" in parts else []
        with contextlib.ExitStack() as stack:
            stack.enter_context(forwards(modules, again))
            if "layernorm" in parts:
                recompute.norms(stack.enter_context(Session(model)))
            yield

    return enter


def every_second_matmul():
    """As torchtitan's default: keep attention, and the first of every two products of matrices."""
    counts = {True: 0, False: 0}

    def policy(ctx, op, *args, **kwargs):
        counts[ctx.is_recompute] += op in MATMULS
        keep = op in ATTENTION or (op in MATMULS and counts[ctx.is_recompute] % 2 == 1)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


POLICIES = {
    "keep matmuls, attention": lambda: [*MATMULS, *ATTENTION],
    "keep matmuls": lambda: MATMULS,
    "keep every second matmul, attention": every_second_matmul,
}


def sac(policy, count):
    """Selective checkpoints of torch on the first layers."""

    def context():
        return create_selective_checkpoint_contexts(POLICIES[policy]())

    return lambda model: forwards(model.blocks[:count], partial(again, context=context))


class Compiled:
    """Layers compiled under a budget: one graph that all layers share, as in torchtitan.

    A graph of the whole model returns the gradients of all parameters at once, and so needs more
    bytes for them than activations ever take.

    Args:
        fraction: torch's `activation_memory_budget`.
        solver: torch's `activation_memory_budget_solver`.
        backend: "inductor", or "eager" that runs the graphs operator by operator.

    Attributes:
        flops: of the two graphs of one layer.
    """

    def __init__(self, fraction, solver, backend="inductor"):
        self.flops = 0
        self._options = {
            "activation_memory_budget": fraction,
            "activation_memory_budget_solver": solver,
            "enable_autograd_cache": False,  # else what was compiled before is not counted
        }
        self._backend = {"inductor": self._inductor, "eager": self._eager}[backend]
        self._layer = torch.compile(layer, backend=self._backend, fullgraph=True, dynamic=False)

    def __call__(self, model):
        return forwards(model.blocks, lambda original: partial(self._run, original.__self__))

    def _run(self, module, x):
        with functorch_config.patch(self._options):
            return self._layer(module, x)

    def _inductor(self, graph, inputs):
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def compile_part(part, given, **options):
            self.flops += graph_flops(part)
            return compile_fx_inner(part, given, **options)

        return compile_fx(graph, inputs, inner_compile=compile_part)

    def _eager(self, graph, inputs):
        def compile_part(part, given):
            self.flops += graph_flops(part)
            return boxed_nop(part, given)

        partition = min_cut_rematerialization_partition
        make = aot_autograd(
            fw_compiler=compile_part, bw_compiler=compile_part, partition_fn=partition
        )
        return make(graph, inputs)


def layer(module, x):
    """Run a layer as its class says, whatever the module's own forward is."""
    return Block.forward(module, x)


def graph_flops(graph):
    """FLOPs of a traced graph, by torch's formulas."""
    total = 0
    for node in graph.graph.nodes:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if formula is not None:
            args, kwargs = tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
            total += formula(*args, **kwargs, out_val=node.meta["val"])
    return total
