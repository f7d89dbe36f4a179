"""Floating-point operations of the operators, for whoever counts them.

Each custom op states its formula as an attribute, `torch.ops.ms.attention.flop_formula`, which
costs nothing to import; None says that it multiplies no matrices. It is called as torch calls a raw
formula, `formula(*args, **kwargs, out_val=result)`, and may have a parameter `attention` ("model",
"launched" or "full").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_stated: dict[Any, Callable[..., int] | None] = {}


def state_flops(op: Any, formula: Callable[..., int] | None) -> None:
    """Attach its formula to an op (a packet of `torch.ops`)."""
    op.flop_formula = formula
    _stated[op] = formula


def register_flop_formulas() -> None:
    """Tell torch's own counter, `torch.utils.flop_counter.FlopCounterMode`, these operators.

    Not done at import, because with Triton installed torch's counter imports it.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for op, formula in _stated.items():
        if formula is not None and op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)
