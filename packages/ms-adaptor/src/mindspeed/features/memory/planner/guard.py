"""What happens when a micro-batch is larger than those that were planned for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from mindspeed.features.memory.planner.stage import layers_of
from mindspeed.features.memory.session import open_session
from mindspeed.features.memory.settings import MemorySettings
from ms_memory import Session, recompute
from ms_memory.errors import refuse
from ms_memory.planner.profile import tensor_bytes

_log = logging.getLogger("mindspeed.memory")


def input_bytes(model: Any, args: Any) -> int:
    """Return the bytes that a chunk is about to work on.

    Args:
        model: without wrappers.
        args: tensors of its call; what it received from another stage is added.
    """
    decoder = getattr(model, "decoder", None)
    return tensor_bytes((args, getattr(decoder, "input_tensor", None)))


@contextlib.contextmanager
def watched(model: Any) -> Iterator[list[int]]:
    """Within, note the bytes of every call of a chunk."""
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(input_bytes(module, (args, kwargs)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def guard(session: Session, planned: int) -> None:
    """Recompute every layer of a chunk from the first larger micro-batch on.

    Ranks that share experts exchange tokens in recomputed layers as well, so that none of them may
    begin alone: there a larger micro-batch is refused.

    Args:
        session: in which the plan is installed.
        planned: bytes of a micro-batch, as `input_bytes` counts them.
    """
    model = session.model

    def check(module: Any, args: Any, kwargs: Any) -> None:
        nbytes = input_bytes(module, (args, kwargs))
        if nbytes <= planned or session.closed:
            return
        where = f"a micro-batch of {nbytes:,} bytes, planned for {planned:,}"
        if module.config.expert_model_parallel_size > 1:
            refuse("E-M23", where, "begin training with the longest sequences")
        # Above a warning: training commands hide those of libraries.
        _log.error("%s: every layer is recomputed from here on", where)
        session.close()
        again = open_session(model, MemorySettings())
        recompute.modules(again, list(layers_of(model)))

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    session.on_close(handle.remove)
