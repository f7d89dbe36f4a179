"""Wrong kernels, in the interpreter: the test body must catch each of them."""

import importlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from support.mutants import caught


class Mutant(NamedTuple):
    """A kernel file in which the first `old` after `def kernel` is replaced by `new`."""

    family: str
    op: str
    kernel: str
    old: str
    new: str

    def module(self, folder):
        path = Path(importlib.import_module(self.family).__file__).with_name("triton.py")
        head, start, tail = path.read_text().partition(f"def {self.kernel}(")
        assert self.old in tail.partition("@triton.jit")[0], f"{self.old} is not in {self.kernel}"
        path = folder / "mutant.py"
        path.write_text(head + start + tail.replace(self.old, self.new, 1))
        spec = importlib.util.spec_from_file_location(f"{self.family}.mutant", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


NORM, ACTIVATION, ROPE, MOE = (f"ms_ops.{n}" for n in ("norm", "activation", "rope", "moe"))
MERGE = "ms_ops.attention.merge"
MUTANTS = {
    "eps": Mutant(NORM, "rms_norm", "_forward", "mean + EPS", "mean"),
    "offset": Mutant(NORM, "rms_norm", "_forward", " + OFFSET", ""),
    "mean": Mutant(NORM, "rms_norm", "_backward", "scaled - normed * mean", "scaled"),
    "rows_lost": Mutant(NORM, "rms_norm", "_backward", "total += ", "total = "),
    "slope": Mutant(ACTIVATION, "swiglu", "_backward", "1.0 - sigmoid", "1.0"),
    "halves": Mutant(
        ACTIVATION, "bias_swiglu", "_forward", "bias + half + column", "bias + column"
    ),
    "weight": Mutant(ACTIVATION, "weighted_swiglu", "_weighted_backward", "grad * weight", "grad"),
    "sign": Mutant(ROPE, "rope", "_turn", "b * cos_b + a * sin_b", "b * cos_b - a * sin_b"),
    "transpose": Mutant(ROPE, "rope", "_turn", "a * cos_a + b * sin_b", "a * cos_a + b * sin_a"),
    "rest": Mutant(ROPE, "rope", "_turn", "place = 2 * half + column", "place = half + column"),
    "share": Mutant(MERGE, "attention_merge", "_forward", "weight2 / total", "weight2"),
    "layout": Mutant(MERGE, "attention_merge", "_forward", "row % size2 * step2", "row % size2"),
    "joined": Mutant(MERGE, "attention_merge", "_backward", "(part2 - joined)", "part2"),
    "bags": Mutant(MOE, "moe_unpermute", "_combine", "token * k", "token"),
    "uneven": Mutant(MOE, "moe_unpermute_map", "_combine", "end - begin", "1"),
    "owner": Mutant(MOE, "moe_permute", "_spread", "slot // k", "slot"),
    "dots": Mutant(MOE, "moe_unpermute", "_spread", "dot += ", "dot = "),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutant_is_caught(mutant, tmp_path, monkeypatch):
    module = mutant.module(tmp_path)
    # Narrow tiles and few programs, so that every loop runs more than once.
    for name, size in (("COLUMNS", 4), ("ROWS", 4), ("PROGRAMS", 1)):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, size)
    assert caught(mutant.op, torch.float32, module.BACKEND.kernels[mutant.op]) == 1
