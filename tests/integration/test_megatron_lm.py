"""Megatron-LM's own pretrain_gpt.py on the CPU, by one import line or by `mindspeed run`.

Needs a checkout of Megatron-LM at tag core_v0.16.1, named by MEGATRON_LM_PATH, and the packages
that its `megatron.training` imports: pydantic, six, regex, pyyaml, einops.

Every run of a model starts from the weights of one checkpoint, so that the loss curves of all
parallel layouts can be compared with that of one process.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.oracles import assert_losses_close

CHECKOUT = Path(os.environ.get("MEGATRON_LM_PATH", ""))

pytestmark = pytest.mark.skipif(
    not os.environ.get("MEGATRON_LM_PATH"),
    reason="MEGATRON_LM_PATH does not name a Megatron-LM checkout (tag core_v0.16.1)",
)

ITERATIONS = 10
PRINTED = 1e-6  # the log shows six decimals
EARLY, LATE = 2 * PRINTED + PRINTED, 1e-4  # fp32: the first three steps, all steps

DENSE = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-decay-iters 10
    --tokenizer-type NullTokenizer --vocab-size 255 --attention-dropout 0 --hidden-dropout 0
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --use-cpu-initialization
    --save-interval 1000 --optimization-level 0
"""
MOE = f"""
    {DENSE} --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
    --disable-bias-linear
"""
MODELS = {"dense": DENSE, "moe": MOE}
MOCK = "--mock-data"


@dataclass(frozen=True)
class Case:
    """One layout: how many processes, which flags, and how near to one process it must be."""

    name: str
    processes: int
    flags: str = ""
    model: str = "dense"
    exact: bool = False


