"""Packed documents on a divided sequence, and masks that come with the batches.

A mask says which tokens are of one document in S^2 values. Attention over a divided sequence is
planned from where documents begin, a few integers, which take the mask's place in the model: so
they reach every layer, and every recomputation of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed.features.context.settings import is_local
from mindspeed.features.memory.planner.settings import WANTED
from mindspeed.features.ops.script import script_arguments
from mindspeed.patching.records import Feature, Patch, Rule

_HERE = "mindspeed.features.context.documents"
_RESET = "reset_attention_mask and attention_mask_type == 'causal'"
_STAGES = f"{_RESET} and pipeline_model_parallel_size > 1"

FEATURE = Feature(
    name="context.documents",
    level=2,
    doc="--reset-attention-mask and --attention-mask-type general on a divided sequence.",
    when="context_parallel_size > 1 and (reset_attention_mask or attention_mask_type == 'general')",
    rules=(
        Rule(
            kind="forbids",
            left=_RESET,
            right="overlap_moe_expert_parallel_comm",
            text="documents reach the layers through the model's forward, which the schedule that"
            " overlaps expert communication does not call",
            suggestion="Leave --overlap-moe-expert-parallel-comm out.",
        ),
        Rule(
            kind="forbids",
            left=_RESET,
            right="sft or hybrid_context_parallel",
            text="batches that come packed say where their sequences begin, and that counts",
            suggestion="Leave --reset-attention-mask out.",
        ),
        Rule(
            kind="forbids",
            left=_STAGES,
            right=WANTED,
            text="the memory planner runs a pipeline stage by itself, which then does not know"
            " where documents begin",
            suggestion="Plan without --reset-attention-mask, or without pipeline stages.",
        ),
        Rule(
            kind="forbids",
            left="attention_mask_type == 'general'",
            right="pipeline_model_parallel_size > 2 or virtual_pipeline_model_parallel_size",
            text="masks come with the batches, which Megatron gives to the first and the last"
            " pipeline stage alone",
            suggestion="Use two stages without virtual ones, or --attention-mask-type causal.",
        ),
    ),
    packages=("ms-ops", "ms-parallel"),
    patches=(
        Patch(
            target="megatron.core.models.gpt.gpt_model:GPTModel.forward",
            kind="wrap",
            value=f"{_HERE}:wrap_forward",
            reason="The layers see no tokens, and a script holds Megatron's functions that divide"
            " batches by name from before its arguments are known.",
        ),
        Patch(
            target="megatron.core.pipeline_parallel.schedules:get_forward_backward_func",
            kind="wrap",
            value="mindspeed.features.context.stages:wrap",
            when=_STAGES,
            order=-1,
            reason="Later stages get no tokens, and a schedule tells nobody where its pass over the"
            " micro batches begins and ends.",
        ),
    ),
    advise=f"{_HERE}:advise",
    page="docs/context/megatron.md",
)


def wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the layers where documents begin instead of a mask."""

    @functools.wraps(original)
    def forward(
        self: Any,
        input_ids: Any,
        position_ids: Any,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        end = end_of_document(self.config)
        if end is not None and options.get("packed_seq_params") is None:
            from mindspeed.features.context.stages import shared

            attention_mask = shared(self, lambda: starts(input_ids, end, self.cp_group))
        return original(self, input_ids, position_ids, attention_mask, *args, **options)

    return forward


def end_of_document(config: Any) -> int | None:
    """Return the token that closes a document, None where documents are not told apart.

    Args:
        config: of a model; its attribute `end_of_document` counts first, then the arguments of
            the Megatron-LM script that runs here.
    """
    found: int | None = getattr(config, "end_of_document", None)
    values = script_arguments()
    resets = values.get("reset_attention_mask") and values.get("attention_mask_type") == "causal"
    if found is not None or not resets or not is_local(values):
        return found
    from megatron.training import get_tokenizer

    end: int = get_tokenizer().eod
    return end


def starts(input_ids: Any, end: int, group: Any) -> Any:
    """Return where documents begin in the whole rows of a batch that Megatron has divided.

    Args:
        input_ids: [b, s], this rank's tokens; each rank sends them to the others.
        end: the token that closes a document.
        group: the context-parallel ranks.

    Returns:
        int64 [n + 1] on the host, for the mask's place.
    """
    import torch
    import torch.distributed as dist

    from mindspeed.features.context.masks import boundaries
    from ms_parallel.context import SeqLayout

    layout = SeqLayout.zigzag(input_ids.shape[1] * group.size(), group.size())
    parts = [torch.empty_like(input_ids) for _ in layout.lengths]
    dist.all_gather(parts, input_ids.contiguous(), group=group)
    return boundaries(layout.unshard(parts, 1), end)


def advise(config: Any) -> str:
    """Say what a mask costs.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    if getattr(config, "attention_mask_type", "causal") == "general":
        return "a mask of all pairs of tokens is read on the host for each batch: slow, and large"
    told = "where documents begin is all that is kept of the mask; plans send what they need"
    if getattr(config, "pipeline_model_parallel_size", 1) > 1:
        told += "; the first pipeline stage finds them, and later ones wait for its host"
    return told
