"""A budget of bytes in, an exact plan out: what to keep, recompute, discard or swap."""

from .apply import Installed, Verified, apply, plan, verify
from .parts import PARTS, Part
from .plan import Decision, Plan, Point
from .problem import Layer, LayerOption, Option, Problem, Site, Span, chain
from .profile import Profile, joined, profile
from .solve import solve

__all__ = [
    "PARTS",
    "Decision",
    "Installed",
    "Layer",
    "LayerOption",
    "Option",
    "Part",
    "Plan",
    "Point",
    "Problem",
    "Profile",
    "Site",
    "Span",
    "Verified",
    "apply",
    "chain",
    "joined",
    "plan",
    "profile",
    "solve",
    "verify",
]
