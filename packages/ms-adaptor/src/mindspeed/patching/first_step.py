"""After the first optimizer step: which patched functions has nobody called?

PyTorch's own global step hook tells when the step is over. It stays, silent, until the plan is
undone: PyTorch is walking through its hooks while one of them runs.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed.patching.apply import Handle

logger = logging.getLogger("mindspeed")


def watch_first_step(handle: Handle) -> Callable[[], None]:
    """Report once after the next optimizer step of this process.

    Returns:
        A function that stops watching. Without torch in the process there is nothing to watch.
    """
    if "torch" not in sys.modules:
        return _nothing
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = itertools.count()

    def after_step(*_: Any) -> None:
        if next(steps) == 0:
            report_never_called(handle)

    hook = register_optimizer_step_post_hook(after_step)
    stop: Callable[[], None] = hook.remove
    return stop


def _nothing() -> None:
    """Nothing to stop."""


def report_never_called(handle: Handle) -> None:
    """Log what was not reached: a warning for features that were asked for, else information.

    Level 0 repairs what this run may have no use for, such as the checkpoint of an optimizer. A
    feature of a higher level that nobody reaches is a setting without effect.
    """
    never = set(handle.never_called())
    steps = [step for step in handle.plan.acting if step.patch.target in never]
    asked = [step for step in steps if step.level > 0]
    if asked:
        logger.warning(
            "not called in the first step on this rank, so without effect: %s",
            _listed(f"{step.patch.target} ({step.feature})" for step in asked),
        )
    repairs = [step.patch.target for step in steps if step.level == 0]
    if repairs:
        logger.info("repairs that the first step did not reach: %s", _listed(repairs))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
