"""A budget of bytes in, an exact plan out: what to keep, recompute, discard or swap."""

from .apply import Installed, Verified, apply, plan, verify
from .plan import Decision, Plan, Point
from .problem import Layer, LayerOption, Option, Problem, Site, Span, chain
from .profile import Profile, profile
from .solve import solve

__all__ = [
    "Decision",
    "Installed",
    "Layer",
    "LayerOption",
    "Option",
    "Plan",
    "Point",
    "Problem",
    "Profile",
    "Site",
    "Span",
    "Verified",
    "apply",
    "chain",
    "plan",
    "profile",
    "solve",
    "verify",
]
