"""`mindspeed train --memory-budget`: the report, its files, and what a measured step says of it."""

import json
import subprocess
import sys

from mindspeed.features.memory.planner.report import compared
from mindspeed.train.cli import main

TINY = (
    "--nproc 1 --num-layers 4 --hidden-size 32 --seq-length 128 --global-batch-size 2"
    " --eval-iters 1 --lr-warmup-iters 0 --train-iters 2 --name planned"
)


def test_a_run_within_a_share_of_its_unplanned_peak(tmp_path):
    flags = "--memory-budget 60% --memory-actions recompute"
    command = [sys.executable, "-m", "mindspeed.train", *TINY.split(), *flags.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "runs" / "planned"
    plan = json.loads((folder / "memory-stage0.json").read_text())
    assert plan["budget"] == int(0.6 * max(plan["unplanned"]))
    assert (folder / "memory-stage0.png").read_bytes().startswith(b"\x89PNG")
    assert "pipeline stage 0: memory plan" in run.stdout
    assert "layers.0" in run.stdout
    (line,) = [one for one in run.stdout.splitlines() if "memory of stage 0: budget" in one]
    assert "more than the budget" not in line
    summary = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["summary"]
    # What the first step left behind is in the plan, and was there before the measured one.
    assert 0.9 * plan["peak"] <= summary["measured"]["tensor_bytes"] <= plan["budget"]


def test_what_is_said_when_a_step_needs_more():
    rows = [(0, 2 << 20, 1 << 20, 1 << 20), (1, 2 << 20, 1 << 20, 3 << 20), (1, 2 << 20, 0, 0)]
    first, second = compared(rows)
    assert first == "memory of stage 0: budget 2.00 MiB, predicted peak 1.00 MiB, measured 1.00 MiB"
    assert second.endswith("measured 3.00 MiB: 1.00 MiB more than the budget")


def test_usage_errors_start_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY.split(), "--memory-budget", "0.9"]) == 2
    assert "a budget of 0.9 on the processor" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
