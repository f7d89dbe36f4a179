"""The first training step is planned before it runs; `wrap` stands around Megatron's schedules."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed.features.memory.planner.batches import Batches
from mindspeed.features.memory.planner.exchange import exchange
from mindspeed.features.memory.planner.flight import in_flight
from mindspeed.features.memory.planner.guard import guard, watched
from mindspeed.features.memory.planner.report import publish
from mindspeed.features.memory.planner.settings import PlannerSettings
from mindspeed.features.memory.planner.stage import (
    EVERY,
    Measured,
    StageError,
    device_memory,
    layers_of,
    names_of,
    raise_together,
    stage_plan,
)
from mindspeed.features.memory.planner.static import static_bytes
from mindspeed.features.memory.planner.step import (
    MicroStep,
    as_found,
    left_behind,
    received,
    unwrapped,
)
from mindspeed.features.memory.session import open_session, session_of
from mindspeed.features.memory.settings import MemorySettings
from mindspeed.features.ops.script import script_arguments
from ms_memory import Session, planner
from ms_memory.planner import Plan, report


@dataclass(frozen=True)
class Planned:
    """What was decided for the chunks of this rank.

    Attributes:
        plan: of the pipeline stage; layers have their numbers in the whole model.
        stage: of the pipeline.
        first: this rank is the first of its stage.
        workspaces: bytes that the first micro-step leaves behind, part of the plan's.
        verified: most bytes alive in a micro-step under the plan; None where more than one
            micro-batch is in flight, which one micro-step does not show.
        notes: what was asked for and not done, with the reason.
    """

    plan: Plan
    stage: int
    first: bool
    workspaces: int
    verified: int | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the report."""
        lines = [f"pipeline stage {self.stage}: {report.text(self.plan)}"]
        if self.verified is not None:
            lines.append(
                f"\npredicted peak {report.size(self.plan.peak)}, measured in one micro-step"
                f" {report.size(self.verified)}"
            )
        lines += self.notes
        return "\n".join(lines)


_plans: weakref.WeakKeyDictionary[Any, Planned] = weakref.WeakKeyDictionary()


def planned(chunks: Sequence[Any]) -> Planned | None:
    """Return what was decided for model chunks, None before their first training step."""
    return _plans.get(unwrapped(chunks[0]))


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: the schedule that it returns plans its first step."""

    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **options: Any) -> Any:
        return _planning(original(*args, **options))

    return get_forward_backward_func


def _planning(schedule: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(schedule)
    def run(**call: Any) -> Any:
        from megatron.core.utils import get_model_config

        model = call["model"]
        chunks = model if isinstance(model, list) else [model]
        settings = getattr(get_model_config(chunks[0]), "memory_plan", None)
        if settings is None or call.get("forward_only") or planned(chunks) is not None:
            return schedule(**call)
        batches = Batches(call["data_iterator"])
        made = plan_step(schedule, call, batches, chunks, settings)
        _plans[unwrapped(chunks[0])] = made
        if arguments := script_arguments():
            publish(made, arguments)
        return schedule(**{**call, "data_iterator": batches.trained()})

    return run


def plan_step(
    schedule: Callable[..., Any],
    call: Mapping[str, Any],
    batches: Batches,
    chunks: Sequence[Any],
    settings: PlannerSettings,
) -> Planned:
    """Measure one micro-step, solve, and install; nothing else is changed.

    Args:
        schedule: Megatron's.
        call: its arguments.
        batches: its data, which is read again afterwards.
        chunks: of this rank, wrapped.
        settings: what was asked for.

    Raises:
        MemoryFeatureError: E-M30, the budget is too small; E-M22, a pin matches nothing.
    """
    error = made = None
    with as_found(chunks):
        try:
            made = _planned(schedule, dict(call), batches, chunks, settings)
        except StageError as refused:
            error = refused
            for session in filter(None, map(session_of, chunks)):
                session.close()
    raise_together(error)
    assert made is not None
    return made


def _planned(
    schedule: Callable[..., Any],
    call: dict[str, Any],
    batches: Batches,
    chunks: Sequence[Any],
    settings: PlannerSettings,
) -> Planned:
    import torch.distributed as dist
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    static = static_bytes(chunks, _optimizer(unwrapped(chunks[0])))
    inputs = received(schedule, call, batches, chunks)
    steps = [MicroStep(call, batches, chunks, n, x) for n, x in enumerate(inputs)]
    sessions = [open_session(unwrapped(chunk), MemorySettings()) for chunk in chunks]
    with contextlib.ExitStack() as stack:
        sizes = [stack.enter_context(watched(unwrapped(chunk))) for chunk in chunks]
        left = sum(map(left_behind, steps))
    mine = _measured(sessions, steps, settings, static + left, call["num_microbatches"])
    alone = len(chunks) == 1 and mine.in_flight == (1,)
    less, peak = 0, None
    for again in (True, False):
        plan = stage_plan(settings, mine, group, less)
        planner.apply(sessions, mine.local(plan), group=group)
        if not alone:
            break
        peak = max(exchange(planner.verify(sessions[0], steps[0], plan).measured, group))
        if peak <= plan.budget or not again:
            break
        less = peak - plan.budget
        sessions = _reopened(sessions)
    for session, seen in zip(sessions, sizes, strict=True):
        guard(session, max(seen))
    first = dist.get_rank(group) == 0
    return Planned(plan, stage, first, left, peak, _notes(settings, sessions[0]))


def _notes(settings: PlannerSettings, session: Session) -> tuple[str, ...]:
    found = []
    if "swap" in (settings.actions or ()) and session.device.name == "cpu":
        found.append("nothing is swapped: the processor has no other memory")
    if settings.streaming:
        found.append("optimizer states stay on the device: --swap-optimizer streams them")
    return tuple(found)


def _measured(
    sessions: Sequence[Session],
    steps: Sequence[MicroStep],
    settings: PlannerSettings,
    static: int,
    micro_batches: int,
) -> Measured:
    from megatron.core import parallel_state

    allowed = EVERY if settings.actions is None else settings.actions
    models = [session.model for session in sessions]
    profiles = tuple(
        planner.profile(
            session,
            step,
            layers=list(layers_of(session.model)),
            actions=allowed,
            steps=settings.steps,
        )
        for session, step in zip(sessions, steps, strict=True)
    )
    held = in_flight(
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        len(models),
        micro_batches,
        getattr(models[0].config, "microbatch_group_size_per_vp_stage", None),
    )
    layers = models[0].config.num_layers
    return Measured(profiles, names_of(models), held, static, layers, *device_memory())


def _optimizer(chunk: Any) -> Any:
    """Return Megatron's optimizer, of which the configuration holds a method."""
    return getattr(getattr(chunk.config, "grad_scale_func", None), "__self__", None)


def _reopened(sessions: Sequence[Session]) -> list[Session]:
    for session in sessions:
        session.close()
    return [open_session(session.model, MemorySettings()) for session in sessions]
