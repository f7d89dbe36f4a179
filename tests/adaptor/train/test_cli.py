"""`mindspeed train` end to end, in processes of its own: results, interrupts, kills, resuming."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

TINY = (
    "--num-layers 2 --hidden-size 32 --seq-length 64 --eval-iters 1 --lr-warmup-iters 0 "
    "--optimization-level"
)
KEYS = {
    "level",
    "step",
    "loss",
    "grad_norm",
    "step_time_s",
    "tokens_per_s",
    "peak_bytes",
}


def command(text, level=0):
    return [sys.executable, "-m", "mindspeed.train", *TINY.split(), str(level), *text.split()]


def train(folder, text, level=0):
    return subprocess.run(
        command(text, level), cwd=folder, capture_output=True, text=True, timeout=240
    )


def start(folder, text):
    return subprocess.Popen(
        command(text),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def rows(folder, name):
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(folder, name):
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in rows(folder, name) if "step" in r}


def wait_for_step(folder, name, step, process):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        file = folder / "runs" / name / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError("the run took no step")


def descendants(pid):
    """Process ids below `pid`, with their command lines."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            found.setdefault(parent, []).append(int(entry))
    below, queue = [], [pid]
    while queue:
        children = found.get(queue.pop(), [])
        below += children
        queue += children
    return below


def ranks_of(pid):
    """The ranks lead process groups of their own."""
    return [child for child in descendants(pid) if os.getpgid(child) == child]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run that others are compared with."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder, "--train-iters 40 --name whole --eval-interval 25")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_run_folder_and_schema(whole):
    folder, done = whole
    records = rows(folder, "whole")
    assert [r["step"] for r in records[:-1]] == list(range(1, 41))
    assert all(set(r) == KEYS for r in records[:-1])
    assert all(isinstance(r[key], int) for r in records[:-1] for key in ("peak_bytes", "level"))
    last = records[-1]
    assert set(last) == {"level", "summary"}
    summary = last["summary"]
    assert summary["first_loss"] == records[0]["loss"]
    assert summary["last_loss"] == records[-2]["loss"] < records[0]["loss"]
    assert summary["valid_loss"] > 0
    assert (folder / "runs" / "latest").resolve() == (folder / "runs" / "whole").resolve()
    assert (folder / "runs" / "whole" / "losses.png").stat().st_size > 1000
    for words in ("validation loss", "tokens/s", "memory", "left", "saved for backward"):
        assert words in done.stdout


def test_interrupted_run_resumes_bit_for_bit(whole, tmp_path):
    process = start(tmp_path, "--train-iters 40 --save --name part")
    wait_for_step(tmp_path, "part", 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on with --resume" in out
    assert max(steps(tmp_path, "part")) < 40
    other = train(tmp_path, "--resume --nproc 1")
    assert other.returncode == 2
    assert "processes 2 -> 1" in other.stderr
    assert "--reshard" in other.stderr
    rest = train(tmp_path, "--resume")
    assert rest.returncode == 0, rest.stderr
    assert steps(tmp_path, "part") == steps(whole[0], "whole")
    valid = [
        rows(f, n)[-1]["summary"]["valid_loss"]
        for f, n in ((tmp_path, "part"), (whole[0], "whole"))
    ]
    assert valid[0] == valid[1]
    finished = train(tmp_path, "--resume")
    assert finished.returncode == 2
    assert "has reached step 40 of 40" in finished.stderr


def test_killed_rank_is_named_and_resume_repeats_its_steps(tmp_path):
    process = start(tmp_path, "--train-iters 400 --save --save-interval 4 --name victim")
    wait_for_step(tmp_path, "victim", 6, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    begin = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode == 1
    assert "rank 1 of 2 (level 0)" in err
    assert "SIGKILL" in err
    assert "mindspeed train --resume" in err
    assert not [rank for rank in ranks if os.path.exists(f"/proc/{rank}")]
    saved = int(
        (tmp_path / "runs/victim/checkpoints/latest_checkpointed_iteration.txt").read_text()
    )
    before = steps(tmp_path, "victim")
    rest = train(tmp_path, f"--resume --train-iters {max(saved + 1, max(before))}")
    assert rest.returncode == 0, rest.stderr
    after = steps(tmp_path, "victim")
    assert {step: after[step] for step in before} == before


def test_stopped_rank_is_named_within_the_timeout(tmp_path):
    process = start(tmp_path, "--train-iters 40000 --name stuck --timeout 20")
    wait_for_step(tmp_path, "stuck", 2, process)
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 (level 0)" in err
    assert "did not answer in time" in err
    assert not [rank for rank in ranks if os.path.exists(f"/proc/{rank}")]


def test_ranks_end_with_the_launching_process(tmp_path):
    process = start(tmp_path, "--train-iters 40000 --name orphan")
    wait_for_step(tmp_path, "orphan", 2, process)
    ranks = ranks_of(process.pid)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{rank}") for rank in ranks):
        assert time.monotonic() < deadline, "ranks outlive the launching process"
        time.sleep(0.1)


def test_second_interrupt_stops_at_once(tmp_path):
    process = start(tmp_path, "--train-iters 40000 --seq-length 256 --name twice")
    wait_for_step(tmp_path, "twice", 2, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_tensor_pipeline_and_sequence_parallel_reach_the_same_losses(whole, tmp_path):
    done = train(
        tmp_path,
        "--nproc 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--sequence-parallel --train-iters 40 --name four",
    )
    assert done.returncode == 0, done.stderr
    two, four = steps(whole[0], "whole"), steps(tmp_path, "four")
    assert set(two) == set(four)
    for step in two:
        # The gradient norm follows the loss, but small sums in another order show in it first.
        assert four[step][0] == pytest.approx(two[step][0], rel=1e-4)


def test_levels_compared_in_turns(tmp_path):
    (tmp_path / "own.txt").write_text("\n\n".join(f"line {i} of text " * 50 for i in range(90)))
    done = train(tmp_path, "--compare-levels --data own.txt --train-iters 7 --name both", level=1)
    assert done.returncode == 0, done.stderr
    assert "from own.txt" in done.stdout
    records = rows(tmp_path, "both")
    order = [r["level"] for r in records if "step" in r]
    assert order == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3 + [0, 1]
    curves = [[r["loss"] for r in records if "step" in r and r["level"] == n] for n in (0, 1)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    summaries = {r["level"]: r["summary"] for r in records if "summary" in r}
    assert set(summaries) == {0, 1}
    measured = [summaries[level]["measured"] for level in (0, 1)]
    assert measured[1]["saved_bytes"] < measured[0]["saved_bytes"]
    assert measured[0]["model_flops"] == measured[1]["model_flops"] > 0
    assert measured[0]["sent_bytes"] == measured[1]["sent_bytes"] > 0
    assert summaries[0]["speed_up"] is None
    assert summaries[1]["speed_up"] > 0
    assert "times as many steps" in done.stdout
