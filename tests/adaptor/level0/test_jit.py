"""Megatron's fusions meet the compiler when they are called, not when they are imported."""

import subprocess
import sys

import torch

from mindspeed.features.level0.jit import deferred


def test_a_function_is_compiled_at_its_first_call_and_once(monkeypatch):
    seen = []

    def fake_compile(function):
        seen.append(function)
        return lambda *args: ("compiled", function(*args))

    monkeypatch.setattr(torch, "compile", fake_compile)

    @deferred
    def double(x):
        """Twice."""
        return 2 * x

    assert seen == []
    assert [double(2), double(3)] == [("compiled", 4), ("compiled", 6)]
    assert seen == [double.__wrapped__]
    assert (double.__name__, double.__doc__) == ("double", "Twice.")


def test_inside_a_compiled_region_it_is_part_of_that():
    @deferred
    def double(x):
        return 2 * x

    outer = torch.compile(lambda x: double(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(outer(torch.ones(3)), torch.full((3,), 3.0))


IMPORT = """
import sys, warnings
warnings.simplefilter("ignore")
import mindspeed.megatron_adaptor
import megatron.core.models.gpt, megatron.core.optimizer, megatron.core.pipeline_parallel
from megatron.core.fusions.fused_bias_gelu import bias_gelu
assert bias_gelu.__wrapped__.__name__ == "bias_gelu"
print(*sorted({"torch._inductor", "torch._dynamo"} & set(sys.modules)))
"""


def test_importing_megatron_does_not_load_the_compiler():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