CASES = (
    Case("dp2", 2),
    Case("tp2", 2, "--tensor-model-parallel-size 2"),
    Case("tp2-sp", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    Case("pp2", 2, "--pipeline-model-parallel-size 2"),
    Case("vpp", 2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    Case(
        "dp2-distributed-optimizer-overlap",
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    Case(
        "recompute-full",
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--op-cal-tflops",
        exact=True,
    ),
    Case("recompute-selective", 1, "--recompute-granularity selective", exact=True),
    Case("ep2-alltoall", 2, "--expert-model-parallel-size 2", "moe"),
    Case(
        "ep2-allgather",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather",
        "moe",
    ),
)

RUN = "import sys; from mindspeed.launch import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Runner:
    """Starts pretrain_gpt.py; `script` is the checkout's own or an edited copy."""

    folder: Path
    script: Path
    edited: bool = False

    def losses(self, processes: int, *flags: str) -> list[float]:
        """Train and return the losses that Megatron logged; `flags` are words between spaces."""
        arguments = " ".join(flags).split()
        torchrun = ["-m", "torch.distributed.run"] if self.edited else ["-c", RUN]
        command = [sys.executable, *torchrun, "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*command, str(self.script), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.folder,
            env={
                **os.environ,
                "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asserts it for TP and SP
                "MS_DEVICE": "cpu",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(CHECKOUT),
            },
        )
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"[-9000:]
        losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)]
        if "--op-cal-tflops" in arguments:
            check_rates(done.stdout, len(losses))
        return losses


def check_rates(output: str, lines: int) -> None:
    """Every line of the log is followed by rates, which are those of DENSE, fully recomputed."""
    pattern = r"device: (\S+) by Megatron's formula, (\S+) actual, (\S+) actual with recompute"
    rates = [tuple(map(float, found)) for found in re.findall(pattern, output)]
    assert len(rates) == lines
    core, layers, head = 4 * 4 * 64 * 64, 4 * 24 * 64 * 64, 2 * 64 * 256  # forward, a token
    forward = core + layers + head
    for formula, actual, launched in rates:
        assert actual / formula == pytest.approx(forward / (forward - core / 2), rel=2e-3)
        assert launched / actual == pytest.approx(1 + (core + layers) / (3 * forward), rel=2e-3)


@pytest.fixture(scope="module")
def unedited(tmp_path_factory) -> Runner:
    return Runner(tmp_path_factory.mktemp("unedited"), CHECKOUT / "pretrain_gpt.py")


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> Runner:
    """A copy of the script with our one line in front, run by plain torchrun."""
    folder = tmp_path_factory.mktemp("edited")
    script = folder / "pretrain_gpt.py"
    text = (CHECKOUT / "pretrain_gpt.py").read_text()
    script.write_text("import mindspeed.megatron_adaptor\n" + text)
    return Runner(folder, script, edited=True)


@pytest.fixture(scope="module")
def start(unedited) -> Callable[[str], Path]:
    """Gives a checkpoint of a model, whose weights every run of it starts from."""

    @functools.cache
    def checkpoint(model: str) -> Path:
        folder = unedited.folder / f"start-{model}"
        save = f"--save {folder} --no-save-optim --no-save-rng --train-iters 1"
        assert len(unedited.losses(1, MODELS[model], MOCK, save)) == 1
        return folder

    return checkpoint


def from_start(folder: Path) -> str:
    return f"--load {folder} --finetune --no-load-optim --no-load-rng --train-iters {ITERATIONS}"


@pytest.fixture(scope="module")
def one_process(unedited, start) -> Callable[[str], list[float]]:
    """Gives the losses of one process: what every layout is compared with."""

    @functools.cache
    def losses(model: str) -> list[float]:
        return unedited.losses(1, MODELS[model], MOCK, from_start(start(model)))

    return losses


def compare(case: Case, losses: list[float], reference: list[float]) -> None:
    print(f"{case.name}: {losses}\none process: {reference}")
    assert len(losses) == ITERATIONS
    if case.exact:
        assert losses == reference
        return
    assert_losses_close(losses[:3], reference[:3], EARLY, case.name)
    assert_losses_close(losses, reference, LATE, case.name)


@pytest.mark.parametrize("model", MODELS)
def test_one_process_learns(model, one_process):
    losses = one_process(model)
    print(losses)
    assert len(losses) == ITERATIONS
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_layout_equals_one_process(case, unedited, start, one_process):
    flags = f"{MODELS[case.model]} {MOCK} {case.flags}"
    losses = unedited.losses(case.processes, flags, from_start(start(case.model)))
    compare(case, losses, one_process(case.model))


@pytest.mark.parametrize("case", [Case("base", 1), CASES[2]], ids=lambda case: case.name)
def test_default_level_rounds_differently_and_no_more(case, unedited, start, one_process):
    level_0 = f"{DENSE} {MOCK} {case.flags}"
    default = level_0.replace("--optimization-level 0", "")
    losses = unedited.losses(case.processes, default, from_start(start("dense")))
    compare(case, losses, one_process("dense"))


@pytest.mark.parametrize("case", [Case("base", 1, exact=True), CASES[2]], ids=lambda c: c.name)
def test_one_import_line_does_the_same(case, edited, start, one_process):
    flags = f"{DENSE} {MOCK} {case.flags}"
    losses = edited.losses(case.processes, flags, from_start(start("dense")))
    compare(case, losses, one_process("dense"))


@pytest.mark.parametrize(
    ("processes", "flags"),
    [(1, ""), (2, "--use-distributed-optimizer"), (2, "--tensor-model-parallel-size 2")],
    ids=["one", "distributed-optimizer", "tp2"],
)
def test_save_and_load_go_on_where_the_run_stopped(processes, flags, unedited, start, tmp_path):
    common = f"{DENSE} {MOCK} {flags}"
    saved = tmp_path / "saved"
    begin = from_start(start("dense"))
    through = unedited.losses(processes, common, begin)
    first = unedited.losses(processes, common, begin, f"--save {saved} --exit-interval 5")
    second = unedited.losses(processes, common, f"--load {saved} --train-iters {ITERATIONS}")
    assert first == through[:5]
    # The second line after a start shows the mean of two steps; Megatron resets its sum then.
    through[6] = (through[5] + through[6]) / 2
    assert second[:1] + second[2:] == through[5:6] + through[7:]
    assert abs(second[1] - through[6]) <= PRINTED


INDEX = """
import sys
from pathlib import Path
import mindspeed.megatron_adaptor
from mindspeed.train.config import TrainConfig
from mindspeed.train.data import write_indexed
from mindspeed.train.text import configured_corpus
corpus, tokenizer = configured_corpus(TrainConfig.of(seq_length=64))
print(write_indexed(corpus, tokenizer, Path(sys.argv[1])))
"""


def test_it_trains_on_the_indexed_data_of_the_training_command(unedited, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INDEX, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MS_DEVICE": "cpu", "PYTHONPATH": str(CHECKOUT)},
    )
    assert done.returncode == 0, done.stderr
    data = Path(done.stdout.splitlines()[-1]) / "train"
    # Bytes and the end of a document: 257 tokens.
    model = DENSE.replace("--vocab-size 255", "--vocab-size 256")
    flags = f"{model} --data-path {data} --split 1,0,0 --train-iters {ITERATIONS}"
    one, two = unedited.losses(1, flags), unedited.losses(2, flags)
    print(one)
    assert len(one) == ITERATIONS
    assert one[-1] < one[0] - 0.5
    assert_losses_close(two, one, LATE, "dp2")
