"""Megatron-LM on CPU, Ascend NPU and CUDA, by levels of optimization.

`import mindspeed.megatron_adaptor` at the top of a Megatron script is all that most users need.
The names below are for notebooks, libraries and tests; importing this package does nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mindspeed.patching.apply import activate, apply
    from mindspeed.patching.errors import PatchError, PlanError
    from mindspeed.patching.plan import Plan, plan
    from mindspeed.patching.records import Feature, Flag, Patch, Rule

__all__ = [
    "Feature",
    "Flag",
    "Patch",
    "PatchError",
    "Plan",
    "PlanError",
    "Rule",
    "activate",
    "apply",
    "plan",
]

_HOMES = {
    "Feature": "mindspeed.patching.records",
    "Flag": "mindspeed.patching.records",
    "Patch": "mindspeed.patching.records",
    "PatchError": "mindspeed.patching.errors",
    "Plan": "mindspeed.patching.plan",
    "PlanError": "mindspeed.patching.errors",
    "Rule": "mindspeed.patching.records",
    "activate": "mindspeed.patching.apply",
    "apply": "mindspeed.patching.apply",
    "plan": "mindspeed.patching.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
