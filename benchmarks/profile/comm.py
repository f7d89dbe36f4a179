"""What CommMeter costs: a training step of two ranks with it against the same step without it.

The model is that of `mindspeed train` without flags, divided in two ways: data parallel with a
sharded optimizer, as by default (few, large communications), and tensor with sequence parallel
(many small ones). Before any time is taken, what the meter counted must equal the closed form. The
contenders take steps in turns; a ratio is the median over rounds of processor time of rank 0 with
the meter by that without, which other work on the machine disturbs less than wall time; `wall` is
the same of wall time. `off again` says how far a step is from itself.

`--matrix FILE.svg` draws what four ranks of a small model send each other instead.
"""

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ms_profile
from ms_profile import CommMeter, tap

HERE = Path(__file__).parent
RANKS = 2
DIVISIONS = {
    "data parallel, sharded optimizer": {},
    "tensor and sequence parallel": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "use_distributed_optimizer": False,
    },
}
TP, DP = "TENSOR_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP_WITH_CP"


class Operators(tap.Meter):
    """Counts what is intercepted."""

    def opened(self):
        self.number = 0

    def before(self, func, args, kwargs):
        self.number += 1


def gate(trainer, division):
    """The count is right, or nothing is timed; returns it."""
    with Operators() as operators, CommMeter() as meter:
        trainer.train_step()
    if division == "data parallel, sharded optimizer":
        # Each parameter begins at a multiple of 64 elements, all end at one of 128.
        held = sum(-(-p.numel() // 64) * 64 for p in trainer.chunks[0].parameters())
        scattered = meter.total(group=DP, op="reduce_scatter", of="bytes")
        assert scattered == 4 * -(-held // 128) * 128, f"{scattered} for {held} elements"
    else:
        model, batch = trainer.config.model, trainer.config.batch
        linears = 2 * model.num_layers + 1
        activation = 4 * batch.global_batch_size * model.seq_length * model.hidden_size
        gathers = meter.total(group=TP, op="all_gather", of="bytes")
        assert gathers == activation * 3 * linears, f"{gathers} is not {activation * 3 * linears}"
    return {
        "operators": operators.number,
        "calls": len(meter.calls),
        "sent_bytes": meter.total(),
    }


def contenders():
    return {
        "off": contextlib.nullcontext,
        "off again": contextlib.nullcontext,
        "CommMeter": CommMeter,
    }


def measure(rank, store, results, make_contenders, rounds):
    """One rank: every division in turn; rank 0 writes the rows."""
    from mindspeed.train import TrainConfig, Trainer
    from mindspeed.train.args import DEFAULT_JOB

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    rows = []
    for division, options in DIVISIONS.items():
        job = {**DEFAULT_JOB, **options, "optimization_level": 0}
        with Trainer(TrainConfig.of(**job)) as trainer:
            trainer.run(2)
            checked = gate(trainer, division)
            times = compete(trainer, make_contenders(), rounds)
        rows.append({"division": division, **checked, **ratios(times)})
    if rank == 0:
        Path(results).write_text(json.dumps(rows))
    dist.destroy_process_group()


def compete(trainer, makers, rounds):
    """Processor and wall seconds of a step for each contender and round, in turns."""
    times = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            dist.barrier()
            with make():
                wall, cpu = time.perf_counter(), time.process_time()
                trainer.train_step()
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def ratios(times):
    def against_off(column):
        return {
            name: round(
                statistics.median(
                    a[column] / b[column] for a, b in zip(steps, times["off"], strict=True)
                ),
                3,
            )
            for name, steps in times.items()
            if name != "off"
        }

    step = round(statistics.median(cpu for cpu, _ in times["off"]) * 1e3, 1)
    return {"step_ms": step, "against_off": against_off(0), "wall": against_off(1)}


def arguments(summary):
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser


def main(name, make_contenders, options):
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/rows.json"
        mp.spawn(
            measure, (f"{folder}/store", results, make_contenders, options.rounds), nprocs=RANKS
        )
        rows = json.loads(Path(results).read_text())
    for row in rows:
        print(json.dumps(row))
    if not options.no_write:
        environment = {
            "ms_profile": ms_profile.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "ranks": RANKS,
            "backend": "gloo",
            "threads": 1,
            "clock": "process_time",
        }
        content = {"environment": environment, "rounds": options.rounds, "rows": rows}
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def record(rank, store, folder):
    """A step of four ranks, two by two: tensor and sequence parallel, sharded data parallel."""
    from mindspeed.train import TrainConfig, Trainer

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    job = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64}
    split = {**DIVISIONS["tensor and sequence parallel"], "use_distributed_optimizer": True}
    config = TrainConfig.of(**job, **split, global_batch_size=4)
    with Trainer(config) as trainer, CommMeter() as meter:
        trainer.train_step()
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(meter.as_dict()))
    dist.destroy_process_group()


def draw(path):
    from ms_profile.report.pictures import communication_matrix

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(record, (f"{folder}/store", folder), nprocs=4)
        files = sorted(Path(folder).glob("rank*.json"))
        communication_matrix([json.loads(file.read_text()) for file in files], path)


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--matrix", metavar="FILE.svg", help="draw a matrix instead")
    options = parser.parse_args()
    if options.matrix:
        draw(options.matrix)
    else:
        main("comm", contenders, options)
