"""One `ms_memory.Session` on each model chunk, which all memory features share.

Where it opens: at the end of `GPTModel.__init__`, of every virtual pipeline stage by itself. Then
all modules of the chunk are there, from the embedding to the output layer, and neither the
low-precision wrapper nor the data-parallel one, so that paths ("decoder.layers.0.mlp") are the same
with and without them. Both wrappers call the chunk as a module, and the session stands in its
forward. `open_session` then calls each of `INSTALLERS` for each transformer block.

    def install(session: Session, block: TransformerBlock, settings: MemorySettings) -> None

A new feature adds a field to `MemorySettings`, its flags to `NEEDS_SESSION`, and a line here. It
reads numbers of stages from `block.config` and `block.vp_stage`, and paths from `session.path`.

The model may still lie on the host here and move later: nothing may read the device of its
parameters in an installer. `session.device` is the device that the process runs on.

How it closes: with the plan that is in force (`Handle.on_undo`), or `close_sessions`. A session is
held by its model alone.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindspeed.features.memory.settings import NEEDS_SESSION, MemorySettings, conflict, mark
from mindspeed.features.ops.script import before_post_init
from mindspeed.patching.records import Feature, Patch

if TYPE_CHECKING:
    from ms_memory import Session

_HERE = "mindspeed.features.memory.session"

# Called for each transformer block of a chunk, in this order; lazy, so that nothing is imported
# before a chunk is built.
INSTALLERS: tuple[str, ...] = (
    "mindspeed.features.memory.recompute.layers:install",
    "mindspeed.features.memory.swap.install:attention",
    "mindspeed.features.memory.swap.install:inputs",
)

FEATURE = Feature(
    name="memory.session",
    level=2,
    doc="A session of ms_memory on each model chunk; what it does is said by the other features.",
    when=NEEDS_SESSION,
    packages=("ms-memory",),
    patches=(
        Patch(
            target="megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
            kind="wrap",
            value=f"{_HERE}:wrap_post_init",
            order=6,
            reason="A model sees its configuration alone, and no field of it names our features.",
        ),
        Patch(
            target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
            kind="wrap",
            value=f"{_HERE}:wrap_model",
            order=9,
            reason="A session needs the modules of a whole chunk; specs build them one by one, and"
            " no callback follows the last.",
        ),
    ),
    rules=(
        conflict(
            "E-M10",
            NEEDS_SESSION,
            "overlap_moe_expert_parallel_comm",
            "a feature of ms_memory with --overlap-moe-expert-parallel-comm: its schedule runs"
            " parts of layers outside the forward of the model",
            "Leave one of them out.",
        ),
        conflict(
            "E-M10",
            NEEDS_SESSION,
            "enable_cuda_graph or external_cuda_graph or cuda_graph_impl != 'none'",
            "a feature of ms_memory with CUDA graphs: a graph keeps what it was captured with",
            "Leave one of them out.",
        ),
        conflict(
            "E-M10",
            NEEDS_SESSION,
            "use_legacy_models",
            "a feature of ms_memory with --use-legacy-models: only models of megatron.core are"
            " served",
            "Leave --use-legacy-models out.",
        ),
    ),
    page="docs/memory/megatron.md",
)

wrap_post_init = before_post_init(mark)

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def wrap_model(original: Callable[..., None]) -> Callable[..., None]:
    """Open a session where the configuration of a new model asks for one."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        found = getattr(self.config, "memory_settings", None)
        if found is not None:
            open_session(self, found)

    return init


def open_session(model: Any, settings: MemorySettings, device: Any = None) -> Session:
    """Open a session on a model chunk and install what its settings ask for.

    Args:
        model: a chunk, before or after it is moved, converted or wrapped.
        settings: what to install.
        device: of `ms_memory.device`; None: that of this process, one for all its chunks.

    Raises:
        MemoryFeatureError: a feature refuses the model; then the session is closed again.
    """
    from ms_memory import Session

    session = Session(model, device=_device() if device is None else device, rng=("cpu",))
    try:
        _register_generators(session)
        for name in INSTALLERS:
            for block in _blocks(model):
                _load(name)(session, block, settings)
    except BaseException:
        session.close()
        raise
    _sessions.add(session)
    _close_with_the_plan()
    return session


def session_of(model: Any) -> Session | None:
    """Return the open session of a chunk, also of a wrapped one; None where there is none."""
    modules = set(model.modules())
    return next((s for s in open_sessions() if s.model in modules), None)


def open_sessions() -> tuple[Session, ...]:
    """Return the sessions of all chunks that are alive."""
    return tuple(session for session in _sessions if not session.closed)


def close_sessions() -> None:
    """Close the sessions of all chunks; their models are Megatron's own again.

    Raises:
        MemoryFeatureError: E-M21, somebody replaced a forward since; every session is closed.
    """
    found, errors = open_sessions(), []
    _sessions.clear()
    for session in found:
        try:
            session.close()
        except ValueError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _close_with_the_plan() -> None:
    from mindspeed.patching.apply import active_handle

    handle = active_handle()
    if handle is not None:
        handle.on_undo(close_sessions)


def _blocks(model: Any) -> list[Any]:
    from megatron.core.transformer.transformer_block import TransformerBlock

    return [module for module in model.modules() if isinstance(module, TransformerBlock)]


def _load(name: str) -> Callable[..., None]:
    module, _, function = name.partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found


def _device() -> Any:
    """Return the device of this process, whose copy engines all chunks share."""
    import torch

    from ms_memory.device import device_of

    others = (session.device for session in open_sessions())
    return next(others, None) or device_of(torch.device(_kind()))


def _kind() -> str:
    """Return the type of the device that the model will run on, which it need not be on yet."""
    import torch

    from mindspeed import device

    installed = device.current()
    if installed is not None:
        return installed.type
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if here is None else here.type


def _register_generators(session: Session) -> None:
    """Replay the accelerator's generator and Megatron's named streams, besides the processor's."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    kind = _kind()
    if kind != "cpu":
        generators = torch.get_device_module(kind)
        session.register_rng(generators.get_rng_state, generators.set_rng_state)
    # The tracker is asked for anew each time: a script may replace it after the model is built.
    session.register_rng(
        lambda: get_cuda_rng_tracker().get_states(),
        lambda states: get_cuda_rng_tracker().set_states(states),
    )
