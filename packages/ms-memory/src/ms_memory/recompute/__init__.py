"""Keep less in the forward and compute it again in the backward."""

from .activation import activation
from .discard import Chained, Discard
from .norms import norms
from .priority import layer_action

__all__ = ["Chained", "Discard", "activation", "layer_action", "norms"]
