"""What the swapping flags do to one transformer block, in the session of its chunk."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mindspeed.features.memory.session import open_sessions
from mindspeed.features.memory.settings import MemorySettings
from mindspeed.features.memory.swap.layers import first_layers, swapped_layers
from mindspeed.features.ops.rope_function import tables_of
from ms_memory import Session
from ms_memory.errors import refuse
from ms_memory.stages import Holder
from ms_memory.swap import HostPool, inside, install
from ms_memory.swap.prefetch import Choice


def attention(session: Session, block: Any, settings: MemorySettings) -> None:
    """Swap the named parts of layers, and let Megatron recompute the MLPs of the first ones.

    All that a layer saves in these parts travels as one group, so that `swap_depth` counts layers.

    Args:
        session: of the chunk.
        block: a transformer block of it.
        settings: what the flags ask for.

    Raises:
        MemoryFeatureError: E-M10, another feature moves saved tensors; in the first forward E-M22,
            all of them are smaller than `swap_min_bytes`; in any E-M32, `swap_host_bytes` are out.
    """
    if not settings.swap_parts:
        return
    _refuse_other_owners(block)
    _share_host(session, settings)
    layers, place = _attending(block)
    names: list[str] = []
    for i in swapped_layers(settings.swap_layers, len(layers), last=block.post_process, **place):
        path = session.path(layers[i])
        session.claim(layers[i], "swap", ", ".join(settings.swap_parts))
        names += [f"{path}.{part}" for part in settings.swap_parts]
    for layer in recomputed_mlps(block, settings):
        _recompute_mlp(session, layer)
    if names:
        choose = inside(names, exclude=_kept_by_others(session, block))

        def layer_of(holder: Holder, tensor: Tensor) -> str | None:
            name = choose(holder, tensor)
            return name and name.rpartition(".")[0]

        large = _Large(session, block, layer_of, settings.swap_min_bytes)
        install(session, names, large, depth=settings.swap_depth)


def inputs(session: Session, block: Any, settings: MemorySettings) -> None:
    """Swap what Megatron's full recomputation keeps: the inputs of its regions.

    The region that holds the model's last layer keeps its input: its backward follows at once. So
    does the first region of a chunk whose input another rank sent, which the schedule holds anyway.

    Args:
        session: of the chunk.
        block: a transformer block of it.
        settings: what the flags ask for.

    Raises:
        MemoryFeatureError: as `attention` does.
    """
    if not settings.swap_inputs or not len(block.layers):
        return
    _refuse_other_owners(block)
    _share_host(session, settings)
    path, kept = session.path(block), _kept_by_others(session, block)
    session.claim(block, "swap", "inputs of recomputed layers")
    ended = _Ended()
    if block.post_process:
        session.on_close(block.register_forward_pre_hook(ended.begin).remove)
        session.on_close(block.layers[-1].register_forward_hook(ended.end).remove)

    def choose(holder: Holder, tensor: Tensor) -> str | None:
        # Inside a region nothing is saved, so that what the block itself saves are the inputs.
        site = holder.site
        if site.module != path or ended.over or kept(tensor):
            return None
        return f"{path} {site.index}"

    large = _Large(session, block, choose, settings.swap_min_bytes)
    install(session, [path], large, depth=settings.swap_depth)


def recomputed_mlps(block: Any, settings: MemorySettings) -> list[Any]:
    """Return the layers of a block whose MLP is recomputed beside swapped attention.

    Args:
        block: a transformer block.
        settings: what the flags ask for.
    """
    layers, place = _attending(block)
    return [layers[i] for i in first_layers(settings.mlp_layers, len(layers), **place)]


def _refuse_other_owners(block: Any) -> None:
    """Refuse Megatron's own offloading, also where a configuration came without flags."""
    for name in ("cpu_offloading", "fine_grained_activation_offloading"):
        if getattr(block.config, name, False):
            refuse("E-M10", f"swapping and {name} of the configuration", "leave one of them out")


