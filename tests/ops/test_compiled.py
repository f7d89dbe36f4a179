"""The backend "compiled": its numbers, and what happens where nothing compiles."""

import logging

import pytest
import torch
import torch._inductor.config

import ms_ops
from ms_ops import registry, testing
from ms_ops.activation import portable, reference
from ms_ops.compiled import Compiled
from support.compiler import has_compiler


@pytest.mark.skipif(not has_compiler(), reason="inductor finds no C++ compiler")
def test_values():
    first = next(iter(testing.OPERATORS["swiglu"].samples(torch.bfloat16, "cpu")))
    testing.check_values("swiglu", first, "compiled")
    kernel = registry.kernel("swiglu", "compiled")
    assert kernel.forward.compiled is not kernel.forward.fallback
    assert kernel.backward.compiled is not None
    testing.check_fake("swiglu", first, "compiled")


def test_without_a_compiler(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    function = Compiled(reference.forward, portable.forward)
    x = torch.randn(3, 14)
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",)})
    with no_compiler, caplog.at_level(logging.WARNING, "ms_ops"):
        results = [function(x, -1) for _ in range(2)]
    assert all(torch.equal(y, portable.forward(x, -1)) for y in results)
    assert [r.message for r in caplog.records if "cannot be compiled" in r.message] != []
    assert len(caplog.records) == 1


def test_nobody_gets_it_unasked():
    for op in ms_ops.operators():
        names = list(registry.backends(op))
        if "compiled" in names:
            assert names.index("portable") < names.index("compiled"), op
