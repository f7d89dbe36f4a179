"""Keep less in the forward and compute it again in the backward."""

from .discard import Chained, Discard

__all__ = ["Chained", "Discard"]
