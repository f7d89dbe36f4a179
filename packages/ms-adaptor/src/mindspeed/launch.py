"""`mindspeed run`: torchrun for a Megatron script that does not import mindspeed.

    mindspeed run --nproc-per-node 2 pretrain_gpt.py --num-layers 4 ...

All options before the script are torchrun's. Every process imports `mindspeed.megatron_adaptor`
before the script's first line, and so does every process that it spawns; the script itself is
run as `__main__` with its own arguments, as Python would.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Sequence

from mindspeed.processes import ADAPTOR, propagate

SUMMARY = "Start a Megatron script under the device layer and level 0; the options are torchrun's."
AS_MODULE = "--module"
AS_FILE = "--file"


def main(argv: Sequence[str]) -> int:
    """Start the processes and wait for them.

    Args:
        argv: What stands behind `mindspeed run`: torchrun's options, the script, its arguments.

    Returns:
        Exit status: 0, or 1 when a process failed (torchrun has printed which and why) or the
        command line is wrong.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = torchrun.get_args_parser()
    parser.prog, parser.description = "mindspeed run", SUMMARY
    args = parser.parse_args(list(argv))
    if args.no_python or args.run_path:
        option = "--no-python" if args.no_python else "--run-path"
        print(
            f"mindspeed run: {option} is not supported, because the device layer must be in "
            "place before a Python script starts; leave it out",
            file=sys.stderr,
        )
        return 1
    if not args.module and not os.path.isfile(args.training_script):
        print(
            f"mindspeed run: no file {args.training_script!r}; name a script, or -m and a module",
            file=sys.stderr,
        )
        return 1
    kind = AS_MODULE if args.module else AS_FILE
    args.training_script_args = [kind, args.training_script, *args.training_script_args]
    args.module, args.training_script = True, __name__
    try:
        torchrun.run(args)
    except ChildFailedError as failure:
        print(f"mindspeed run: {failure}", file=sys.stderr)
        return 1
    return 0


def run_script(kind: str, script: str, arguments: Sequence[str]) -> None:
    """Import the adaptor, then run a script or module as `__main__` in this process.

    Args:
        kind: `AS_FILE` or `AS_MODULE`.
        script: Path of the file, or name of the module.
        arguments: Its command line.
    """
    importlib.import_module(ADAPTOR)
    propagate()
    sys.argv[:] = [script, *arguments]
    if kind == AS_MODULE:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # what Python does for a script
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run_script(sys.argv[1], sys.argv[2], sys.argv[3:])
