"""Collectives that gloo lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mindspeed.patching.records import Feature, Patch

if TYPE_CHECKING:
    import torch

FEATURE = Feature(
    name="level0.collectives",
    level=0,
    doc="Gathering unequal shards works on gloo (expert parallelism with tensor parallelism).",
    patches=(
        Patch(
            target="megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
            kind="wrap",
            value="mindspeed.features.level0.collectives:wrap_gather",
            when="device == 'cpu'",
            reason="gloo refuses all_gather into tensors of unequal sizes; the call takes no "
            "other gather function.",
        ),
    ),
)


def wrap_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gather unequal shards by padding to the largest; equal ones as before."""

    @functools.wraps(original)
    def _gather_along_first_dim(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Any:
        if output_split_sizes is None or group.size() == 1 or len(set(output_split_sizes)) == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        return gather_unequal(input_, group, output_split_sizes)

    return _gather_along_first_dim


def gather_unequal(input_: torch.Tensor, group: Any, sizes: Sequence[int]) -> torch.Tensor:
    """All-gather shards whose first dimensions differ.

    Args:
        input_: ``[sizes[rank], ...]``.
        group: process group of ``len(sizes)`` ranks.
        sizes: first dimension of every rank's shard.

    Returns:
        ``[sum(sizes), ...]``; ``max(sizes)`` rows a rank travel.
    """
    import torch
    import torch.distributed as dist

    largest, rest = max(sizes), input_.shape[1:]
    padded = input_.new_zeros((largest, *rest))
    padded[: input_.shape[0]] = input_
    everything = input_.new_empty((largest * len(sizes), *rest))
    dist.all_gather_into_tensor(everything, padded, group=group)
    shards = everything.split(largest)
    return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])
