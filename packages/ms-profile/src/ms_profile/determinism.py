"""Equal runs give equal numbers: everything that has to be set for it, on any device.

    with deterministic(seed=1234) as record:
        torch.distributed.init_process_group("hccl")
        train()
    record.operators     # what torch has no deterministic version of, if anything

On exit every setting is as it was before, random states included if a seed was given.
"""

from __future__ import annotations

import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TextIO

import torch
import torch.distributed as dist

__all__ = ["ENVIRONMENT", "Determinism", "deterministic"]

# What the libraries below torch read when they start or make a group.
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "CLOSE_MATMUL_K_SHIFT": "1",  # CANN: products are summed in one order
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch asks for it on CUDA
        "HCCL_DETERMINISTIC": "true",  # HCCL reduces in one order
        "NCCL_ALGO": "Ring",  # NCCL chooses by timing otherwise
    }
)
# Values of a user that serve as well.
_ALSO_GOOD: dict[str, Callable[[str], bool]] = {
    "CUBLAS_WORKSPACE_CONFIG": lambda text: text in (":4096:8", ":16:8"),
    "HCCL_DETERMINISTIC": lambda text: text.lower() in ("true", "strict"),
    "NCCL_ALGO": bool,  # one that is named is not chosen by timing
}
_COMPLAINT = re.compile(r"(\S+) does not have a deterministic implementation")


@dataclass(frozen=True)
class Determinism:
    """What a `deterministic` context has set, and what it has met.

    Attributes:
        seed: the seed that was set, or None.
        variables: environment variables that were changed, with their values.
        operators: operators without a deterministic version that ran, each once, in order.
    """

    seed: int | None
    variables: Mapping[str, str]
    _operators: dict[str, None] = field(default_factory=dict, repr=False)

    @property
    def operators(self) -> tuple[str, ...]:
        """Operators without a deterministic version that ran, each once, in order."""
        return tuple(self._operators)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, to be kept with a run or a checkpoint."""
        return {
            "kind": "determinism",
            "version": 1,
            "seed": self.seed,
            "variables": dict(self.variables),
            "operators": list(self.operators),
        }


@contextmanager
def deterministic(
    seed: int | None = None, *, unable: Literal["error", "report"] = "error"
) -> Iterator[Determinism]:
    """Inside, one program run twice on one machine computes the same bits.

    Sets `torch.use_deterministic_algorithms`, cuDNN's flags, the variables of `ENVIRONMENT` that
    have no serving value yet and, if given, the seeds of Python, NumPy (where it is loaded) and
    torch on every device. Python's hash seed is fixed when the interpreter starts and cannot be set
    from inside: PYTHONHASHSEED belongs before the command.

    Args:
        seed: for the random generators; None leaves them alone.
        unable: what an operator without a deterministic version does. "error": torch raises and
            names it. "report": it runs, and its name is in `operators`.

    Yields:
        The record.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: a process group exists already, so that its library has read its variables,
            and one of them would have to change.
    """
    if unable not in ("error", "report"):
        raise ValueError(f"unable must be 'error' or 'report', got {unable!r}")
    if seed is not None and (isinstance(seed, bool) or not 0 <= seed < 2**32):
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    missing = {name: value for name, value in ENVIRONMENT.items() if not _serves(name)}
    if missing and dist.is_available() and dist.is_initialized():
        wanted = " ".join(f"{name}={value}" for name, value in missing.items())
        raise RuntimeError(
            "deterministic() comes too late: a process group exists, and its library read its"
            f" variables then. Enter it before init_process_group, or start with {wanted}"
        )
    record = Determinism(seed, MappingProxyType(missing))
    with (
        _environment(missing),
        _torch_flags(warn_only=unable == "report"),
        _random_states(seed),
        _collected(record._operators, unable == "report"),
    ):
        yield record


def _serves(name: str) -> bool:
    given = os.environ.get(name, "")
    also = _ALSO_GOOD.get(name)
    return given == ENVIRONMENT[name] or (also is not None and also(given))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _torch_flags(warn_only: bool) -> Iterator[None]:
    mode = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=only_warned)
        cudnn.deterministic, cudnn.benchmark = flags


@contextmanager
def _random_states(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    restores = [*_saved_states()]
    random.seed(seed)
    torch.manual_seed(seed)  # every device that torch knows
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _saved_states() -> Iterator[Callable[[], object]]:
    state = random.getstate()
    yield lambda: random.setstate(state)
    cpu = torch.get_rng_state()
    yield lambda: torch.set_rng_state(cpu)
    if (numpy := sys.modules.get("numpy")) is not None:
        theirs = numpy.random.get_state()
        yield lambda: numpy.random.set_state(theirs)
    if torch.accelerator.is_available():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        states = module.get_rng_state_all()
        yield lambda: module.set_rng_state_all(states)


@contextmanager
def _collected(operators: dict[str, None], active: bool) -> Iterator[None]:
    """Takes torch's complaints about operators out of the warnings; others pass as before."""
    if not active:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{_COMPLAINT.pattern[6:]}")
        show = warnings.showwarning

        def showwarning(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            found = _COMPLAINT.match(str(message))
            if found is None:
                show(message, category, filename, lineno, file, line)
            else:
                operators.setdefault(found.group(1))

        # The documented place for it; catch_warnings puts back what was there.
        warnings.showwarning = showwarning
        yield
