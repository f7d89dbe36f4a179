"""Every example is short, runs, and would notice an operator that is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .workspace import ROOT, run_python

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LIMIT = 40

# One interpreter for all of them: the import of transformers is most of the time.
RUN = """
import runpy, sys
import ms_ops
right = ms_ops.swiglu
for factor in (1.0, 1.01):
    ms_ops.swiglu = lambda x: right(x) * factor
    for path in sys.argv[1:]:
        try:
            runpy.run_path(path, run_name="__main__")
        except AssertionError as error:
            print("noticed" if "not close" in str(error) else error)
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_short(path):
    assert len(path.read_text().splitlines()) < LIMIT


def test_one_process():
    paths = [str(ROOT / "examples" / name) for name in ("hf_llama.py", "hf_mixtral.py")]
    told = run_python(RUN, *paths).splitlines()
    assert told == ["logits are equal"] * 2 + ["noticed"] * 2


def test_two_processes():
    names = ("context_deepspeed", "context_fsdp", "context_transformers")
    paths = [str(ROOT / "examples" / f"{name}.py") for name in names]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
    run_all = "import runpy, sys; [runpy.run_path(p, run_name='__main__') for p in sys.argv[1:]]"
    # One launch for all of them: the imports are most of the time.
    command = [*launch, "--standalone", sys.executable, "-c", run_all, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        said = [line for line in done.stdout.splitlines() if line.startswith(f"rank {rank}: ")]
        assert [line.split(" ", 2)[2] for line in said] == [
            "outputs and gradients are equal",
            "losses are equal",
            "logits are equal",
        ]
