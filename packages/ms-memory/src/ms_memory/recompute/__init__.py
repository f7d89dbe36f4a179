"""Keep less in the forward and compute it again in the backward."""

from .activation import activation
from .deferred import DeferredCheckpoint
from .discard import Chained, Discard
from .modules import modules, segments
from .norms import norms
from .offload import MUST_CPU_OFFLOAD
from .priority import layer_action

__all__ = [
    "MUST_CPU_OFFLOAD",
    "Chained",
    "DeferredCheckpoint",
    "Discard",
    "activation",
    "layer_action",
    "modules",
    "norms",
    "segments",
]
