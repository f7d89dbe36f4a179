"""Context parallelism behind the attention interfaces of other frameworks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ms_ops.checks import fail

from .attention import context_attention
from .exchange import head_to_seq, seq_to_head
from .heads import kv_head_plan
from .plan import AttnPlan
from .topology import CPTopology

AttentionFunction = Callable[..., tuple[Tensor, None]]


def transformers_attention(topology: CPTopology) -> AttentionFunction:
    """Return an attention function for `transformers.AttentionInterface.register`.

    The model runs on this process's tokens, with their positions; the plan of the batch is an
    argument of the call: `model(tokens, position_ids=positions, context_plan=plan)`. The plan has
    the mask; the model must build none, which holds for every registered name of our own.

    Args:
        topology: the groups.
    """

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        context_plan: AttnPlan | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend; query, key and value are [B, H, s, D]; the output is [B, s, H, Dv]."""
        name = "transformers_attention"
        if context_plan is None:
            need = "the plan of the batch, as an argument of the model's forward"
            fail(ValueError, name, "context_plan", None, need)
        if attention_mask is not None:
            fail(ValueError, name, "attention_mask", "a tensor", "None: the plan has the mask")
        if dropout:
            fail(ValueError, name, "dropout", dropout, "0: its seed has no way in")
        left = context_plan.mask.left
        if sliding_window is not None and left != sliding_window - 1:
            need = f"a plan whose mask sees {sliding_window - 1} keys before its own"
            fail(ValueError, name, "sliding_window", f"{sliding_window}, mask {left}", need)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return context_attention(q, k, v, context_plan, topology, scale=scaling), None

    return attention


class DistributedAttention(torch.nn.Module):
    """DeepSpeed's Ulysses module: trades tokens for heads around a local attention.

    The signature is that of `deepspeed.sequence.layer.DistributedAttention`. Any numbers of heads:
    a process gets the key and value heads that its query heads touch, and no more. Where a group of
    query heads is cut so that the local attention would pair heads wrongly, its heads are repeated.

    Args:
        local_attention: called as `local_attention(q, k, v, *args, **kwargs)` with all tokens.
        sequence_process_group: the processes that hold the sequence, in its order.
        scatter_idx: dimension of the heads.
        gather_idx: dimension of the tokens.
        sp_stream: must be None: this module orders nothing by streams of its own.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor],
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
    ) -> None:
        super().__init__()
        if sp_stream is not None:
            fail(ValueError, "DistributedAttention", "sp_stream", sp_stream, "None")
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx, self.gather_idx = scatter_idx, gather_idx

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend; every tensor has this process's tokens and all heads.

        Args:
            query: four dimensions, heads and tokens where the constructor says.
            key: likewise, as many or fewer heads.
            value: likewise.
            batch_dim_idx: not read: the dimensions are told apart by the constructor's.
            *args: passed on to the local attention.
            **kwargs: likewise.

        Raises:
            ValueError: fewer query heads than processes.
        """
        heads, tokens = self.scatter_idx, self.gather_idx
        size, me = dist.get_world_size(self.spg), dist.get_rank(self.spg)
        if query.shape[heads] < size:
            # Known to all processes alike: else one would fail and the others wait for it.
            need = f"at least {size}, one for each process"
            fail(ValueError, "DistributedAttention", "query", f"{query.shape[heads]} heads", need)
        shared = kv_head_plan(query.shape[heads], key.shape[heads], size)
        q = seq_to_head(query, self.spg, tokens, heads, head_counts=shared.q)
        k, v = (
            seq_to_head(x, self.spg, tokens, heads, head_counts=shared.kv) for x in (key, value)
        )
        first, last = shared.q[me]
        group = query.shape[heads] // key.shape[heads]
        of = [head // group - shared.kv[me][0] for head in range(first, last)]
        if len(of) % k.shape[heads] or of != _even_groups(len(of), k.shape[heads]):
            index = torch.tensor(of, device=k.device)
            k, v = (x.index_select(heads, index) for x in (k, v))
        out = self.local_attn(q, k, v, *args, **kwargs)
        return head_to_seq(out, self.spg, tokens, heads, head_counts=shared.q)


def _even_groups(heads: int, groups: int) -> list[int]:
    return [head * groups // heads for head in range(heads)]
