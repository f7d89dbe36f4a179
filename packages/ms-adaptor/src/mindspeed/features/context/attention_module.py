"""Core attention for context_parallel_size > 1, in the place of Megatron's DotProductAttention."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mindspeed.features.context import masks
from mindspeed.features.context.settings import ContextSettings
from mindspeed.features.ops.attention_module import FusedAttention
from ms_parallel.context import (
    AttnMask,
    AttnPlan,
    CPTopology,
    SeqLayout,
    context_attention,
    plan_attention,
)

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_TOPOLOGIES: dict[tuple[str, int, int, str, bool], CPTopology] = {}


class _Division(NamedTuple):
    """Who holds what of a call, and what its queries see."""

    layout: SeqLayout
    mask: AttnMask
    flat: bool  # rows of the batch are laid end to end


class MegatronCPAttention(FusedAttention):
    """`FusedAttention` over the tokens of all context-parallel ranks.

    Tokens are divided as Megatron divides them: chunks c and 2P - 1 - c of 2P at rank c, under
    every algorithm; in packed sequences (format "thd") each sequence by itself. Attention dropout
    depends on positions and heads alone, not on the number of ranks.

    Attributes:
        cp_group: the ranks; a batch may bring others (`packed_seq_params.cp_group`).
        context: algorithm and options.
    """

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        """Build the module as Megatron's.

        Args:
            config: of the model; its attribute `context_attention` says how attention is divided
                (`mindspeed.features.context.settings.mark`), plain Ulysses without it.
            *args: as `FusedAttention` takes them.
            **options: likewise; `pg_collection.cp` holds the ranks if it is there.
        """
        # The original refuses to be one of several ranks, which is what the rest here is for.
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **options)
        self.config = config
        groups = options.get("pg_collection") or options.get("model_comm_pgs")
        found = getattr(groups, "cp", None)
        self.cp_group = parallel_state.get_context_parallel_group() if found is None else found
        self.context: ContextSettings = getattr(config, "context_attention", ContextSettings())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, d], this rank's tokens.
            key: [s, b, groups, d].
            value: [s, b, groups, dv].
            attention_mask: None for the mask that the module was built for; int64 [n + 1], where
                documents begin in the whole rows of the batch laid end to end; or bool
                [b or 1, 1, S, S] of whole rows, or the rows [.., s, S] of this rank's tokens, True
                where a query must NOT attend.
            attn_mask_type: not read, as in Megatron: the module's own type counts.
            attention_bias: must be None.
            packed_seq_params: starts of packed sequences (format "thd"), in tokens of all ranks;
                query, key and value are then [t, heads, d] and so on.

        Returns:
            [s, b, heads * dv], or packed [t, heads * dv].

        Raises:
            ValueError: a bias, a mask of another shape, or keys of another length.
        """
        group = getattr(packed_seq_params, "cp_group", None) or self.cp_group
        if group.size() == 1:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        if attention_bias is not None:
            raise ValueError(
                "MegatronCPAttention: attention_bias: got a tensor, need None: a bias of all pairs"
                " of tokens does not divide; ALiBi does"
            )
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"MegatronCPAttention: key: got {key.shape[0]} tokens beside {query.shape[0]}"
                f" queries at rank {group.rank()}, need as many: this is self-attention"
            )
        packed = packed_seq_params is not None and query.dim() == 3
        if packed:
            division = self._packed_division(packed_seq_params, query, group)
        else:
            division = self._division(query, attention_mask, group)
        plan = self._plan(division, query, key, value)
        tensors = (query, key, value)
        if division.flat:
            tensors = tuple(t.transpose(0, 1).flatten(0, 1) for t in tensors)  # type: ignore[assignment]
        layout = "thd" if packed or division.flat else "sbhd"
        out: Tensor = context_attention(
            *tensors, plan, topology(group, plan, self.context),
            layout=layout, **self._options(query.device, division.mask),
        )  # fmt: skip
        if division.flat:
            out = out.unflatten(0, (query.shape[1], -1)).transpose(0, 1)
        return out.flatten(-2)

    def _division(self, query: Tensor, attention_mask: Tensor | None, group: Any) -> _Division:
        own, batch = query.shape[:2]
        layout = SeqLayout.zigzag(own * group.size(), group.size())
        window = self._window_spec() is not None
        both = getattr(self.config, "masks_beside_windows", False)
        if masks.is_boundaries(attention_mask):
            starts = masks.host_integers(attention_mask)  # type: ignore[arg-type]
            one = batch == 1
            return _Division(layout if one else layout.rows(batch), self._band(starts), not one)
        if attention_mask is None or (window and not both):
            return _Division(layout, self._band(), False)
        band = self._band() if window or self._fills() else None
        mask, rows = masks.dense(attention_mask, layout, group, batch, band)
        return _Division(layout.rows(rows), mask, rows > 1)

    def _packed_division(self, packed: Any, query: Tensor, group: Any) -> _Division:
        padded = getattr(packed, "cu_seqlens_q_padded", None)
        if padded is not None and self.attn_mask_type not in _CAUSAL:
            raise ValueError(
                "MegatronCPAttention: cu_seqlens_q_padded: got padding inside a pack without a"
                " causal mask, need none: the padding would be attended to"
            )
        starts = masks.host_integers(packed.cu_seqlens_q if padded is None else padded)
        layout = SeqLayout.zigzag_docs(starts, group.size())
        if layout.length(group.rank()) != query.shape[0]:
            raise ValueError(
                f"MegatronCPAttention: packed_seq_params: got {query.shape[0]} tokens at rank"
                f" {group.rank()} of {group.size()}, need {layout.length(group.rank())} of the"
                f" {starts[-1]} that its sequences have"
            )
        return _Division(layout, self._band(starts), False)

    def _fills(self) -> bool:
        return self.alibi is not None and self.alibi.settings.fill

    def _band(self, documents: tuple[int, ...] = ()) -> AttnMask:
        """Return the mask of this layer without one of the batch."""
        window = self._window_spec()
        if window is not None:
            left, right = window.left, window.right
        else:
            left, right = None, 0 if self.attn_mask_type in _CAUSAL else None
        return AttnMask(left, 0 if self._fills() else right, documents)

    def _plan(self, division: _Division, query: Tensor, key: Tensor, value: Tensor) -> AttnPlan:
        layout = division.layout
        return plan_attention(
            layout,
            division.mask,
            heads=(query.shape[-2], key.shape[-2]),
            head_dims=(query.shape[-1], value.shape[-1]),
            grad_bytes=8 if query.dtype == torch.float64 else 4,
            **self.context.arguments(layout.size, self.layer_number),
        )

    def _options(self, device: torch.device, mask: AttnMask) -> dict[str, Any]:
        options: dict[str, Any] = {
            "scale": self._scale(),
            "sink": getattr(self, "softmax_offset", None),
        }
        if self.alibi is not None:
            form = self.alibi.settings.form
            if form == "signed" and mask.right != 0:
                raise ValueError(
                    "MegatronCPAttention: alibi: got a bias with signs and queries that see later"
                    " keys, need a causal mask, or --alibi-fusion-attn-type 2 or 3"
                )
            options["alibi_slopes"] = self.alibi.slopes(device)
            options["alibi_sqrt"] = form == "sqrt"
        if self.training and self.attention_dropout.p > 0:
            options["dropout_p"] = self.attention_dropout.p
            options["dropout_rng"] = self._draw(device)
        return options

    def _draw(self, device: torch.device) -> Tensor:
        """Return seed and offset: the ranks of the group draw alike, and again in recomputation."""
        # With sequence parallelism the whole block runs in Megatron's fork already.
        forked = not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forked else nullcontext():
            return torch.randint(2**31 - 1, (2,), dtype=torch.int64, device=device)


def topology(group: Any, plan: AttnPlan, settings: ContextSettings) -> CPTopology:
    """Return the groups of a plan, made once for all layers.

    Args:
        group: the context-parallel ranks.
        plan: says what nodes and windows there are.
        settings: say how messages start, and whether plans are compared.
    """
    key = (group.group_name, plan.ulysses, plan.window, settings.p2p, settings.check_plans)
    found = _TOPOLOGIES.get(key)
    # Groups of a world that is gone may have had the same name.
    if found is None or found.group is not group:
        shape = (plan.ulysses, plan.window, settings.p2p)
        found = CPTopology(group, *shape, check_plans=settings.check_plans)
        _TOPOLOGIES[key] = found
    return found
