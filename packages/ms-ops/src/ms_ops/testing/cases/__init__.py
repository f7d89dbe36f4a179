"""One module a family of operators, listed here and nowhere else; each holds `TESTS`."""

from __future__ import annotations

import importlib

from ..case import OpTest

FAMILIES = (
    "activation",
    "attention",
    "dropout_norm",
    "matmul",
    "moe",
    "norm",
    "optim",
    "quant",
    "rope",
    "softmax",
)

OPERATORS: dict[str, OpTest] = {
    test.name: test
    for family in FAMILIES
    for test in importlib.import_module(f"{__name__}.{family}").TESTS
}
