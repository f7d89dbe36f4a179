"""What ms-memory refuses, by code: each message says what, where and what to do instead."""

from __future__ import annotations

from typing import NoReturn

# Code -> what is wrong. The message adds where it happened and the remedy.
CODES = {
    "E-M01": "a discarded output shares its storage with an input",
    "E-M02": "the tensor that triggers the restore has no gradient",
    "E-M03": "a discarded output was released wrongly, or its region was differentiated twice",
    "E-M04": "this mode of autograd cannot restore a discarded output",
    "E-M05": "two options exclude each other within one region",
    "E-M10": "two features want the same tensors",
    "E-M20": "the module belongs to another open session",
    "E-M21": "a module was patched by someone else while the session was open",
    "E-M22": "the plan matches nothing",
    "E-M23": "shapes changed under a static plan",
    "E-M30": "the budget is too small",
    "E-M31": "ranks have different plans",
    "E-M32": "the budget of host memory is exceeded",
    "E-M40": "a packed parameter cannot be packed or was changed from outside",
    "E-M41": "a step was skipped while masters were joined",
    "E-M42": "a checkpoint holds no masters",
}


class MemoryFeatureError(ValueError):
    """A refusal of ms-memory.

    Attributes:
        code: one of `CODES`.
    """

    def __init__(self, code: str, where: str, remedy: str) -> None:
        super().__init__(f"{code}: {CODES[code]}: {where}; {remedy}")
        self.code = code


def refuse(code: str, where: str, remedy: str) -> NoReturn:
    """Raise the error of a code."""
    raise MemoryFeatureError(code, where, remedy)
