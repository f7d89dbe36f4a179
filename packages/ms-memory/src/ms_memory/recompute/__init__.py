"""Keep less in the forward and compute it again in the backward."""

from .activation import activation
from .deferred import DeferredCheckpoint
from .discard import Chained, Discard
from .modules import modules, segments
from .norms import norms
from .priority import layer_action

__all__ = [
    "Chained",
    "DeferredCheckpoint",
    "Discard",
    "activation",
    "layer_action",
    "modules",
    "norms",
    "segments",
]
