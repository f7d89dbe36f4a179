"""Which layers of a chunk are computed again in part, and how it gets into them.

Imports torch and ms_memory; Megatron is what it is given.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed.features.memory.settings import MemorySettings
from mindspeed.features.memory.swap.install import recomputed_mlps
from ms_memory import Discard, Session
from ms_memory.errors import refuse
from ms_memory.recompute import layer_action, norms

FEATURE = "recompute.activation"
_MARK = "_ms_memory_activation"
_NORMS = ("input_layernorm", "pre_mlp_layernorm")


def install(session: Session, block: Any, settings: MemorySettings) -> None:
    """Discard outputs of activation functions and norms in the layers that have them discarded.

    Args:
        session: of the chunk.
        block: a `TransformerBlock` of the chunk.
        settings: what is asked for.

    Raises:
        MemoryFeatureError: E-M22, no layer has a norm of its own; E-M10 and E-M05, another feature
            acts on the same modules, or they cannot be acted on.
    """
    if settings.activation:
        # Where --swap-attention recomputes an MLP, its activation is dropped with it.
        whole = recomputed_mlps(block, settings)
        for layer in _layers(block, settings.activation_layers, settings.per_rank, whole):
            _discard_activations(session, layer.mlp)
    if settings.norm:
        _discard_norms(session, block, _layers(block, settings.norm_layers, settings.per_rank))
    if settings.per_rank and _recomputes_whole_layers(block):
        _count_per_rank(session, block)


def _layers(block: Any, part: int | None, per_rank: bool, whole: Sequence[Any] = ()) -> list[Any]:
    """Return the layers of a chunk, but those in `whole`, of which a part is computed again."""
    chunks, chunk = _stages(block)
    full = block.config.recompute_num_layers if _recomputes_whole_layers(block) else 0
    layers = [layer for layer in block.layers if layer not in whole]
    actions = (
        layer_action(
            index, chunk_layers=len(layers), full=full, part=part,
            chunks=chunks, chunk=chunk, per_rank=per_rank,
        )
        for index in range(len(layers))
    )  # fmt: skip
    return [layer for layer, action in zip(layers, actions, strict=True) if action == "part"]


def _stages(block: Any) -> tuple[int, int]:
    """Return how many chunks this rank has, and which of them the block is in."""
    return block.config.virtual_pipeline_model_parallel_size or 1, block.vp_stage or 0


def _recomputes_whole_layers(block: Any) -> bool:
    config = block.config
    return bool(config.recompute_granularity == "full" and config.recompute_method == "block")


def _count_per_rank(session: Session, block: Any) -> None:
    """Let Megatron compute as many whole layers of this chunk again as the rank's number means."""
    chunks, chunk = _stages(block)
    before = block.config
    mine = copy.copy(before)
    # Layer i of this chunk comes i * chunks + chunk in the rank.
    mine.recompute_num_layers = max(0, -(-(before.recompute_num_layers - chunk) // chunks))
    block.config = mine
    session.on_close(functools.partial(setattr, block, "config", before))


def _discard_norms(session: Session, block: Any, layers: list[Any]) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    found = [
        norm
        for layer in layers
        for norm in (getattr(layer, name, None) for name in _NORMS)
        if norm is not None and not isinstance(norm, IdentityOp)
    ]
    if layers and not found:
        where = f"norms of the layers in {session.path(block)!r}: they are part of linear layers"
        refuse("E-M22", where, "give --transformer-impl local, or leave --recompute-norm out")
    if found:
        norms(session, lambda _, module: module in found)


def _discard_activations(session: Session, mlp: nn.Module) -> None:
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.experts import GroupedMLP, TEGroupedMLP

    found = 0
    for module in mlp.modules():
        if isinstance(module, TEGroupedMLP):
            where = "--recompute-activation-function with TransformerEngine's grouped experts"
            remedy = "give --recompute-granularity selective --recompute-modules moe_act instead"
            refuse("E-M05", where, remedy)
        if isinstance(module, GroupedMLP):
            session.claim(module, FEATURE, "experts")
            session.wrap(module, functools.partial(_grouped_forward, session, module))
        elif isinstance(module, MLP):
            session.claim(module, FEATURE)
            module.__dict__[_MARK] = weakref.ref(session)
            session.on_close(functools.partial(module.__dict__.pop, _MARK, None))
        else:
            continue
        found += 1
    if not found and not isinstance(mlp, IdentityOp):
        where = f"activation function in {session.path(mlp)!r}, a {type(mlp).__name__}"
        remedy = "give --transformer-impl local, or leave --recompute-activation-function out"
        refuse("E-M22", where, remedy)


def wrap_mlp(original: Callable[..., Any]) -> Callable[..., Any]:
    """Discard what lies between the two linear layers, in the modules that are marked."""

    @functools.wraps(original)
    def forward(
        self: Any, hidden_states: Tensor, per_token_scale: Tensor | None = None, **options: Any
    ) -> Any:
        mark = self.__dict__.get(_MARK)
        session = None if mark is None else mark()
        if session is None or not torch.is_grad_enabled():
            return original(self, hidden_states, per_token_scale, **options)
        return _discarding(session, original, self, hidden_states, per_token_scale)

    return forward


def _discarding(
    session: Session,
    original: Callable[..., Any],
    mlp: Any,
    hidden_states: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    x, bias = mlp.linear_fc1(hidden_states)
    discard = Discard(sources=session.sources)
    act = functools.partial(_activation, original, mlp)
    out, out_bias = mlp.linear_fc2(discard(act, x, bias, scale))
    discard.release(until=out)
    if scale is None or out_bias is None:
        return out, out_bias
    # The bias of an expert has the weight of its token; it is not handed on.
    return out + out_bias.unsqueeze(0) * scale.unsqueeze(-1), None


def _activation(
    original: Callable[..., Any], mlp: Any, x: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Run what Megatron does between the linear layers of an MLP, and nothing else of it."""
    y: Tensor = original(_Between(mlp, x, bias), x, scale)[0]
    return y


class _Between:
    """Stands for an MLP whose first linear layer has run, and whose second does nothing.

    Args:
        mlp: has everything else.
        x: what the first layer returned.
        bias: which is to be added to it.
    """

    def __init__(self, mlp: Any, x: Tensor, bias: Tensor | None) -> None:
        self._mlp = mlp
        self._given = x, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mlp, name)

    def linear_fc1(self, _: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what is known."""
        return self._given

    def linear_fc2(self, y: Tensor) -> tuple[Tensor, None]:
        """Return what it is given."""
        return y, None


def _grouped_forward(
    session: Session, experts: Any, original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(*args: Any, **options: Any) -> Any:
        discard = Discard(sources=session.sources)
        act = experts.activation_func_with_probs
        experts.activation_func_with_probs = functools.partial(discard, act)
        try:
            out, bias = original(*args, **options)
        finally:
            experts.activation_func_with_probs = act
        discard.release(until=out)
        return out, bias

    return forward
