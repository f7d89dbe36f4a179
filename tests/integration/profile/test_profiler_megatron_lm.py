"""The profiling flags and `--npu-deterministic` in Megatron-LM's own loop.

Needs what tests/integration/test_megatron_lm.py needs.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(os.environ.get("MEGATRON_LM_PATH", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("MEGATRON_LM_PATH"),
    reason="MEGATRON_LM_PATH does not name a Megatron-LM checkout (tag core_v0.16.1)",
)

MODEL = """
    --num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 5
    --lr 1e-3 --min-lr 1e-4 --tokenizer-type NullTokenizer --vocab-size 255 --mock-data
    --attention-dropout 0.1 --hidden-dropout 0.1 --eval-iters 0 --eval-interval 1000
    --log-interval 1 --use-cpu-initialization --tensor-model-parallel-size 2
    --optimization-level 0
"""
RUN = "import sys; from mindspeed.launch import main; sys.exit(main(sys.argv[1:]))"


def train(folder, flags):
    """Run pretrain_gpt.py on two ranks; the process that has ended."""
    command = [sys.executable, "-c", RUN, "--standalone", "--nproc-per-node=2"]
    environment = {name: value for name, value in os.environ.items() if name != "NCCL_ALGO"}
    environment |= {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "MS_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKOUT),
    }
    script = str(CHECKOUT / "pretrain_gpt.py")
    return subprocess.run(
        [*command, script, *MODEL.split(), *flags.split()],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=environment,
    )


def losses(done):
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-9000:]
    return re.findall(r"lm loss: (\S+)", done.stdout)


def test_it_is_traced_and_not_changed(tmp_path):
    window = "--profile-step-start 3 --profile-step-end 5"
    flags = f"--profile {window} --profile-level level1 --profile-ranks 1 --profile-save-path out"
    plain = train(tmp_path, "")
    traced = train(tmp_path, f"{flags} --npu-deterministic")
    assert losses(traced) == losses(plain)
    assert len(losses(plain)) == 5
    names = ["rank1_steps3-5.pt.trace.json", "rank1_steps3-5.summary.json"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    text = (tmp_path / "out" / names[0]).read_text()
    rows = [event["name"] for event in json.loads(text)["traceEvents"]]
    assert [r for r in rows if r.startswith("Prof")] == ["ProfilerStep#3", "ProfilerStep#4"]
    assert any(row.endswith("[TENSOR_MODEL_PARALLEL_GROUP]") for row in rows)
    assert "cudaProfiler" not in traced.stderr


def test_a_flag_that_cannot_act_ends_it_before_training(tmp_path):
    done = train(tmp_path, "--profile --profile-with-memory")
    assert done.returncode != 0
    assert "Give --profile-with-cpu as well" in done.stderr
    assert "lm loss" not in done.stdout
