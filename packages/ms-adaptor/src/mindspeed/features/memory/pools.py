"""--memory-fragmentation: a flag of an allocator that is no longer replaced."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from mindspeed.patching.records import Feature, Patch

_HERE = "mindspeed.features.memory.pools"

FEATURE = Feature(
    name="memory.pools",
    level=2,
    doc="Says after the first step whether memory is fragmented, and what to set; sets nothing.",
    packages=("ms-memory",),
    patches=(
        Patch(
            target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
            kind="wrap",
            value=f"{_HERE}:wrap_model",
            order=10,
            reason="What is said is about a process that trains; a plan is also made without one.",
        ),
    ),
    advise=f"{_HERE}:advise",
    page="docs/memory/megatron.md",
)


class _Once:
    """Waits for the first optimizer step after a model was built."""

    def __init__(self) -> None:
        self.hook: Any = None
        self.said = False

    def wait(self) -> None:
        """Have the step reported; a second call changes nothing."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        from mindspeed.patching.apply import active_handle

        handle = active_handle()
        if self.hook is None and handle is not None:
            self.said = False
            self.hook = register_optimizer_step_post_hook(lambda *_: self.say())
            handle.on_undo(self.stop)

    def stop(self) -> None:
        """Wait no more."""
        self.hook.remove()
        self.hook = None

    def say(self) -> None:
        """Print what the allocator of the first process counted, once."""
        import torch.distributed as dist

        from ms_memory import alloc

        # The hook stays until the plan is undone: torch is walking through its hooks.
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first and not self.said:
            self.said = True
            found = alloc.recommend(alloc.read())
            text = f"--memory-fragmentation is deprecated and sets nothing: {found}"
            print(text, file=sys.stderr, flush=True)


_once = _Once()


def wrap_model(original: Callable[..., None]) -> Callable[..., None]:
    """Report the allocator after the first step that follows."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        _once.wait()

    return init


def advise(config: Any) -> str:
    """Say what became of the flag.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    return "deprecated: expandable segments of torch's allocator do what separate pools did"
