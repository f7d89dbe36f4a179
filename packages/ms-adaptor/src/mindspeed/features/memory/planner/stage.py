"""One plan for each pipeline stage: measured on all its ranks, solved on one, installed on all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from mindspeed.features.memory.planner.exchange import exchange
from mindspeed.features.memory.planner.settings import NO_DEVICE, PlannerSettings
from ms_memory.errors import MemoryFeatureError
from ms_memory.planner import Option, Plan, Problem, Profile, Site, joined, solve

# What stays free of a budget of "what the device has left": workspaces, communication buffers and
# what the allocator rounds up.
RESERVE = 0.05
EVERY = ("discard", "recompute", "swap")
_NUMBER = re.compile(r"^layers\.\d+")
_LAYER = re.compile(r"decoder\.layers\.\d+")


@dataclass(frozen=True)
class Measured:
    """What one rank found out.

    Attributes:
        profiles: of its chunks.
        names: how the planner calls a layer of one of the chunks -> its name in the whole model.
        in_flight: micro-batches of each chunk that are held at one time.
        static: bytes of weights, gradients and optimizer.
        layers: of the whole model.
        total: bytes of the device; 0 on the processor.
        free: of these, bytes that this process has or may still take.
    """

    profiles: tuple[Profile, ...]
    names: Mapping[str, str]
    in_flight: tuple[int, ...]
    static: int
    layers: int
    total: int = 0
    free: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for other ranks."""
        return {**asdict(self), "profiles": [profile.as_dict() for profile in self.profiles]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """Read what `as_dict` gave."""
        profiles = tuple(map(Profile.from_dict, data["profiles"]))
        return cls(**{**data, "profiles": profiles, "in_flight": tuple(data["in_flight"])})

    @property
    def problem(self) -> Problem:
        """Return what is to be solved, with the names of layers in the whole model.

        Chunks hold the most of their micro-batches at different times; counted at the same time
        they need no less than in truth.
        """
        known = sum(profile.step for profile in self.profiles)
        found = joined(self.profiles, self.in_flight, self.static - known)
        sites = tuple(_renamed(site, self.names) for site in found.sites)
        events = tuple(map(self._event, found.events))
        return replace(found, sites=sites, events=events)

    def _event(self, event: str) -> str:
        way, _, name = event.partition(" ")
        return f"{way} {rename(name, self.names)}"

    def local(self, plan: Plan) -> Plan:
        """Return a plan under the names that the planner gave."""
        back = {new: old for old, new in self.names.items()}
        decisions = tuple(
            replace(d, site=rename(d.site, back), option=_option(d.option, back))
            for d in plan.decisions
        )
        return replace(plan, decisions=decisions)


def _renamed(site: Site, names: Mapping[str, str]) -> Site:
    options = tuple(_option(option, names) for option in site.options)
    return replace(site, name=rename(site.name, names), options=options)


def _option(option: Option, names: Mapping[str, str]) -> Option:
    return replace(option, actions=tuple((rename(p, names), a) for p, a in option.actions))


def rename(path: str, names: Mapping[str, str]) -> str:
    """Return a path with its beginning renamed.

    Args:
        path: of a layer, or of a part of one.
        names: layer -> new name.
    """
    for old, new in names.items():
        if path == old or path.startswith(f"{old}."):
            return new + path[len(old) :]
    return path


def layers_of(model: Any) -> dict[str, int]:
    """Return path -> number in the whole model, from 0, of the layers of a chunk.

    Args:
        model: a chunk without wrappers.
    """
    return {
        path: module.layer_number - 1
        for path, module in model.named_modules()
        if _LAYER.fullmatch(path) and hasattr(module, "layer_number")
    }


def names_of(models: Sequence[Any]) -> dict[str, str]:
    """Return the planner's name -> the name in the whole model of everything that has one."""
    found: dict[str, str] = {}
    for chunk, model in enumerate(models):
        found |= {f"{chunk}:{path}": f"layers.{n}" for path, n in layers_of(model).items()}
        of_chunk = f" of chunk {chunk}" if len(models) > 1 else ""
        found |= {f"{chunk}:{end}": f"{end}{of_chunk}" for end in ENDS}
    return found


ENDS = ("before the layers", "after the layers")


def most(found: Sequence[Measured]) -> Measured:
    """Return the largest numbers of a stage's ranks: a plan for these fits all of them."""
    profiles = zip(*(m.profiles for m in found), strict=True)
    return replace(
        found[0],
        profiles=tuple(Profile.merged(same) for same in profiles),
        static=max(m.static for m in found),
        total=min(m.total for m in found),
        free=min(m.free for m in found),
    )


def budget_bytes(settings: PlannerSettings, found: Measured, problem: Problem) -> int:
    """Return the budget of a stage's ranks in bytes.

    Raises:
        ValueError: a share of the device's memory where there is no device.
    """
    asked = settings.budget
    if asked.kind == "bytes":
        return int(asked.amount)
    if asked.kind == "peak":
        return int(asked.amount * max(problem.live([0] * len(problem.sites))))
    if not found.total:
        raise ValueError(NO_DEVICE.format(asked.text))
    if asked.kind == "device":
        return int(asked.amount * found.total)
    return found.free - int(RESERVE * found.total)


def device_memory() -> tuple[int, int]:
    """Return the bytes of this rank's device, and those that this process has or can have."""
    from mindspeed import device

    installed = device.current()
    if installed is None or installed.type == "cpu":
        return 0, 0
    module = torch.get_device_module(installed.type)
    free, total = module.mem_get_info()
    return total, free + module.memory_reserved()


def stage_plan(settings: PlannerSettings, mine: Measured, group: Any, less: int = 0) -> Plan:
    """Solve once for the ranks of a stage; all get the same plan, checked by its digest.

    Args:
        settings: what was asked for.
        mine: what this rank measured.
        group: the ranks of this stage.
        less: bytes by which the budget is lowered.

    Raises:
        StageError: E-M30, nothing fits the budget; E-M22, a pin matches nothing.
    """
    import torch.distributed as dist

    found = exchange(mine.as_dict(), group)
    told: dict[str, Any] = {}
    if dist.get_rank(group) == 0:
        told = _solved(settings, most(list(map(Measured.from_dict, found))), less)
    answer = exchange(told, group)[0]
    if "error" in answer:
        raise StageError(**answer["error"])
    return Plan.from_dict(json.loads(answer["plan"]))


def _solved(settings: PlannerSettings, found: Measured, less: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    problem = found.problem
    allowed = EVERY if settings.actions is None else settings.actions
    try:
        budget = budget_bytes(settings, found, problem) - less
        pins = pins_of(settings, problem, found.layers)
        plan = solve(problem, budget, actions=allowed, pins=pins)
    except ValueError as error:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        code = getattr(error, "code", "")
        return {"error": {"code": code, "text": str(error), "stage": stage}}
    return {"plan": json.dumps(plan.as_dict())}


def pins_of(settings: PlannerSettings, problem: Problem, layers: int) -> dict[str, str]:
    """Return the pins without those that are about layers of other stages.

    Args:
        settings: what was asked for.
        problem: of this stage.
        layers: of the whole model.
    """
    here = {part for site in problem.sites for o in site.options for part, _ in o.actions}
    parts = {_NUMBER.sub("", name) for name in here}
    anywhere = [f"layers.{n}{part}" for n in range(layers) for part in ("", *parts)]
    here |= {site.name for site in problem.sites}

    def concerns(pattern: str) -> bool:
        mine = any(fnmatchcase(name, pattern) for name in here)
        return mine or not any(fnmatchcase(name, pattern) for name in anywhere)

    return {pattern: action for pattern, action in settings.pins if concerns(pattern)}


def raise_together(error: StageError | None) -> None:
    """Raise on every rank what one stage refused: the others would wait for it.

    Raises:
        StageError: of the first stage that has one.
    """
    mine = {} if error is None else {"code": error.code, "text": error.text, "stage": error.stage}
    for told in exchange(mine):
        if told:
            raise StageError(**told)


class StageError(MemoryFeatureError):
    """What the rank that solves refused, on every rank.

    Args:
        code: of the refusal, empty for an argument that is wrong.
        text: what it said.
        stage: pipeline stage of that rank.
    """

    def __init__(self, code: str, text: str, stage: int) -> None:
        ValueError.__init__(self, f"{text} (pipeline stage {stage})")
        self.code, self.text, self.stage = code, text, stage
