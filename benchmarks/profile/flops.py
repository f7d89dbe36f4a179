"""What FlopMeter costs: a training step with it against the same step without it.

The model is that of `mindspeed train` without flags, on one rank, and a tiny one as the worst case,
whose operators are too short to hide anything. Before any time is taken, the counts must equal the
closed form. Steps with a meter and without take turns; a ratio is the median over rounds of the
step time with it by that without just before. Processor time is measured, which other work hardly
disturbs.

`passed over` is a step that `sample_every` does not count; `sample_every=50` is what 50 steps with
one counted take, computed from the two. `torch` is torch's own FlopCounterMode.
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import ms_profile
from mindspeed.train import TrainConfig, Trainer
from mindspeed.train.args import DEFAULT_JOB
from ms_profile import FlopMeter, Meter

HERE = Path(__file__).parent
TINY = {"num_layers": 4, "hidden_size": 64, "seq_length": 64, "global_batch_size": 4}


def closed_form(config):
    """Forward FLOPs at level 0: every product, whole score matrices."""
    model = config.model
    tokens = config.batch.global_batch_size * model.seq_length
    hidden = model.hidden_size
    projections = 4 * hidden * hidden + 3 * hidden * config.ffn_hidden_size
    scores = 2 * model.seq_length * hidden
    per_layer = 2 * tokens * (projections + scores)
    return model.num_layers * per_layer + 2 * tokens * hidden * config.padded_vocab_size


def gate(trainer):
    """The counts are right, or nothing is timed."""
    with FlopMeter() as meter:
        trainer.train_step()
    forward = closed_form(trainer.config)
    counts = meter.counts
    found = counts.forward, counts.backward, counts.recompute
    assert found == (forward, 2 * forward, 0), f"{found} is not {forward} and twice that"
    with FlopCounterMode(display=False) as torchs:
        trainer.train_step()
    return {"flops": 3 * forward, "flops_by_torch": torchs.get_total_flops()}


class Torchs(FlopCounterMode):
    """Torch's counter without its table."""

    def __init__(self):
        super().__init__(display=False)


def contenders():
    passing = FlopMeter(sample_every=10**9)
    with passing:
        pass  # the one entry that is counted
    return {
        "totals": lambda: FlopMeter(by_module=False),
        "by module": FlopMeter,
        "passed over": lambda: passing,
        "torch": Torchs,
    }


def seconds(trainer, context, steps):
    """Processor seconds of one step."""
    start = time.process_time()
    for _ in range(steps):
        with context:
            trainer.train_step()
    return (time.process_time() - start) / steps


class Operators(Meter):
    """Counts what is dispatched."""

    number = 0

    def after(self, func, args, kwargs, out):
        self.number += 1
        return out


def measure(name, job, rounds, steps):
    with Trainer(TrainConfig.of(**job)) as trainer:
        trainer.run(2)
        checked = gate(trainer)
        with Operators() as meter:
            trainer.train_step()
        operators = meter.number
        makers = contenders()
        pairs = {contender: [] for contender in makers}
        for _ in range(rounds):
            for contender, make in makers.items():
                trainer.train_step()  # what the contender before has left in caches does not count
                off = seconds(trainer, contextlib.nullcontext(), steps)
                pairs[contender].append((seconds(trainer, make(), steps), off))
    ratios = {name: statistics.median(a / b for a, b in pair) for name, pair in pairs.items()}
    ratios["sample_every=50"] = (ratios["by module"] + 49 * ratios["passed over"]) / 50
    return {
        "model": name,
        "step_ms": round(statistics.median(off for _, off in pairs["totals"]) * 1e3, 1),
        "operators": operators,
        **checked,
        "step_time_against_off": {n: round(ratio, 3) for n, ratio in ratios.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = {**DEFAULT_JOB, "use_distributed_optimizer": False, "optimization_level": 0}
    jobs = (("default", base, 1), ("tiny", {**base, **TINY}, 10))
    rows = []
    for name, job, steps in jobs:
        rows.append(measure(name, job, options.rounds, steps))
        print(json.dumps(rows[-1]), flush=True)
    if not options.no_write:
        environment = {
            "ms_profile": ms_profile.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": 1,
            "clock": "process_time",
        }
        content = {"environment": environment, "rounds": options.rounds, "rows": rows}
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / "flops.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
