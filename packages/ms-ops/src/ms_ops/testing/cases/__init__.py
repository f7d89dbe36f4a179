"""One module a family of operators, listed here and nowhere else; each holds `TESTS`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..case import OpTest, Sample

FAMILIES = (
    "activation",
    "attention",
    "dropout_norm",
    "ffn",
    "matmul",
    "moe",
    "norm",
    "optim",
    "quant",
    "rope",
    "softmax",
)


def _placed(test: OpTest) -> OpTest:
    """Return a test whose samples live on the device asked for, indices and maps too."""

    def samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
        def put(value: object) -> object:
            return value.to(device) if isinstance(value, Tensor) else value

        for sample in test.samples(dtype, device):
            args = tuple(put(a) for a in sample.args)
            kwargs = {name: put(a) for name, a in sample.kwargs.items()}
            yield replace(sample, args=args, kwargs=kwargs)

    return replace(test, samples=samples)


OPERATORS: dict[str, OpTest] = {
    test.name: _placed(test)
    for family in FAMILIES
    for test in importlib.import_module(f"{__name__}.{family}").TESTS
}
