"""Every example is short, runs, and would notice an operator that is wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from .workspace import ROOT, run_python

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LIMIT = 40

# One interpreter for all of them: the import of transformers is most of the time. Each runs a
# second time with an operator that is wrong, the last one with a budget that is twice as large.
RUN = """
import runpy, sys
import ms_ops
from ms_memory import planner
right, plan = ms_ops.swiglu, planner.plan
*operators, memory = sys.argv[1:]
for factor in (1.0, 1.01):
    ms_ops.swiglu = lambda x: right(x) * factor
    for path in operators:
        try:
            runpy.run_path(path, run_name="__main__")
        except AssertionError as error:
            print("noticed" if "not close" in str(error) else error)
for factor in (1, 2):
    planner.plan = lambda model, step, budget: plan(model, step, factor * budget)
    try:
        runpy.run_path(memory, run_name="__main__")
    except AssertionError as error:
        print("noticed" if "bytes are used" in str(error) else error)
"""


# One process a rank for all of them: the imports are most of the time. Each has its own port.
RUN_IN_RANKS = """
import os, runpy, sys
for argument in sys.argv[1:]:
    os.environ["MASTER_PORT"], path = argument.split(":", 1)
    runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_short(path):
    assert len(path.read_text().splitlines()) < LIMIT


def test_one_process():
    names = ("hf_llama.py", "hf_mixtral.py", "memory_llama.py")
    told = run_python(RUN, *(str(ROOT / "examples" / name) for name in names)).splitlines()
    assert told[:4] == ["logits are equal"] * 2 + ["noticed"] * 2
    assert told[4] == "without a plan: 3.78 MiB, 2.50 MiB are allowed"
    assert told.count("within the budget, gradients are equal") == 1
    assert told[-1] == "noticed"


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_two_processes():
    names = ("context_deepspeed", "context_fsdp", "context_transformers")
    paths = [str(ROOT / "examples" / f"{name}.py") for name in names]
    arguments = [f"{port}:{path}" for port, path in zip(free_ports(3), paths, strict=True)]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_IN_RANKS, *arguments],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (stdout, stderr) in enumerate(outputs):
        said = [line for line in stdout.splitlines() if line.startswith(f"rank {rank}: ")]
        assert [line.split(" ", 2)[2] for line in said] == [
            "outputs and gradients are equal",
            "losses are equal",
            "logits are equal",
        ], stderr