def _share_host(session: Session, settings: MemorySettings) -> None:
    """Let the chunks of a process, which share their device, share memory on the host as well."""
    others = [other for other in open_sessions() if other.device is session.device]
    pools = [other.host for other in others if "host" in vars(other)]
    session.host = pools[0] if pools else HostPool(session.device, settings.swap_host_bytes)


class _Large:
    """A choice among the tensors that are large enough, of which there must be one.

    Args:
        session: of the chunk.
        block: in whose first forward that is checked.
        choose: names the group of a tensor of any size.
        min_bytes: smaller ones stay.
    """

    def __init__(self, session: Session, block: Any, choose: Choice, min_bytes: int) -> None:
        self._choose = choose
        self._min_bytes = min_bytes
        self._largest: int | None = 0  # bytes; None once it has been looked at
        self._first = block.register_forward_hook(self._check)
        session.on_close(self._first.remove)

    def __call__(self, holder: Holder, tensor: Tensor) -> str | None:
        """Return the group of a tensor; None: it stays."""
        small = holder.nbytes < self._min_bytes
        if small and self._largest is None:
            return None
        name = self._choose(holder, tensor)
        if name is not None and self._largest is not None:
            self._largest = max(self._largest, holder.nbytes)
        return None if small else name

    def _check(self, module: Any, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self._first.remove()
        largest, self._largest = self._largest, None
        if largest and largest < self._min_bytes:
            where = f"the largest tensor that could be swapped has {largest} bytes"
            refuse("E-M22", where, f"give a --swap-min-bytes below {self._min_bytes}")


class _Ended:
    """Whether the last layer of a block has run; a region saves its input after that."""

    def __init__(self) -> None:
        self.over = False

    def begin(self, module: Any, args: Any) -> None:
        self.over = False

    def end(self, module: Any, args: Any, output: Any) -> None:
        # A second run in backward is none of a new forward.
        self.over = torch._C._current_graph_task_id() == -1


def _kept_by_others(session: Session, block: Any) -> Callable[[Tensor], bool]:
    """Return what tells tensors that stay alive whether or not they are swapped.

    Those are what all layers share (angles of rotary embeddings with their cosines and sines,
    masks), and what the schedule received.
    """
    shared: list[Tensor] = []

    def begin(module: Any, args: Any, options: dict[str, Any]) -> None:
        rest = [value for name, value in options.items() if name != "hidden_states"]
        leaves = tree_leaves((args[1:], rest, module.input_tensor))
        shared[:] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def end(module: Any, args: Any, output: Any) -> None:
        shared.clear()

    session.on_close(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
    session.on_close(block.register_forward_hook(end, always_call=True).remove)

    def kept(tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        # The first layer of the first step makes the cosines.
        every = itertools.chain(shared, *map(tables_of, shared))
        return any(other.untyped_storage() is storage for other in every)

    return kept


def _recompute_mlp(session: Session, layer: Any) -> None:
    """Let Megatron compute the MLP or the experts of a layer again, until the session closes.

    Its own checkpoint runs the first time without gradients, so that the counts of routers stay
    those of one run.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    experts = isinstance(layer.mlp, MoELayer)
    before = layer.mlp.moe_layer_recompute if experts else layer.recompute_mlp

    def switch(on: bool) -> None:
        if experts:
            layer.mlp.moe_layer_recompute = on
        else:
            layer.recompute_mlp = on

    session.claim(layer.mlp, "recompute", "by Megatron", region=True)
    session.on_close(functools.partial(switch, before))
    switch(True)


def _attending(block: Any) -> tuple[list[Any], dict[str, int]]:
    """Return the layers that do something, and which chunk of how many the block is."""
    from megatron.core.transformer.identity_op import IdentityOp

    none = IdentityOp()
    layers = [
        layer
        for layer in block.layers
        if not isinstance(getattr(layer, "self_attention", none), IdentityOp)
    ]
    chunks = block.config.virtual_pipeline_model_parallel_size or 1
    return layers, {"chunks": chunks, "chunk": block.vp_stage or 0}
