"""Initial weights that depend on a parameter's global name, not on who holds it.

Megatron draws weights in construction order, so a pipeline stage or an expert rank starts the
stream elsewhere than a single process does. Here every parameter is drawn whole from a generator
seeded by its checkpoint key, and each rank keeps its shard: all layouts start equal, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mindspeed.train.model import Chunk

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# The projections that write into the residual stream get the depth-scaled deviation.
_OUTPUT_WEIGHTS = ("linear_proj.weight", "linear_fc2.weight")


def initialize_by_name(chunks: list[Chunk], core: TransformerConfig, seed: int) -> None:
    """Overwrites every weight matrix in place; vectors (norms, biases) keep 1 and 0.

    Args:
        chunks: the unwrapped model chunks of this rank.
        core: Megatron's configuration, whose two initialisation methods are used.
        seed: equal on every rank; the generators of torch are left as they were.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for chunk in chunks:
            for entry in _leaves(chunk.sharded_state_dict()):
                _initialize(entry, core, seed)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(item)
    else:
        yield tree


def _initialize(entry: Any, core: TransformerConfig, seed: int) -> None:
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(entry, ShardedTensor):
        _fill(entry, core, seed)
    elif isinstance(entry, ShardedTensorFactory):
        # A factory may hand out copies of its parts (gate and up halves, single experts), so the
        # filled parts are merged and written back.
        parts = entry.build()
        for part in _leaves(parts):
            _fill(part, core, seed)
        merged = entry.merge_fn(dict_list_map_inplace(lambda part: part.data, parts))
        entry.data.copy_(merged)


def _fill(shard: Any, core: TransformerConfig, seed: int) -> None:
    lead = shard.prepend_axis_num
    shape = shard.global_shape[lead:]
    if len(shape) < 2 or not shard.data.is_floating_point():
        return
    # The leading axes count layers and experts: one draw for each entry, so that two layouts
    # that stack them differently agree.
    name = f"{seed}/{shard.key}/{tuple(shard.global_offset[:lead])}"
    digest = hashlib.sha256(name.encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    scaled = shard.key.endswith(_OUTPUT_WEIGHTS)
    method = core.output_layer_init_method if scaled else core.init_method
    assert method is not None
    whole = torch.empty(shape, dtype=torch.float32)
    method(whole)
    window = tuple(
        slice(start, start + size)
        for start, size in zip(shard.global_offset[lead:], shard.local_shape, strict=True)
    )
    shard.data.copy_(whole[window])
