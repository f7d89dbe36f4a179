"""Steps of optimizers on lists of tensors, in place: AdamW, and AdamW with averaged weights."""

from .adamw import fused_adamw_, fused_ema_adamw_

__all__ = ["fused_adamw_", "fused_ema_adamw_"]
