"""Two ways in which a virtual pipeline trains on wrong numbers without an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed.patching.records import Feature, Patch, Rule

FEATURE = Feature(
    name="level0.pipeline",
    level=0,
    doc="Refuses batched messages where they mix up neighbours; on gloo, an output that is freed "
    "after an overlapped send was started is still sent whole.",
    patches=(
        Patch(
            target="megatron.core.pipeline_parallel.p2p_communication:_p2p_ops",
            kind="wrap",
            value="mindspeed.features.level0.pipeline:wrap_p2p_ops",
            when="device == 'cpu'",
            reason="deallocate_pipeline_outputs, which Megatron-LM always sets, takes the memory "
            "away under gloo's send; no stream orders the two, and no callback lies between.",
        ),
    ),
    rules=(
        Rule(
            kind="requires",
            left="virtual_pipeline_model_parallel_size and pipeline_model_parallel_size == 2",
            right="overlap_p2p_comm",
            text="with two pipeline stages, each stage's neighbours on both sides are one rank, "
            "and a virtual pipeline that batches its messages mixes them up",
            suggestion="Use overlap_p2p_comm=True and batch_p2p_comm=False, or more stages.",
        ),
    ),
)


def wrap_p2p_ops(original: Callable[..., Any]) -> Callable[..., Any]:
    """Send aliases of the tensors: the alias keeps the memory until the send is done."""

    @functools.wraps(original)
    def _p2p_ops(*, tensor_send_prev: Any, tensor_send_next: Any, **others: Any) -> Any:
        prev, next_ = (
            tensor if tensor is None else tensor.detach()
            for tensor in (tensor_send_prev, tensor_send_next)
        )
        return original(tensor_send_prev=prev, tensor_send_next=next_, **others)

    return _p2p_ops
