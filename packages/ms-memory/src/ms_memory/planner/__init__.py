"""A budget of bytes in, an exact plan out: what to keep, recompute, discard or swap."""

from .plan import Decision, Plan, Point
from .problem import Layer, LayerOption, Option, Problem, Site, Span, chain
from .solve import solve

__all__ = [
    "Decision",
    "Layer",
    "LayerOption",
    "Option",
    "Plan",
    "Point",
    "Problem",
    "Site",
    "Span",
    "chain",
    "solve",
]
