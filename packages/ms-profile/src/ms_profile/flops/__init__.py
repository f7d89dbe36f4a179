"""FLOP counts and utilisation."""

from __future__ import annotations

from .attention import Attention
from .meter import FlopMeter, Flops
from .peak import PEAKS, peak_flops
from .registry import UnknownOperator, register_flops

__all__ = [
    "PEAKS",
    "Attention",
    "FlopMeter",
    "Flops",
    "UnknownOperator",
    "peak_flops",
    "register_flops",
]
