"""The formulas of the reference, compiled: one pass over memory a direction."""

from ..compiled import compiled
from . import portable, reference

BACKEND = compiled(("rope",), reference.BACKEND, portable.BACKEND)
