"""A node's program as the executor runs it: blocks as calls, made once a plan and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from weakref import finalize

import torch

from .calls import Call, calls_of
from .plan import AttnPlan, Program, Step, Transfer

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class LoweredStep:
    """A step of one node, its blocks as calls."""

    step: Step
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class NodeProgram:
    """What one node does.

    Attributes:
        node: which.
        program: of the whole plan.
        steps: of this node.
        due: for every transfer the step by which its receiver has it.
    """

    node: int
    program: Program
    steps: tuple[LoweredStep, ...]
    due: tuple[int, ...]

    @cached_property
    def sums_out(self) -> dict[tuple[int, int, int], Transfer]:
        """The transfer by which partial gradients of (owner, start, stop) leave this node."""
        return {
            (b.owner, b.start, b.stop): t
            for t in self.program.transfers
            if t.src == self.node
            for b in t.buffers
            if b.what == "dkv"
        }


_NOTES: dict[int, dict[Any, Any]] = {}


def notes(plan: AttnPlan) -> dict[Any, Any]:
    """Return what has been worked out for a plan, as long as the plan lives."""
    known = _NOTES.get(id(plan))
    if known is None:
        known = _NOTES[id(plan)] = {}
        finalize(plan, _NOTES.pop, id(plan), None)
    return known


def lower(
    plan: AttnPlan, direction: Direction, node: int, device: torch.device, by_position: bool
) -> NodeProgram:
    """Return a node's program with its calls; made once a plan.

    Args:
        plan: the plan.
        direction: which of its programs.
        node: whose part.
        device: where the lengths of packed sequences are needed.
        by_position: scores or dropout depend on positions.
    """
    known = notes(plan)
    key = (direction, node, device, by_position)
    if key not in known:
        program: Program = getattr(plan, direction)
        # What is made here outlives an inference mode.
        with torch.inference_mode(False):
            steps = tuple(
                LoweredStep(step, tuple(calls_of(plan, step.blocks, device, by_position)))
                for step in program.steps[node]
            )
        known[key] = NodeProgram(node, program, steps, _due(program))
    found: NodeProgram = known[key]
    return found


def _due(program: Program) -> tuple[int, ...]:
    due = [0] * len(program.transfers)
    for steps in program.steps:
        for t, step in enumerate(steps):
            for index in step.wait:
                due[index] = t
            for index in step.wait_after:
                due[index] = t + 1
    return tuple(due)


__all__ = ["LoweredStep", "NodeProgram", "lower", "notes"]
