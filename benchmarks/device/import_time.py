"""What the import hook costs when Megatron is imported: pairs of fresh interpreters.

    python benchmarks/device/import_time.py [--pairs 7] [--out FILE]

Correctness first: both interpreters must load the same Megatron modules, one of them rewritten.
Then CPU seconds (user + system) of importing megatron.core's training modules, without the hook
and with its cache warm. One pair after the other, medians.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

CODE = """
import json, os, sys
import torch
if sys.argv[1] != "plain":
    import mindspeed.device
    mindspeed.device.install("cpu")
before = os.times()
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer, megatron.core.distributed, megatron.core.pipeline_parallel
import megatron.core.dist_checkpointing
after = os.times()
names = sorted(n for n in sys.modules if n.startswith("megatron."))
rewritten = sum("_mindspeed_device" in vars(sys.modules[n]) for n in names)
seconds = after.user + after.system - before.user - before.system
print(json.dumps({"seconds": seconds, "modules": names, "rewritten": rewritten}))
"""


def measure(kind):
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE, kind], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def check(plain, warm):
    if plain["modules"] != warm["modules"] or plain["rewritten"] or not warm["rewritten"]:
        raise SystemExit("the two interpreters did not load the same modules")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    check(measure("plain"), measure("warm"))  # and fills the caches
    runs = [
        {kind: measure(kind)["seconds"] for kind in ("plain", "warm")} for _ in range(args.pairs)
    ]
    extra = [run["warm"] - run["plain"] for run in runs]
    result = {
        "megatron-core": importlib.metadata.version("megatron-core"),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "pairs": args.pairs,
        "plain_cpu_s": round(statistics.median(run["plain"] for run in runs), 3),
        "warm_cpu_s": round(statistics.median(run["warm"] for run in runs), 3),
        "extra_cpu_s": round(statistics.median(extra), 3),
        "warm_to_plain": round(statistics.median(r["warm"] / r["plain"] for r in runs), 3),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
