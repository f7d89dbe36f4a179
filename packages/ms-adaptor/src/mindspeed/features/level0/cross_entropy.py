"""Megatron's fused vocabulary-parallel cross entropy rounds every gradient to bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindspeed.patching.records import Feature, Patch

if TYPE_CHECKING:
    import torch

FEATURE = Feature(
    name="level0.cross_entropy",
    level=0,
    doc="The fused cross entropy's gradient has the dtype of the logits.",
    patches=(
        Patch(
            target="megatron.core.fusions.fused_cross_entropy:calculate_gradients",
            kind="replace",
            value="mindspeed.features.level0.cross_entropy:calculate_gradients",
            probe="mindspeed.features.level0.cross_entropy:rounds_to_bfloat16",
            reason="The cast stands inside the function; no argument reaches it.",
        ),
    ),
)


def rounds_to_bfloat16(module: Any) -> bool:
    """The gradient of fp32 logits comes back in bfloat16."""
    import inspect

    # Calling it would compile it: the source is the cheaper witness.
    return "bfloat16" in inspect.getsource(inspect.unwrap(module.calculate_gradients))


def calculate_gradients(
    softmax: torch.Tensor,
    grad_output: torch.Tensor,
    target_mask: torch.Tensor,
    masked_target_1d: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the cross entropy by the logits, ``(softmax - onehot(target)) * grad``.

    Args:
        softmax: ``[s, b, v]`` fp32, overwritten.
        grad_output: ``[s, b]``.
        target_mask: ``[s, b]`` bool, true where the target lies in another rank's vocabulary.
        masked_target_1d: ``[s * b]`` int64, target within this rank's vocabulary.

    Returns:
        ``[s, b, v]`` fp32; autograd casts it to the logits' dtype.
    """
    vocab = softmax.shape[-1]
    flat = softmax.view(-1, vocab)
    mine = target_mask.view(-1, 1).logical_not().to(flat.dtype)
    flat.scatter_add_(1, masked_target_1d.unsqueeze(1), -mine)
    return softmax.mul_(grad_output.unsqueeze(-1))
