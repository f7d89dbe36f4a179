"""What runs around every optimizer step, in `mindspeed train` and in Megatron-LM's loop.

A step hook observes training and never disturbs it: when one raises after the start, that is logged
once and its `begin` and `end` are not called again. Its `line` and `facts` still are, on every rank
at the same iteration, since they may reduce over ranks: these must not raise because of an earlier
failure.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from mindspeed.patching.records import Feature, Patch

_HERE = "mindspeed.features.profile.steps"
_TRAINING = "megatron.training.training"
_WANTED = "profile or op_cal_tflops"

FEATURE = Feature(
    name="profile.steps",
    level=0,
    doc="Profilers and meters see where an optimizer step begins and ends.",
    packages=(),
    patches=(
        Patch(
            target=f"{_TRAINING}:train",
            kind="wrap",
            value=f"{_HERE}:wrap_train",
            when=_WANTED,
            versions=">=0.16,<0.17",
            reason="A profiler has to be closed when training ends, also by an error; the loop "
            "has no hook for it.",
        ),
        Patch(
            target=f"{_TRAINING}:train_step",
            kind="wrap",
            value=f"{_HERE}:wrap_train_step",
            when=_WANTED,
            versions=">=0.16,<0.17",
            reason="The loop takes its own profiler from the arguments and calls nothing else "
            "around a step.",
        ),
        Patch(
            target=f"{_TRAINING}:training_log",
            kind="wrap",
            value=f"{_HERE}:wrap_training_log",
            when=_WANTED,
            versions=">=0.16,<0.17",
            reason="The log has no callback that could add a line.",
        ),
    ),
)

# The option that asks for a hook, and what makes it: `make_hook(values, rank, world_size)`, called
# when the option is on, returns the hook, or None when this rank has nothing to observe, and
# raises ValueError for values that cannot be.
FACTORIES = {
    "profile": "mindspeed.features.profile.trace:make_hook",
    "op_cal_tflops": "mindspeed.features.profile.flops:make_hook",
}

_log = logging.getLogger("mindspeed.profile")


class StepHook(Protocol):
    """An observer of optimizer steps; iterations are the printed numbers, 1 for the first."""

    def begin(self, iteration: int) -> None:
        """Called before the step."""

    def end(self, iteration: int) -> None:
        """Called after the step."""

    def line(self, iteration: int) -> str | None:
        """What to add to the training log at this iteration; called on every rank."""

    def facts(self) -> Mapping[str, float]:
        """Figures by name, for TensorBoard and the table of a run; called on every rank."""

    def close(self) -> None:
        """Called once when training has ended, by an error in the middle of a step too."""


class StepHooks:
    """The hooks that a configuration asks for.

    Args:
        hooks: in the order in which they begin; they end in reverse.
        rank: this process's global rank, for messages.
    """

    def __init__(self, hooks: Sequence[StepHook], rank: int = 0) -> None:
        self._hooks = tuple(hooks)
        self._rank = rank
        self._failed: set[int] = set()

    @classmethod
    def of(cls, values: Mapping[str, Any], rank: int, world_size: int) -> StepHooks:
        """The hooks for a configuration.

        Args:
            values: every option by name, as Megatron's arguments or a `TrainConfig` give them.
            rank: this process's global rank.
            world_size: number of ranks.

        Raises:
            ValueError: a flag has a value that cannot be.
        """
        made = []
        for option, reference in FACTORIES.items():
            if not values.get(option):
                continue
            module, _, name = reference.partition(":")
            hook = getattr(importlib.import_module(module), name)(values, rank, world_size)
            if hook is not None:
                made.append(hook)
        return cls(made, rank)

    def __len__(self) -> int:
        return len(self._hooks)

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Around one optimizer step; what the step raises passes through."""
        for hook in self._hooks:
            self._call(hook, "begin", iteration)
        yield
        for hook in reversed(self._hooks):
            self._call(hook, "end", iteration)

    def lines(self, iteration: int) -> list[str]:
        """Lines for the training log; call it on every rank."""
        found = [self._call(hook, "line", iteration) for hook in self._hooks]
        return [line for line in found if line]

    def facts(self) -> dict[str, float]:
        """Figures of all hooks by name; call it on every rank."""
        out: dict[str, float] = {}
        for hook in self._hooks:
            out.update(self._call(hook, "facts") or {})
        return out

    def close(self) -> None:
        """Ends all hooks; harmless when called again."""
        hooks, self._hooks = self._hooks, ()
        for hook in reversed(hooks):
            self._call(hook, "close")

    def _call(self, hook: StepHook, method: str, *args: Any) -> Any:
        if id(hook) in self._failed and method in ("begin", "end"):
            return None
        try:
            return getattr(hook, method)(*args)
        except Exception as error:
            if id(hook) not in self._failed:
                self._failed.add(id(hook))
                # Above a warning: training commands hide those of libraries.
                _log.error(
                    "rank %d: %s failed in %s and is switched off, training goes on: %s: %s",
                    self._rank,
                    type(hook).__name__,
                    method,
                    type(error).__name__,
                    error,
                )
            return None


# The hooks of the training loop that is running in this process; Megatron-LM has one at most.
_running: StepHooks | None = None


def wrap_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Open the hooks before Megatron-LM's loop and close them after it.

    The loop's own use of `--profile` (CUDA's profiler calls for nsys) stays off; its use of
    torch.profiler, asked for by name, stays.
    """

    @functools.wraps(original)
    def train(*args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist
        from megatron.training import get_args

        global _running
        options = get_args()
        _running = StepHooks.of(vars(options), dist.get_rank(), dist.get_world_size())
        profile = options.profile
        options.profile = profile and options.use_pytorch_profiler
        try:
            return original(*args, **kwargs)
        finally:
            options.profile = profile
            hooks, _running = _running, None
            hooks.close()

    return train


def wrap_train_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Call the hooks around a step; Megatron-LM counts from 0 and prints from 1."""

    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        if _running is None:
            return original(*args, **kwargs)
        from megatron.training import get_args

        with _running.step(get_args().curr_iteration + 1):
            return original(*args, **kwargs)

    return train_step


def wrap_training_log(original: Callable[..., Any]) -> Callable[..., Any]:
    """Print the hooks' lines after Megatron-LM's own, and hand their figures to TensorBoard."""

    @functools.wraps(original)
    def training_log(
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        out = original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **kw)
        from megatron.training import get_args, get_tensorboard_writer, print_rank_last

        if _running is None or iteration % get_args().log_interval:
            return out
        for line in _running.lines(iteration):
            print_rank_last(line)
        writer = get_tensorboard_writer()
        for name, value in _running.facts().items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
        return out

    return training_log
