"""The averages of the weights in the checkpoints of Megatron's distributed optimizer.

Two of its formats (`dp_reshardable`, `fully_sharded_model_space`) hold whatever state the optimizer
has. The gathered ones (`torch`, `fully_reshardable`) name the weights and two moments; here the
averages join them under their own name, with the geometry of the others: for each buffer one flat
fp32 tensor on the host, buckets one after the other without their padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspeed.patching.records import Feature, Patch

if TYPE_CHECKING:
    from torch import Tensor, device

NAME = "ema_params"
_CLASS = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_HERE = "mindspeed.features.level0.averages"

# Of level 0 although level 1 brings the averages: a run that saves and loads nothing never comes
# by here, which is not worth a warning.
FEATURE = Feature(
    name="level0.averages",
    level=0,
    doc="Every checkpoint format of the distributed optimizer holds the averaged weights.",
    when="optimizer_selection == 'fused_ema_adamw'",
    patches=(
        Patch(
            target=f"{_CLASS}.get_parameter_state_dp_zero",
            kind="wrap",
            value=f"{_HERE}:wrap_gather",
            reason="It gathers the weights and two moments by name, and no other state.",
        ),
        Patch(
            target=f"{_CLASS}.load_parameter_state_from_dp_zero",
            kind="wrap",
            value=f"{_HERE}:wrap_scatter",
            reason="It scatters the weights and two moments by name, and no other state.",
        ),
        Patch(
            target=f"{_CLASS}._set_main_param_and_optimizer_states",
            kind="wrap",
            value=f"{_HERE}:wrap_set_states",
            order=1,
            reason="It reads every state by name from what was loaded, which may have no averages.",
        ),
    ),
    page="docs/ops/optim.md",
)


@dataclass(frozen=True)
class Bucket:
    """One bucket of a gradient buffer, as this rank sees it.

    Attributes:
        state: where its buffer's tensors stand in the parameter state: (index, dtype).
        start: first element in the buffer's flat tensor, which has no padding.
        size: elements without padding.
        share: elements of one rank, padding included.
        places: model parameter to its slice of this rank's share.
    """

    state: tuple[int, Any]
    start: int
    size: int
    share: int
    places: dict[Any, slice]


def buckets(optimizer: Any, ranks: int) -> Iterator[Bucket]:
    """Every bucket of a distributed optimizer that `ranks` ranks share, in order."""
    for index, by_dtype in enumerate(optimizer.gbuf_ranges):
        for dtype, ranges in by_dtype.items():
            start = 0
            for made, found in zip(optimizer.buffers[index].buckets, ranges, strict=True):
                local = {p: m["gbuf_local"] for p, m in found["param_map"].items()}
                places = {p: slice(r.start, r.end) for p, r in local.items()}
                share = made.grad_data.numel() // ranks
                yield Bucket((index, dtype), start, made.numel_unpadded, share, places)
                start += made.numel_unpadded


def average_of(optimizer: Any, model_param: Any) -> Tensor:
    """This rank's part of a parameter's average, flat."""
    group, order = optimizer.model_param_group_index_map[model_param]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    average: Tensor = optimizer.optimizer.state[main][NAME]
    return average


def wrap_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add the averages to the gathered parameter state."""

    @functools.wraps(original)
    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        given = dict(
            zip(("use_gloo_comm", "empty_data", "return_on_all_ranks"), args, strict=False)
        )
        _gather(self, state, **{**given, **kwargs})
        return state

    return get_parameter_state_dp_zero


def _gather(
    optimizer: Any,
    state: dict[Any, Any] | None,
    use_gloo_comm: bool = True,
    empty_data: bool = False,
    return_on_all_ranks: bool = False,
) -> None:
    import torch

    group = optimizer.data_parallel_group_gloo if use_gloo_comm else optimizer.data_parallel_group
    receives = return_on_all_ranks or group.rank() == 0
    if receives:
        for index, by_dtype in enumerate(optimizer.gbuf_ranges):
            for dtype in by_dtype:
                tensors = state[index][dtype]  # type: ignore[index]
                tensors[NAME] = torch.zeros_like(tensors["param"])
    if empty_data:
        return
    for bucket in buckets(optimizer, group.size()):
        mine = torch.zeros(bucket.share, device="cpu" if use_gloo_comm else _device(optimizer))
        for parameter, place in bucket.places.items():
            mine[place] = average_of(optimizer, parameter)
        parts = _collect(mine, group, return_on_all_ranks, receives)
        if receives:
            index, dtype = bucket.state
            whole = state[index][dtype][NAME]  # type: ignore[index]
            whole[bucket.start : bucket.start + bucket.size] = torch.cat(parts)[: bucket.size]


def _collect(mine: Tensor, group: Any, everywhere: bool, receives: bool) -> list[Tensor]:
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(mine) for _ in range(group.size())] if receives else []
    if everywhere:
        dist.all_gather(parts, mine, group)
    else:
        first = dist.get_process_group_ranks(group)[0]
        dist.gather(mine, parts or None, first, group)
    return parts


def wrap_scatter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Load the averages after the rest; where none were saved, they start at the weights."""

    @functools.wraps(original)
    def load_parameter_state_from_dp_zero(
        self: Any, state_dict: Any, *, update_legacy_format: bool = False
    ) -> Any:
        result = original(self, state_dict, update_legacy_format=update_legacy_format)
        _scatter(self, {} if update_legacy_format else state_dict)
        return result

    return load_parameter_state_from_dp_zero


def _scatter(optimizer: Any, state: dict[Any, Any] | None) -> None:
    import torch
    import torch.distributed as dist

    group = optimizer.data_parallel_group_gloo
    first = dist.get_process_group_ranks(group)[0]
    sends = group.rank() == 0
    saved = torch.tensor(sends and all(NAME in each for each in _buffers(state)))
    dist.broadcast(saved, first, group)
    for bucket in buckets(optimizer, group.size()):
        mine = torch.empty(bucket.share)
        if saved:
            dist.scatter(mine, _cut(state, bucket, group.size()) if sends else None, first, group)
        for parameter, place in bucket.places.items():
            main = optimizer._get_main_param_and_optimizer_states(parameter)["param"]
            value = mine[place] if saved else main.detach()
            average_of(optimizer, parameter).copy_(value)


def _buffers(state: dict[Any, Any] | None) -> list[dict[str, Any]]:
    """The tensors of each buffer in a gathered state; one without any when there is none."""
    by_index = [each for each in (state or {}).values() if isinstance(each, dict)]
    return [tensors for each in by_index for tensors in each.values()] or [{}]


def _cut(state: dict[Any, Any] | None, bucket: Bucket, ranks: int) -> list[Tensor]:
    """Each rank's share of a bucket, padded at the end."""
    from torch.nn.functional import pad

    index, dtype = bucket.state
    whole = (state or {})[index][dtype][NAME][bucket.start : bucket.start + bucket.size]
    padded = pad(whole, (0, ranks * bucket.share - bucket.size))
    return list(padded.split(bucket.share))


def wrap_set_states(original: Callable[..., None]) -> Callable[..., None]:
    """Let a loader that knows no averages leave them as they are."""

    @functools.wraps(original)
    def _set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        kept = {} if NAME in tensors else {NAME: average_of(self, model_param)}
        original(self, model_param, {**tensors, **kept})

    return _set_main_param_and_optimizer_states


def _device(optimizer: Any) -> device:
    place: device = optimizer.buffers[0].buckets[0].grad_data.device
    return place
