"""AdamW, alone and with averaged weights: steps on lists of tensors, in place, and optimizers."""

from .adamw import fused_adamw_, fused_ema_adamw_
from .averaged import FusedEmaAdamW
from .optimizers import FusedAdamW

__all__ = ["FusedAdamW", "FusedEmaAdamW", "fused_adamw_", "fused_ema_adamw_"]
