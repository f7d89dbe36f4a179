"""A training step of a small GPT at level 1 against level 0, in one interleaved run.

Each level runs in a process of its own; the parent lets one take a step, then the other. The
losses of all steps must agree within rounding before any ratio is printed. `ratio` is wall time,
`cpu_ratio` processor time of the process, which other work on the machine hardly disturbs (use
`--threads 1` then: waiting threads spin).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "micro_batch_size": 1,
    "lr": 1e-4,
}
MODELS = {
    "gpt": {},
    "llama": {
        "normalization": "RMSNorm",
        "swiglu": True,
        "bias_activation_fusion": True,
        "add_bias_linear": False,
        "num_query_groups": 2,
        "ffn_hidden_size": 688,
    },
}
# Losses of the first steps differ by rounding, later ones by what Adam makes of it.
ROUNDING = {"fp32": 1e-4, "bf16": 2e-2}


def worker(level, options):
    import torch

    from mindspeed.train.config import TrainConfig
    from mindspeed.train.trainer import Trainer

    torch.set_num_threads(options.pop("threads"))
    config = TrainConfig.of(**options, global_batch_size=1, optimization_level=level)
    with Trainer(config) as trainer:
        measured = trainer.train_step(measure=True).measured
        print(json.dumps({"saved_bytes": measured.saved_bytes}), flush=True)
        for _ in sys.stdin:
            cpu = time.process_time()
            result = trainer.train_step()
            cpu = time.process_time() - cpu
            row = {"loss": result.loss, "s": result.step_time_s, "cpu": cpu}
            print(json.dumps(row), flush=True)


def start(level, options):
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--worker",
        str(level),
        json.dumps(options),
    ]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def answer(process):
    """Return the next JSON line; libraries may print other lines between."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("a level's process ended early")


def take_step(process):
    process.stdin.write("step\n")
    return answer(process)


def compare(name, model, dtype, length, steps, threads):
    options = {**MODEL, **model, "seq_length": length, "bf16": dtype == "bf16", "threads": threads}
    levels = [start(level, options) for level in (0, 1)]
    try:
        saved = [answer(process)["saved_bytes"] for process in levels]
        rows = [[take_step(process) for process in levels] for _ in range(steps)]
    finally:
        for process in levels:
            process.stdin.close()
            process.wait(60)
    for zero, one in rows:
        gap = abs(one["loss"] - zero["loss"])
        assert gap <= ROUNDING[dtype] * abs(zero["loss"]), f"{name} {dtype}: losses differ by {gap}"
    timed = rows[2:]
    return {
        "model": name,
        "dtype": dtype,
        "seq_length": length,
        "level0_ms": round(statistics.median(zero["s"] for zero, _ in timed) * 1e3, 1),
        "level1_ms": round(statistics.median(one["s"] for _, one in timed) * 1e3, 1),
        "ratio": round(statistics.median(zero["s"] / one["s"] for zero, one in timed), 3),
        "cpu_ratio": round(statistics.median(zero["cpu"] / one["cpu"] for zero, one in timed), 3),
        "saved_bytes": saved,
        "largest_loss_gap": max(abs(one["loss"] - zero["loss"]) for zero, one in rows),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-length", type=int, nargs="+", default=[1024])
    parser.add_argument("--steps", type=int, default=14, help="the first two are not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(int(options.worker[0]), json.loads(options.worker[1]))
        return
    rows = []
    for length in options.seq_length:
        for name, model in MODELS.items():
            for dtype in ("fp32", "bf16"):
                rows.append(compare(name, model, dtype, length, options.steps, options.threads))
                print(json.dumps(rows[-1]), flush=True)
    if not options.no_write:
        from driver import environment, write

        content = {**environment(), "threads": options.threads}
        write("level1_step", {"environment": content, "model": MODEL, "rows": rows})


if __name__ == "__main__":
    main()
