"""The averages of the weights in the model, for evaluation and export, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ms_ops import FusedEmaAdamW


@contextmanager
def ema_model(optimizer: Any) -> Iterator[None]:
    """Inside, the model and the optimizer's fp32 weights hold the averages.

    Afterwards, also after an error, they hold the very bits that they held before. Every rank
    enters, since a distributed optimizer gathers the weights. A step inside is an error; a
    checkpoint saved inside holds the averages as weights.

    Args:
        optimizer: Megatron's, built with `--optimizer-selection fused_ema_adamw`.

    Raises:
        ValueError: the optimizer keeps no averages.
        RuntimeError: they are in the model already.
    """
    parts = [o for o in _parts(optimizer) if isinstance(o.optimizer, FusedEmaAdamW)]
    if not parts:
        raise ValueError(
            "ema_model: optimizer: got one without averages, need one built with"
            " --optimizer-selection fused_ema_adamw"
        )
    with ExitStack() as after:
        # Called last, when all weights are back.
        after.callback(_publish, parts)
        for part in parts:
            after.enter_context(part.optimizer.averaged())
        _publish(parts)
        yield


def _parts(optimizer: Any) -> Sequence[Any]:
    each: Sequence[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return each


@torch.no_grad()
def _publish(parts: Sequence[Any]) -> None:
    """Bring the optimizers' fp32 weights into the model, on every rank."""
    chunks: dict[int, Any] = {}
    for part in parts:
        if hasattr(part, "_copy_main_params_to_model_params"):
            part._copy_main_params_to_model_params()
        chunks.update({id(chunk): chunk for chunk in getattr(part, "model_chunks", ())})
    for chunk in chunks.values():
        if chunk.ddp_config.overlap_param_gather:
            # A gather of the former weights may be under way: this one only ends it.
            chunk.start_param_sync(force_sync=True)
        chunk.start_param_sync(force_sync=True)
