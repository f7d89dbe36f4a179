"""Run the shared tests on this machine and print what came out as JSON.

    python -m ms_ops.selftest --backend npu

Each operator's samples go through the backend and are compared with the fp64 reference on the CPU:
outputs, all gradients, fakes, repetition. For each dtype the report has the largest error in
roundings, and for the largest sample the time of a call. `--backend npu --emulated` runs the NPU
backends on CPU tensors, on our emulation of torch_npu, and `--backend triton` with
TRITON_INTERPRET=1 in the environment runs kernels in Triton's interpreter: everything but the times
means something there. On an NPU the report also holds answers to what torch_npu's documents leave
open.

Exit status: 0 when all is right, 1 when something failed, 2 when the backend cannot run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import Tensor

import ms_ops

from . import registry, testing, triton
from .testing.npu import emulated_npu
from .testing.npu.questions import answers

DEVICES = {"npu": "npu", "triton": "cuda"}
REPEATS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    reason = _missing(options)
    if reason:
        need = f"got {options.backend!r}, need another here: {reason}"
        print(f"selftest: --backend: {need}", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        if options.emulated:
            stack.enter_context(emulated_npu())
        report = run(options.backend, options.device, options.op, options.emulated)
    json.dump(report, sys.stdout, indent=2)
    print()
    return 1 if report["failures"] else 0


def run(
    backend: str, device: str, ops: Sequence[str] | None = None, emulated: bool = False
) -> dict[str, Any]:
    """Test operators on a backend and return the report.

    Args:
        backend: which backend.
        device: where the samples live.
        ops: names of operators, None for all that the backend has.
        emulated: whether torch_npu is our emulation.
    """
    names = [op for op in ops or testing.OPERATORS if backend in registry.backends(op)]
    results = {op: _operator(op, backend, device) for op in names}
    report: dict[str, Any] = {
        "kind": "selftest",
        "version": 1,
        "ms_ops": ms_ops.__version__,
        "torch": torch.__version__,
        "backend": backend,
        "device": device,
        "device_name": _device_name(device),
        "emulated": emulated,
        "operators": results,
        "failures": sum(len(result["failures"]) for result in results.values()),
    }
    if backend == "npu":
        module = sys.modules.get("torch_npu")
        report["torch_npu"] = getattr(module, "__version__", None)
        report["answers"] = answers(device)
    return report


def _operator(op: str, backend: str, device: str) -> dict[str, Any]:
    served, declined = 0, defaultdict[str, int](int)
    failures: list[str] = []
    errors: dict[str, float] = {}
    largest: testing.Sample | None = None
    for dtype in testing.DTYPES:
        for sample in testing.OPERATORS[op].samples(dtype, device):
            reason = testing.declines(op, sample, backend)
            if reason is not None:
                declined[reason] += 1
                continue
            served += 1
            name = str(dtype).removeprefix("torch.")
            try:
                worst = testing.check_values(op, sample, backend)
                errors[name] = max(errors.get(name, 0.0), round(worst, 3))
                testing.check_fake(op, sample, backend)
                testing.check_deterministic(op, sample, backend)
            except Exception as error:  # whatever a kernel raises belongs in the report
                failures.append(f"{sample.name} {name}: {type(error).__name__}: {error}"[:500])
            if dtype is torch.float32 and (largest is None or _size(sample) > _size(largest)):
                largest = sample
    return {
        "served": served,
        "declined": dict(declined),
        "roundings": errors,
        "failures": failures,
        "timing": None if largest is None else _timing(op, largest, backend, device),
    }


def _timing(op: str, sample: testing.Sample, backend: str, device: str) -> dict[str, Any]:
    """Return the median seconds of a forward call of a sample, and of the reference's."""
    function = testing.OPERATORS[op].function
    mutated = testing.OPERATORS[op].mutates

    def call() -> None:
        args = [a.clone() if i in mutated else a for i, a in enumerate(sample.args)]
        function(*args, **sample.kwargs)

    seconds = {}
    for name in (backend, "reference"):
        try:
            with ms_ops.backend(**{op: name}), torch.no_grad():
                seconds[name] = _median(call, device)
        except Exception as error:
            seconds[name] = f"{type(error).__name__}: {error}"[:200]
    return {"sample": sample.name, "forward_seconds": seconds}


def _median(call: Callable[[], None], device: str) -> Any:
    taken = []
    for _ in range(REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def _wait(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


def _size(sample: testing.Sample) -> int:
    return sum(a.numel() for a in sample.args if isinstance(a, Tensor))


def _device_name(device: str) -> str:
    return "cpu" if device == "cpu" else str(getattr(torch, device).get_device_name(0))


def _missing(options: argparse.Namespace) -> str:
    """Return why a backend cannot run here, and choose the device when none is given."""
    if options.emulated and options.backend != "npu":
        return "only npu has an emulation"
    if options.device is None:
        wanted = DEVICES.get(options.backend, "cuda")
        there = wanted == "cuda" and torch.cuda.is_available()
        options.device = "cuda" if there else "cpu"
        if options.backend == "npu" and not options.emulated:
            options.device = "npu"
    if options.device == "npu" and importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed (--emulated runs without it)"
    if options.device == "npu":
        importlib.import_module("torch_npu")
        if not getattr(torch, options.device).is_available():
            return "there is no NPU"
    if not any(options.backend in registry.backends(op) for op in testing.OPERATORS):
        return "no operator has it"
    if options.backend == "triton":
        facts = registry.Facts(options.device, torch.float32)
        return triton.available() or triton.declines(facts) or ""
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ms_ops.selftest")
    parser.add_argument("--backend", default="portable", help="npu, triton, portable or reference")
    parser.add_argument("--device", help="npu, cuda or cpu; the backend's own by default")
    known = sorted(testing.OPERATORS)
    parser.add_argument("--op", action="append", choices=known, help="only this; may be repeated")
    emulated = "with --backend npu: our emulation of torch_npu, on the CPU"
    parser.add_argument("--emulated", action="store_true", help=emulated)
    return parser


if __name__ == "__main__":
    sys.exit(main())
