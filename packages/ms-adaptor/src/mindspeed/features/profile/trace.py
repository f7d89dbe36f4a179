"""`--profile` and the flags beside it: a trace of a window of training steps.

The window counts printed iterations: start 10 and end 12 trace the iterations 10 and 11, in a
resumed run too. Four of the flags are Megatron-LM's as well; here they ask for this profiler, and
Megatron's calls for nsys stay off. With `--use-pytorch-profiler` they mean Megatron-LM's own again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mindspeed.patching.records import Feature, Flag, Patch, Rule

if TYPE_CHECKING:
    from ms_profile.profiler import StepProfiler

_HERE = "mindspeed.features.profile.trace"
_SETTINGS = (
    "profile_level != 'level0' or profile_with_cpu or profile_with_stack or profile_with_memory"
    " or profile_record_shapes or profile_save_path != './profile_dir'"
)
_OURS = "profile and not use_pytorch_profiler"


def _needs_cpu(flag: str, what: str) -> Rule:
    return Rule(
        kind="requires",
        left=flag[2:].replace("-", "_"),
        right="profile_with_cpu",
        text=f"{flag} records {what}, which are operators of the host",
        suggestion="Give --profile-with-cpu as well.",
    )


FEATURE = Feature(
    name="profile",
    level=0,
    doc="Traces a window of training steps, by torch.profiler or torch_npu.profiler.",
    when=f"({_OURS}) or {_SETTINGS}",
    packages=("ms-profile",),
    page="docs/profile/profiler.md",
    # Megatron-LM's own; `mindspeed train` has no parser of Megatron's.
    flags=(
        Flag("--profile", help="Trace some training steps"),
        Flag("--profile-step-start", type="int", default=10, help="First traced iteration"),
        Flag(
            "--profile-step-end",
            type="int",
            default=12,
            help="The iteration after the last traced one",
        ),
    ),
    rules=(
        Rule(
            kind="requires",
            left=_SETTINGS,
            right="profile",
            text="flags that say how to profile are given, but not --profile",
            suggestion="Give --profile, or leave them out.",
        ),
        Rule(
            kind="forbids",
            left="profile and use_pytorch_profiler",
            right=_SETTINGS,
            text="--use-pytorch-profiler asks for Megatron-LM's own profiler, which has no level,"
            " no choice of what it records and no save path",
            suggestion="Leave out --use-pytorch-profiler, or the other flags.",
        ),
        Rule(
            kind="range",
            left="profile_step_start",
            right="profile_step_start >= 0",
            text="--profile-step-start must not be negative",
        ),
        Rule(
            kind="requires",
            left=_OURS,
            right="profile_step_end > profile_step_start",
            text="--profile-step-end must be greater than --profile-step-start: it is the"
            " iteration after the last traced one",
        ),
        _needs_cpu("--profile-with-memory", "the allocations of operators"),
        _needs_cpu("--profile-with-stack", "the call stacks of operators"),
        _needs_cpu("--profile-record-shapes", "the input shapes of operators"),
    ),
    patches=(
        Patch(
            target="megatron.core.parallel_state:get_nccl_options",
            kind="wrap",
            value=f"{_HERE}:wrap_group_options",
            when="device == 'npu'",
            reason="HCCL takes a group's name from its options and not from group_desc; what makes"
            " the groups has no place for options of HCCL.",
        ),
    ),
)
# What is read from the configuration to make the profiler.
_READ = (
    *("profile_step_start", "profile_step_end", "profile_ranks", "profile_level"),
    *("profile_with_cpu", "profile_with_stack", "profile_with_memory", "profile_record_shapes"),
    "profile_save_path",
)


class TraceHook:
    """Tells a profiler the iterations; see `mindspeed.features.profile.steps.StepHook`."""

    def __init__(self, profiler: StepProfiler) -> None:
        self.profiler = profiler
        self.begin = profiler.begin
        self.end = profiler.end
        self.close = profiler.close

    def line(self, iteration: int) -> str | None:
        """Nothing: the results are files."""
        return None

    def facts(self) -> Mapping[str, float]:
        """Nothing: the results are files."""
        return {}


def make_hook(values: Mapping[str, Any], rank: int, world_size: int) -> TraceHook | None:
    """The hook of a rank; None where it is not traced.

    Args:
        values: every option by name.
        rank: this process.
        world_size: number of ranks.

    Raises:
        ValueError: a flag has a value that cannot be, or the save path cannot be written.
    """
    if values.get("use_pytorch_profiler"):
        return None
    from ms_profile.profiler import StepProfiler

    check(values, world_size)
    options = SimpleNamespace(**_options(values))
    try:
        profiler = StepProfiler.from_megatron(options, rank=rank, world_size=world_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--profile: {error}") from error
    return None if profiler.backend == "none" else TraceHook(profiler)


def check(values: Mapping[str, Any], world_size: int) -> None:
    """What the rules cannot say: ranks of the world, and a window that training reaches.

    Args:
        values: every option by name.
        world_size: number of ranks.

    Raises:
        ValueError: names the flag.
    """
    if not values.get("profile") or values.get("use_pytorch_profiler"):
        return
    options = _options(values)
    for rank in options["profile_ranks"]:
        if not -1 <= rank < world_size:
            raise ValueError(
                f"--profile-ranks names rank {rank}, but there are the ranks 0 to"
                f" {world_size - 1} (-1 means all)"
            )
    start, last = options["profile_step_start"], values.get("train_iters")
    if last is not None and start > last:
        raise ValueError(
            f"--profile-step-start is {start}, but training ends with iteration {last}: nothing"
            " would be traced"
        )


def notes(values: Mapping[str, Any], start: int, device: str) -> Iterator[str]:
    """What a user may not expect of the flags.

    Args:
        values: every option by name.
        start: last iteration that an earlier run has done; 0 for a new one.
        device: "cpu", "npu" or "cuda".
    """
    if not values.get("profile"):
        return
    options = _options(values)
    if device == "cpu" and not options["profile_with_cpu"]:
        yield "profile: the CPU is the device here, so its operators are traced"
    first, stop = options["profile_step_start"], options["profile_step_end"]
    if start + 1 >= stop:
        yield (
            f"profile: nothing will be traced: the window is the iterations {first} to {stop - 1},"
            f" and training goes on with {start + 1}"
        )


def for_level(flags: Mapping[str, Any], level: int) -> dict[str, Any]:
    """The flags of one of several levels that train side by side: each has a folder of its own."""
    if not flags.get("profile"):
        return dict(flags)
    path = Path(_options(flags)["profile_save_path"]) / f"level{level}"
    return {**flags, "profile_save_path": str(path)}


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    from mindspeed.features import load_table

    defaults = load_table().defaults
    return {name: values.get(name, defaults[name]) for name in _READ}


def wrap_group_options(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give HCCL the name of each group, so that communication rows carry it."""

    @functools.wraps(original)
    def get_nccl_options(pg_name: str, nccl_comm_cfgs: Any) -> Any:
        options = original(pg_name, nccl_comm_cfgs)
        if options is not None:
            return options  # made for NCCL, by the user's own file
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        options = ProcessGroupHCCL.Options()
        options.hccl_config = {"group_name": pg_name}
        return options

    return get_nccl_options
